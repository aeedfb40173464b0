"""GLM-4.5, 4.6 and 4.7 (Z.ai, 2025): part of each head is rotated, the router is DeepSeek-V3's."""

from transformers import Glm4MoeConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.rope import RotaryEmbedding
from moezoo.models.attentions import grouped_queries, norm_of_each_head
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.mixtures import dense_or_mixture, first_layers, sigmoid_route
from moezoo.models.names import (
    ATTENTION,
    BIASED_MIXTURES,
    DECODER,
    QK_NORM,
    TOKEN_PREDICTION_LAYERS,
)

ASSUMES = ASSUMED_EVERYWHERE


def build(config: Glm4MoeConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        norms = norm_of_each_head(config) if config.use_qk_norm else {}
        return grouped_queries(config, qkv_bias=config.attention_bias, **norms)

    feed_forward = dense_or_mixture(
        config,
        sigmoid_route(config),
        dense=first_layers(config),
        num_shared=config.n_shared_experts,
    )
    return pre_norm_decoder(config, attention, feed_forward, rope=RotaryEmbedding(config))


CHECKPOINT = (*DECODER, *ATTENTION, *QK_NORM, *BIASED_MIXTURES, TOKEN_PREDICTION_LAYERS)
