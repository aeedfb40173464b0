"""DeepSeek-V2 (DeepSeek-AI, 2024): latent attention, shared experts, groups chosen by maximum."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.linear import Linear
from moezoo.layers.mla import LowRankLinear, MultiHeadLatentAttention, yarn_softmax_factor
from moezoo.layers.mlp import GatedMLP
from moezoo.layers.moe import FusedMoE
from moezoo.layers.moe.layer import Route
from moezoo.layers.moe.routing import grouped_topk
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import Rotation, rotate_interleaved
from moezoo.models.fields import ASSUMED_EVERYWHERE, experts_per_token
from moezoo.models.names import DECODER, DENSE_MLP, EXPERTS, MLA, gated_mlp

ASSUMES = ASSUMED_EVERYWHERE | {
    "topk_method": ("greedy", "group_limited_greedy"),
    "scoring_func": ("softmax",),
    "moe_layer_freq": (1, None),
}

LATENT_NORM_EPS = 1e-6


def check_routing(config: DeepseekV2Config | DeepseekV3Config, *, grouped: bool) -> None:
    """Raise `UnsupportedArchitectureError` for numbers of experts and groups that do not fit."""
    experts = config.n_routed_experts
    if grouped:
        groups, kept = config.n_group, config.topk_group
        if not groups or experts % groups:
            raise UnsupportedArchitectureError.of_field(
                config, "n_group", f"a divisor of {experts}"
            )
        if not kept or kept > groups:
            raise UnsupportedArchitectureError.of_field(config, "topk_group", f"1 to {groups}")
        experts = kept * experts // groups
    experts_per_token(config, experts)


def latent_attention(
    config: DeepseekV2Config | DeepseekV3Config,
    rotate: Callable[[torch.Tensor, Rotation], torch.Tensor],
) -> MultiHeadLatentAttention:
    if config.num_key_value_heads != config.num_attention_heads:
        raise UnsupportedArchitectureError.of_field(
            config, "num_key_value_heads", f"num_attention_heads, {config.num_attention_heads}"
        )
    if config.head_dim != config.qk_rope_head_dim:
        raise UnsupportedArchitectureError.of_field(
            config, "head_dim", f"qk_rope_head_dim, {config.qk_rope_head_dim}"
        )
    try:
        scale = yarn_softmax_factor(config.rope_parameters)
    except TypeError as error:
        raise UnsupportedArchitectureError.of_field(
            config, "rope_parameters", f"numbers ({error})"
        ) from error
    head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    width = config.num_attention_heads * head_dim
    q: nn.Module
    if config.q_lora_rank is None:
        q = Linear(config.hidden_size, width, bias=False)
    else:
        q = LowRankLinear(
            config.hidden_size,
            config.q_lora_rank,
            width,
            norm=RMSNorm(config.q_lora_rank, LATENT_NORM_EPS),
            bias=config.attention_bias,
        )
    return MultiHeadLatentAttention(
        config.hidden_size,
        config.num_attention_heads,
        q,
        kv_norm=RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS),
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        v_dim=config.v_head_dim,
        rotate=rotate,
        scale=head_dim**-0.5 * scale,
        bias=config.attention_bias,
    )


def feed_forward(
    config: DeepseekV2Config | DeepseekV3Config,
    mlp: Callable[[int], nn.Module],
    route: Callable[[], Route],
    layer_idx: int,
) -> nn.Module:
    """Dense layers first, which are an `mlp` of some width, then mixtures with shared experts."""
    if layer_idx < config.first_k_dense_replace:
        return mlp(config.intermediate_size)
    return FusedMoE(
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
        route(),
        activation=config.hidden_act,
        shared=mlp(config.moe_intermediate_size * config.n_shared_experts),
    )


def build(config: DeepseekV2Config) -> Decoder:
    grouped = config.topk_method == "group_limited_greedy"
    check_routing(config, grouped=grouped)
    route = partial(
        grouped_topk,
        k=config.num_experts_per_tok,
        num_groups=config.n_group if grouped else 1,
        topk_groups=config.topk_group if grouped else 1,
        scoring="softmax",
        renormalize=False,
        scaling=config.routed_scaling_factor,
    )

    def attention(layer_idx: int) -> MultiHeadLatentAttention:
        return latent_attention(config, rotate_interleaved)

    mlp = partial(GatedMLP, config.hidden_size, activation=config.hidden_act, bias=config.mlp_bias)
    return pre_norm_decoder(config, attention, partial(feed_forward, config, mlp, lambda: route))


CHECKPOINT = (
    *DECODER,
    *MLA,
    *DENSE_MLP,
    *EXPERTS,
    *gated_mlp("layers.{L}.mlp.shared", "model.layers.{L}.mlp.shared_experts"),
)
