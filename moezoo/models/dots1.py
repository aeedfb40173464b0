"""dots.llm1 (rednote, 2025): Qwen3's attention with DeepSeek-V3's router."""

from transformers import Dots1Config

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.models.common.attention import (
    attention_biases,
    grouped_queries,
    norm_of_each_head,
    window_of,
)
from moezoo.models.common.feed_forward import dense_by_count, dense_or_moe, sigmoid_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import ATTENTION, DECODER, DEEPSEEK_MOE, QK_NORM

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

    feed_forward = dense_or_moe(
        config,
        sigmoid_route,
        dense=dense_by_count(config),
        num_shared=config.n_shared_experts,
    )
    return pre_norm_decoder(config, attention, feed_forward)


CHECKPOINT = (*DECODER, *ATTENTION, *QK_NORM, *DEEPSEEK_MOE)
