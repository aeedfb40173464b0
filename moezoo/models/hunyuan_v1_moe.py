"""Hunyuan-A13B (Tencent, 2025): queries and keys are normalised after their rotation."""

from functools import partial
from typing import Any

import torch
from transformers import HunYuanMoEV1Config

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.moe import FusedMoE
from moezoo.layers.moe.routing import softmax_topk
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import RotaryEmbedding, Rotation, rope_of_whole_heads
from moezoo.loaders.mapping import Rule
from moezoo.models.attentions import attention_biases, grouped_queries, head_width, with_rope
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.mixtures import mixture, mlp
from moezoo.models.names import ATTENTION, DECODER, EXPERTS, gated_mlp

ASSUMES = ASSUMED_EVERYWHERE | {
    "use_qk_norm": (True,),
    "use_cla": (False,),
    "use_mla": (False, None),
    "mlp_bias": (False,),
    "moe_layer_num_skipped": (0,),
}


class NormAfterRotation(GroupedQueryAttention):
    def __init__(self, *sizes: int, head_dim: int, eps: float, **options: Any) -> None:
        super().__init__(*sizes, head_dim=head_dim, **options)
        self.query_norm = RMSNorm(head_dim, eps)
        self.key_norm = RMSNorm(head_dim, eps)

    def heads(
        self, qkv: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().heads(qkv, rotation)
        return self.query_norm(q), self.key_norm(k), v


def rotary_embedding(config: HunYuanMoEV1Config) -> RotaryEmbedding:
    """ "dynamic" with an `alpha` is no dynamic scaling, but a larger theta."""
    alpha = config.rope_parameters.get("alpha")
    if config.rope_parameters.get("rope_type") == "dynamic" and alpha:
        width = head_width(config)
        theta = config.rope_parameters["rope_theta"] * alpha ** (width / (width - 2))
        config = with_rope(config, {"rope_type": "default", "rope_theta": theta})
    return rope_of_whole_heads(config)


def for_each_layer(config: HunYuanMoEV1Config, field: str, default: int) -> list[int]:
    """A field that is one number for all layers, or a list of them."""
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
        layer = partial(NormAfterRotation, eps=config.rms_norm_eps)
        return grouped_queries(config, layer=layer, **attention_biases(config))

    def feed_forward(layer_idx: int) -> FusedMoE:
        width = config.intermediate_size
        route = partial(softmax_topk, k=chosen[layer_idx], renormalize=True)
        return mixture(config, width, route, shared=mlp(config, width))

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
