"""Mellum 2 (JetBrains, 2026): Qwen3-MoE whose sliding layers have a rotation of their own."""

from transformers import MellumConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.rope import rope_of_whole_heads
from moezoo.models.attentions import (
    attention_biases,
    grouped_queries,
    norm_of_each_head,
    rotary_embeddings,
    window_of,
)
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.mixtures import dense_or_mixture, listed_layers, softmax_route
from moezoo.models.names import ATTENTION, DECODER, DENSE_MLP, EXPERTS, QK_NORM, TOKEN_PREDICTION

ASSUMES = ASSUMED_EVERYWHERE


def build(config: MellumConfig) -> Decoder:
    rope = rotary_embeddings(config, rope_of_whole_heads)

    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(
            config,
            **attention_biases(config),
            window=window_of(config, layer_idx),
            part=rope.parts[config.layer_types[layer_idx]],
            **norm_of_each_head(config),
        )

    route = softmax_route(config, renormalize=config.norm_topk_prob)
    feed_forward = dense_or_mixture(
        config, lambda: route, dense=listed_layers(config), num_shared=None
    )
    return pre_norm_decoder(config, attention, feed_forward, rope=rope)


CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    *QK_NORM,
    *DENSE_MLP,
    *EXPERTS,
    *TOKEN_PREDICTION,
)
