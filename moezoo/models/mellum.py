"""Mellum 2 (JetBrains, 2026): Qwen3-MoE with a separate rotation in sliding-window layers."""

from functools import partial

from transformers import MellumConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.rope import rope_of_whole_heads
from moezoo.models.common.attention import (
    attention_biases,
    grouped_queries,
    norm_of_each_head,
    rotary_embeddings,
    window_of,
)
from moezoo.models.common.feed_forward import dense_by_list, dense_or_moe, softmax_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import (
    ATTENTION,
    DECODER,
    DENSE_MLP,
    EXPERTS,
    QK_NORM,
    TOKEN_PREDICTION,
)

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

    feed_forward = dense_or_moe(
        config,
        partial(softmax_route, renormalize=config.norm_topk_prob),
        dense=dense_by_list(config),
        num_shared=None,
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
