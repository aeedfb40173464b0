"""Solar Open (Upstage, 2025): Llama's attention, DeepSeek-V3's router, no dense layers."""

from transformers import SolarOpenConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.models.common.attention import grouped_queries
from moezoo.models.common.feed_forward import dense_or_moe, sigmoid_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import ATTENTION, DECODER, DEEPSEEK_MOE

ASSUMES = ASSUMED_EVERYWHERE | {"first_k_dense_replace": (0,), "use_qk_norm": (False,)}


def build(config: SolarOpenConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(config, qkv_bias=config.attention_bias)

    feed_forward = dense_or_moe(config, sigmoid_route, dense=(), num_shared=config.n_shared_experts)
    return pre_norm_decoder(config, attention, feed_forward)


CHECKPOINT = (*DECODER, *ATTENTION, *DEEPSEEK_MOE)
