"""Qwen2-MoE and Qwen1.5-MoE (Alibaba, 2024): a shared expert with a sigmoid gate of its own."""

from functools import partial

from torch import nn
from transformers import PreTrainedConfig, Qwen2MoeConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.mlp import SigmoidGatedMLP
from moezoo.layers.moe import FusedMoE
from moezoo.loaders.mapping import Rule
from moezoo.models.common.attention import grouped_queries, window_of
from moezoo.models.common.feed_forward import dense_by_step, mlp, moe_layer, softmax_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE, AtLeast
from moezoo.models.common.names import ATTENTION, DECODER, DENSE_MLP, EXPERTS, gated_mlp

SHARED_SIZES = {"shared_expert_intermediate_size": AtLeast(0)}

ASSUMES = ASSUMED_EVERYWHERE | SHARED_SIZES


def moe_with_shared_expert(config: PreTrainedConfig, *, renormalize: bool) -> FusedMoE:
    """Return an MoE layer that has one shared expert behind a sigmoid gate."""
    shared = SigmoidGatedMLP(
        config.hidden_size,
        config.shared_expert_intermediate_size,
        activation=config.hidden_act,
    )
    route = softmax_route(config, renormalize=renormalize)
    return moe_layer(config, config.moe_intermediate_size, route, shared=shared)


def feed_forward(config: PreTrainedConfig, layer_idx: int) -> nn.Module:
    if layer_idx in dense_by_step(config):
        return mlp(config, config.intermediate_size)
    return moe_with_shared_expert(config, renormalize=config.norm_topk_prob)


def build(config: Qwen2MoeConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        window = window_of(config, layer_idx)
        return grouped_queries(config, qkv_bias=config.qkv_bias, window=window)

    return pre_norm_decoder(config, attention, partial(feed_forward, config))


SHARED_EXPERT = (
    *gated_mlp("layers.{L}.mlp.shared", "model.layers.{L}.mlp.shared_expert"),
    Rule("layers.{L}.mlp.shared.gate.weight", "model.layers.{L}.mlp.shared_expert_gate.weight"),
)

CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    *DENSE_MLP,
    *EXPERTS,
    *SHARED_EXPERT,
)
