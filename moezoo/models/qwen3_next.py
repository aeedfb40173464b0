"""Qwen3-Next (Alibaba, 2025): gated delta nets, gated attention in every fourth layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedConfig, Qwen3NextConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.gated_attention import GatedAttention
from moezoo.layers.gated_delta_net import GatedDeltaNet, by_key_head
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.norm import RMSNorm, ZeroCenteredRMSNorm
from moezoo.layers.rope import RotaryEmbedding
from moezoo.loaders.mapping import Rule
from moezoo.models.common.attention import attention_biases, grouped_queries
from moezoo.models.common.fields import ASSUMED_EVERYWHERE, AtLeast
from moezoo.models.common.names import (
    ATTENTION,
    DECODER,
    DENSE_MLP,
    EXPERTS,
    QK_NORM,
    TOKEN_PREDICTION,
)
from moezoo.models.qwen2_moe import SHARED_EXPERT, SHARED_SIZES, feed_forward

DELTA_SIZES = dict.fromkeys(
    (
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    ),
    AtLeast(1),
)
"""The size fields of gated delta nets."""

ASSUMES = ASSUMED_EVERYWHERE | SHARED_SIZES | DELTA_SIZES


def hybrid_attention(
    config: PreTrainedConfig, parts: Callable[..., Any], layer_idx: int
) -> SequenceMixer:
    """Return the attention or delta net that `config.layer_types` names for this layer.

    `parts` tells the order of rows in the delta net's projections.
    """
    if config.layer_types[layer_idx] == "full_attention":
        return grouped_queries(
            config,
            layer=GatedAttention,
            **attention_biases(config),
            q_norm=ZeroCenteredRMSNorm(config.head_dim, config.rms_norm_eps),
            k_norm=ZeroCenteredRMSNorm(config.head_dim, config.rms_norm_eps),
        )
    if config.linear_num_value_heads % config.linear_num_key_heads:
        raise UnsupportedArchitectureError.of_field(
            config,
            "linear_num_value_heads",
            f"a multiple of linear_num_key_heads, {config.linear_num_key_heads}",
        )
    return GatedDeltaNet(
        config.hidden_size,
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        k_dim=config.linear_key_head_dim,
        v_dim=config.linear_value_head_dim,
        conv_width=config.linear_conv_kernel_dim,
        activation=config.hidden_act,
        norm=RMSNorm(config.linear_value_head_dim, config.rms_norm_eps),
        parts=parts,
    )


def build(config: Qwen3NextConfig) -> Decoder:
    return pre_norm_decoder(
        config,
        partial(hybrid_attention, config, by_key_head),
        partial(feed_forward, config),
        rope=RotaryEmbedding(config),
        norm=ZeroCenteredRMSNorm,
    )


NET = "model.layers.{L}.linear_attn"

DELTA_NET = tuple(
    Rule(f"layers.{{L}}.attn.{ours}", f"{NET}.{theirs}")
    for ours, theirs in (
        ("conv.weight", "conv1d.weight"),
        ("A_log", "A_log"),
        ("dt_bias", "dt_bias"),
        ("norm.weight", "norm.weight"),
        ("out.weight", "out_proj.weight"),
    )
)
"""Names of a delta net's parameters except its input projections."""

CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    *QK_NORM,
    Rule("layers.{L}.attn.qkvz.weight", f"{NET}.in_proj_qkvz.weight"),
    Rule("layers.{L}.attn.ba.weight", f"{NET}.in_proj_ba.weight"),
    *DELTA_NET,
    *DENSE_MLP,
    *EXPERTS,
    *SHARED_EXPERT,
    *TOKEN_PREDICTION,
)
