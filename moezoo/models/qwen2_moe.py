"""Qwen2-MoE and Qwen1.5-MoE (Alibaba, 2024): a shared expert with a sigmoid gate of its own."""

from collections.abc import Callable
from functools import partial

from torch import nn
from transformers import Qwen2MoeConfig, Qwen3MoeConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.mlp import SigmoidGatedMLP
from moezoo.loaders.mapping import Rule
from moezoo.models.attentions import grouped_queries, window_of
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.mixtures import mixture, mlp, softmax_route
from moezoo.models.names import ATTENTION, DECODER, DENSE_MLP, EXPERTS, gated_mlp

ASSUMES = ASSUMED_EVERYWHERE


def feed_forward(
    config: Qwen2MoeConfig | Qwen3MoeConfig,
    shared_expert: Callable[[], nn.Module | None],
    layer_idx: int,
) -> nn.Module:
    """Every `decoder_sparse_step`-th layer is a mixture, but for `mlp_only_layers`."""
    if config.decoder_sparse_step < 1:
        raise UnsupportedArchitectureError.of_field(config, "decoder_sparse_step", "1 or more")
    sparse = config.num_experts > 0 and (layer_idx + 1) % config.decoder_sparse_step == 0
    if layer_idx in config.mlp_only_layers or not sparse:
        return mlp(config, config.intermediate_size)
    route = softmax_route(config, renormalize=config.norm_topk_prob)
    return mixture(config, config.moe_intermediate_size, route, shared=shared_expert())


def shared_expert(config: Qwen2MoeConfig) -> SigmoidGatedMLP:
    width = config.shared_expert_intermediate_size
    return SigmoidGatedMLP(config.hidden_size, width, activation=config.hidden_act)


def build(config: Qwen2MoeConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        window = window_of(config, layer_idx)
        return grouped_queries(config, qkv_bias=config.qkv_bias, window=window)

    return pre_norm_decoder(
        config, attention, partial(feed_forward, config, partial(shared_expert, config))
    )


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
