"""Mellum 2 (JetBrains, 2026): Qwen3-MoE whose sliding layers have a rotation of their own."""

from functools import partial

from transformers import MellumConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.moe.routing import softmax_topk
from moezoo.layers.rope import whole_heads
from moezoo.loaders.mapping import Skip
from moezoo.models.attentions import (
    grouped_queries,
    norm_of_each_head,
    rotary_embeddings,
    window_of,
)
from moezoo.models.fields import ASSUMED_EVERYWHERE, experts_per_token
from moezoo.models.mixtures import dense_or_mixture, listed_layers
from moezoo.models.names import ATTENTION, DECODER, DENSE_MLP, EXPERTS, QK_NORM

ASSUMES = ASSUMED_EVERYWHERE


def build(config: MellumConfig) -> Decoder:
    rope = rotary_embeddings(config, whole_heads)

    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(
            config,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            window=window_of(config, layer_idx),
            part=rope.parts[config.layer_types[layer_idx]],
            **norm_of_each_head(config),
        )

    route = partial(
        softmax_topk,
        k=experts_per_token(config, config.num_experts),
        renormalize=config.norm_topk_prob,
    )
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
    Skip("mtp.{*}", "multi-token prediction"),
)
