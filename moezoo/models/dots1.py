"""dots.llm1 (rednote, 2025): Qwen3's attention with DeepSeek-V3's router."""

from transformers import Dots1Config

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.models.attentions import attention_biases, grouped_queries, norm_of_each_head, window_of
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.mixtures import dense_or_mixture, first_layers, sigmoid_route
from moezoo.models.names import ATTENTION, BIASED_MIXTURES, DECODER, QK_NORM

ASSUMES = ASSUMED_EVERYWHERE | {
    "scoring_func": ("sigmoid", "noaux_tc"),
    "moe_layer_freq": (1, None),
}


def build(config: Dots1Config) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(
            config,
            **attention_biases(config),
            window=window_of(config, layer_idx),
            **norm_of_each_head(config),
        )

    feed_forward = dense_or_mixture(
        config,
        sigmoid_route(config),
        dense=first_layers(config),
        num_shared=config.n_shared_experts,
    )
    return pre_norm_decoder(config, attention, feed_forward)


CHECKPOINT = (*DECODER, *ATTENTION, *QK_NORM, *BIASED_MIXTURES)
