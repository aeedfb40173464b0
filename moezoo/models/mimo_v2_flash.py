"""MiMo-V2-Flash (Xiaomi, 2025): sliding layers have sinks, and a rotation of their own."""

from typing import Any

import torch
from torch import nn
from transformers import MiMoV2FlashConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.context import Context
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.norm import NormOfSum
from moezoo.layers.rope import RotaryEmbedding
from moezoo.loaders.mapping import Rule
from moezoo.models.attentions import rotary_embeddings, window_of
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.mixtures import dense_or_mixture, listed_layers, sigmoid_route
from moezoo.models.names import ATTENTION, BIASED_MIXTURES, DECODER, TOKEN_PREDICTION

ASSUMES = ASSUMED_EVERYWHERE | {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "n_shared_experts": (None, 0),
    "add_swa_attention_sink_bias": (True,),
    "add_full_attention_sink_bias": (False,),
}

ROTARY = {"rope_theta": 5_000_000.0, "swa_rope_theta": 10_000.0, "partial_rotary_factor": 0.334}
"""What the released config says, and transformers takes for granted."""


class ScaledAttention(GroupedQueryAttention):
    """Values, and so what comes of them, are multiplied by `value_scale`."""

    def __init__(self, *sizes: int, value_scale: float, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.value_scale = value_scale

    def forward(
        self, x: torch.Tensor | NormOfSum, context: Context, layer_idx: int
    ) -> torch.Tensor:
        return super().forward(x, context, layer_idx) * self.value_scale


def check_released_fields(config: MiMoV2FlashConfig) -> None:
    """Raise `UnsupportedArchitectureError` where the hub's config has a field that transformers
    does not read, and it says other than transformers does."""
    slides = [int(kind == "sliding_attention") for kind in config.layer_types]
    assumed = {
        "layernorm_epsilon": config.rms_norm_eps,
        "hybrid_layer_pattern": slides,
        "swa_num_attention_heads": config.num_attention_heads,
        "swa_num_key_value_heads": 2 * config.num_key_value_heads,
        "swa_head_dim": config.head_dim,
        "swa_v_head_dim": config.v_head_dim,
        **ROTARY,
    }
    for field, value in assumed.items():
        if getattr(config, field, None) not in (None, value):
            raise UnsupportedArchitectureError.of_field(config, field, str(value))
    sparse = [int(kind == "sparse") for kind in config.mlp_layer_types]
    if getattr(config, "moe_layer_freq", 1) not in (1, sparse):
        raise UnsupportedArchitectureError.of_field(config, "moe_layer_freq", str(sparse))


def rotary_embedding(config: MiMoV2FlashConfig) -> RotaryEmbedding:
    if config.rope_parameters.get("rope_type") == "default":
        config.rope_parameters.setdefault("partial_rotary_factor", ROTARY["partial_rotary_factor"])
    return RotaryEmbedding(config)


def build(config: MiMoV2FlashConfig) -> Decoder:
    check_released_fields(config)
    if getattr(config, "sliding_window_size", None) is not None:
        # The query's own token is not counted in it, which not every transformers knows.
        config.sliding_window = config.sliding_window_size + 1
    if config.num_attention_heads % (2 * config.num_key_value_heads):
        raise UnsupportedArchitectureError.of_field(
            config, "num_key_value_heads", f"a divisor of half of {config.num_attention_heads}"
        )
    rope = rotary_embeddings(config, rotary_embedding)

    def attention(layer_idx: int) -> GroupedQueryAttention:
        window = window_of(config, layer_idx)
        return ScaledAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads * (1 if window is None else 2),
            head_dim=config.head_dim,
            value_dim=config.v_head_dim,
            qkv_bias=config.attention_bias,
            window=window,
            part=rope.parts[config.layer_types[layer_idx]],
            sinks=None if window is None else nn.Parameter(torch.empty(config.num_attention_heads)),
            value_scale=1.0
            if config.attention_value_scale is None
            else config.attention_value_scale,
        )

    feed_forward = dense_or_mixture(
        config, sigmoid_route(config), dense=listed_layers(config), num_shared=None
    )
    return pre_norm_decoder(config, attention, feed_forward, rope=rope)


CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    Rule("layers.{L}.attn.sinks", "model.layers.{L}.self_attn.attention_sink_bias"),
    Rule("layers.{L}.attn.sinks", "model.layers.{L}.self_attn.sinks"),
    *BIASED_MIXTURES,
    *TOKEN_PREDICTION,
)
