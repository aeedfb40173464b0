"""Solar Open (Upstage, 2025): Llama's attention, DeepSeek-V3's router, no dense layers."""

from transformers import SolarOpenConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.models.attentions import grouped_queries
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.mixtures import dense_or_mixture, sigmoid_route
from moezoo.models.names import ATTENTION, BIASED_MIXTURES, DECODER

ASSUMES = ASSUMED_EVERYWHERE | {"first_k_dense_replace": (0,), "use_qk_norm": (False,)}


def build(config: SolarOpenConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(config, qkv_bias=config.attention_bias)

    feed_forward = dense_or_mixture(
        config, sigmoid_route(config), dense=(), num_shared=config.n_shared_experts
    )
    return pre_norm_decoder(config, attention, feed_forward)


CHECKPOINT = (*DECODER, *ATTENTION, *BIASED_MIXTURES)
