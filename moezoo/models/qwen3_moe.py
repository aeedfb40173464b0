"""Qwen3-MoE (Alibaba, 2025): queries and keys normalised head by head, no shared expert."""

from torch import nn
from transformers import Qwen3MoeConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.models.common.attention import attention_biases, grouped_queries, norm_of_each_head
from moezoo.models.common.feed_forward import dense_by_step, mlp, moe_layer, softmax_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import ATTENTION, DECODER, DENSE_MLP, EXPERTS, QK_NORM

ASSUMES = ASSUMED_EVERYWHERE


def build(config: Qwen3MoeConfig) -> Decoder:
    dense = dense_by_step(config)

    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(
            config,
            **attention_biases(config),
            window=config.sliding_window,
            **norm_of_each_head(config),
        )

    def feed_forward(layer_idx: int) -> nn.Module:
        if layer_idx in dense:
            return mlp(config, config.intermediate_size)
        route = softmax_route(config, renormalize=config.norm_topk_prob)
        return moe_layer(config, config.moe_intermediate_size, route)

    return pre_norm_decoder(config, attention, feed_forward)


CHECKPOINT = (*DECODER, *ATTENTION, *QK_NORM, *DENSE_MLP, *EXPERTS)
