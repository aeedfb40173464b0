"""Multi-head latent attention of the sizes that a config names."""

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.linear import Linear
from moezoo.layers.mla import LowRankLinear, MultiHeadLatentAttention, yarn_softmax_factor
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import Rotate
from moezoo.models.common.fields import AtLeast

LATENT_SIZES = {
    "q_lora_rank": AtLeast(1, or_none=True),
    **dict.fromkeys(
        ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), AtLeast(1)
    ),
}
"""The size fields of latent attention, for a page's `ASSUMES`."""

LATENT_NORM_EPS = 1e-6


def latent_attention(
    config: PreTrainedConfig,
    rotate: Rotate,
    *,
    layer: Callable[..., MultiHeadLatentAttention] = MultiHeadLatentAttention,
) -> MultiHeadLatentAttention:
    """Return a `layer` of the config's sizes, its softmax scaled by YaRN's factor.

    Raises `UnsupportedArchitectureError` where `head_dim` is not the rotated width, or a field of
    `rope_parameters` is not a number.
    """
    if config.head_dim != config.qk_rope_head_dim:
        raise UnsupportedArchitectureError.of_field(
            config, "head_dim", f"qk_rope_head_dim, {config.qk_rope_head_dim}"
        )
    try:
        factor = yarn_softmax_factor(config.rope_parameters)
    except TypeError as error:
        raise UnsupportedArchitectureError.of_field(
            config, "rope_parameters", f"numbers ({error})"
        ) from error
    attention = unscaled_latent_attention(config, rotate, layer=layer)
    attention.scale *= factor
    return attention


def unscaled_latent_attention(
    config: PreTrainedConfig,
    rotate: Rotate,
    *,
    layer: Callable[..., MultiHeadLatentAttention] = MultiHeadLatentAttention,
) -> MultiHeadLatentAttention:
    """Return a `layer` of the config's sizes, for configs without `rope_parameters`."""
    if config.num_key_value_heads != config.num_attention_heads:
        raise UnsupportedArchitectureError.of_field(
            config, "num_key_value_heads", f"num_attention_heads, {config.num_attention_heads}"
        )
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
    return layer(
        config.hidden_size,
        config.num_attention_heads,
        q,
        kv_norm=RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS),
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        v_dim=config.v_head_dim,
        rotate=rotate,
        scale=head_dim**-0.5,
        bias=config.attention_bias,
    )
