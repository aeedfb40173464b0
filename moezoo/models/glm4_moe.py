"""GLM-4.5, 4.6 and 4.7 (Z.ai, 2025): part of each head is rotated, the router is DeepSeek-V3's."""

from transformers import Glm4MoeConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.rope import RotaryEmbedding
from moezoo.models.common.attention import grouped_queries, norm_of_each_head
from moezoo.models.common.feed_forward import dense_by_count, dense_or_moe, sigmoid_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import (
    ATTENTION,
    DECODER,
    DEEPSEEK_MOE,
    QK_NORM,
    TOKEN_PREDICTION_LAYERS,
)

ASSUMES = ASSUMED_EVERYWHERE


def build(config: Glm4MoeConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        norms = norm_of_each_head(config) if config.use_qk_norm else {}
        return grouped_queries(config, qkv_bias=config.attention_bias, **norms)

    feed_forward = dense_or_moe(
        config,
        sigmoid_route,
        dense=dense_by_count(config),
        num_shared=config.n_shared_experts,
    )
    return pre_norm_decoder(config, attention, feed_forward, rope=RotaryEmbedding(config))


CHECKPOINT = (*DECODER, *ATTENTION, *QK_NORM, *DEEPSEEK_MOE, TOKEN_PREDICTION_LAYERS)
