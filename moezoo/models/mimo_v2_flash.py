"""MiMo-V2-Flash (Xiaomi, 2025): sliding-window layers have sinks and a separate rotation."""

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
from moezoo.models.common.attention import rotary_embeddings, window_of
from moezoo.models.common.feed_forward import dense_by_list, dense_or_moe, sigmoid_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE, AtLeast
from moezoo.models.common.names import ATTENTION, DECODER, DEEPSEEK_MOE, TOKEN_PREDICTION

ASSUMES = ASSUMED_EVERYWHERE | {
    "v_head_dim": AtLeast(1),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "n_shared_experts": (None, 0),
    "add_swa_attention_sink_bias": (True,),
    "add_full_attention_sink_bias": (False,),
}

ROTARY = {"rope_theta": 5_000_000.0, "swa_rope_theta": 10_000.0, "partial_rotary_factor": 0.334}
"""Fields of the released config whose values are constants in transformers."""


class ScaledAttention(GroupedQueryAttention):
    """Attention whose values are multiplied by `value_scale`; it is applied to the output."""

    def __init__(self, *sizes: int, value_scale: float, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.value_scale = value_scale

    def forward(
        self, x: torch.Tensor | NormOfSum, context: Context, layer_idx: int
    ) -> torch.Tensor:
        return super().forward(x, context, layer_idx) * self.value_scale


def check_released_fields(config: MiMoV2FlashConfig) -> None:
    """Check the fields of the released config that transformers does not read.

    Raises `UnsupportedArchitectureError` where one contradicts what transformers computes.
    """
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
        # This field does not count the query's own token; not every transformers reads it.
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

    feed_forward = dense_or_moe(config, sigmoid_route, dense=dense_by_list(config), num_shared=None)
    return pre_norm_decoder(config, attention, feed_forward, rope=rope)


CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    Rule("layers.{L}.attn.sinks", "model.layers.{L}.self_attn.attention_sink_bias"),
    Rule("layers.{L}.attn.sinks", "model.layers.{L}.self_attn.sinks"),
    *DEEPSEEK_MOE,
    *TOKEN_PREDICTION,
)
