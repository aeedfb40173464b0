"""Hunyuan-A13B (Tencent, 2025): queries and keys are normalised after their rotation."""

from functools import partial

from transformers import HunYuanMoEV1Config

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.moe import FusedMoE
from moezoo.layers.moe.routing import softmax_topk
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import RotaryEmbedding, rope_of_whole_heads
from moezoo.loaders.mapping import Rule
from moezoo.models.common.attention import (
    NormAfterRotation,
    attention_biases,
    grouped_queries,
    head_width,
    with_rope,
)
from moezoo.models.common.feed_forward import mlp, moe_layer
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import ATTENTION, DECODER, EXPERTS, gated_mlp

ASSUMES = ASSUMED_EVERYWHERE | {
    "use_qk_norm": (True,),
    "use_cla": (False,),
    "use_mla": (False, None),
    "mlp_bias": (False,),
    "moe_layer_num_skipped": (0,),
}


def rotary_embedding(config: HunYuanMoEV1Config) -> RotaryEmbedding:
    """Return the rotation. "dynamic" scaling with an `alpha` is a larger theta at any length."""
    alpha = config.rope_parameters.get("alpha")
    if config.rope_parameters.get("rope_type") == "dynamic" and alpha:
        width = head_width(config)
        theta = config.rope_parameters["rope_theta"] * alpha ** (width / (width - 2))
        config = with_rope(config, {"rope_type": "default", "rope_theta": theta})
    return rope_of_whole_heads(config)


def for_each_layer(config: HunYuanMoEV1Config, field: str, default: int) -> list[int]:
    """Return each layer's value of a field that is one number or a list, `default` without any.

    Raises `UnsupportedArchitectureError` for a list that is too short or has other than integers.
    """
    value = getattr(config, field, None)
    value = default if value is None else value
    numbers = value if isinstance(value, list) else [value] * config.num_hidden_layers
    if len(numbers) < config.num_hidden_layers or not all(isinstance(n, int) for n in numbers):
        raise UnsupportedArchitectureError.of_field(config, field, "a number, or one a layer")
    return numbers


def build(config: HunYuanMoEV1Config) -> Decoder:
    num_experts = config.num_experts
    chosen = for_each_layer(config, "moe_topk", 1)
    if not all(1 <= k <= num_experts for k in chosen):
        raise UnsupportedArchitectureError.of_field(config, "moe_topk", f"1 to {num_experts}")
    for field, only in (
        ("moe_intermediate_size", config.intermediate_size),
        ("num_shared_expert", 1),
    ):
        if set(for_each_layer(config, field, only)) != {only}:
            raise UnsupportedArchitectureError.of_field(config, field, f"{only} in every layer")

    def attention(layer_idx: int) -> GroupedQueryAttention:
        width = head_width(config)
        return grouped_queries(
            config,
            layer=NormAfterRotation,
            query_norm=RMSNorm(width, config.rms_norm_eps),
            key_norm=RMSNorm(width, config.rms_norm_eps),
            **attention_biases(config),
        )

    def feed_forward(layer_idx: int) -> FusedMoE:
        width = config.intermediate_size
        route = partial(softmax_topk, k=chosen[layer_idx], renormalize=True)
        return moe_layer(config, width, route, shared=mlp(config, width))

    return pre_norm_decoder(config, attention, feed_forward, rope=rotary_embedding(config))


CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    Rule("layers.{L}.attn.query_norm.weight", "model.layers.{L}.self_attn.query_layernorm.weight"),
    Rule("layers.{L}.attn.key_norm.weight", "model.layers.{L}.self_attn.key_layernorm.weight"),
    Rule("layers.{L}.mlp.gate", "model.layers.{L}.mlp.gate.wg.weight"),
    *EXPERTS,
    *gated_mlp("layers.{L}.mlp.shared", "model.layers.{L}.mlp.shared_mlp"),
)
