"""The text model of Llama 4 (Meta, 2025): chunked attention, experts with a scaled input."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Llama4TextConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.context import Context
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.kernels.windows import Chunked
from moezoo.layers.moe import FusedMoE
from moezoo.layers.moe.routing import topk_sigmoid
from moezoo.layers.rope import rotate_interleaved, unrotated
from moezoo.loaders.mapping import Rule, Skip
from moezoo.models.common.attention import (
    NormAfterRotation,
    attention_biases,
    grouped_queries,
    head_width,
)
from moezoo.models.common.feed_forward import mlp, moe_layer
from moezoo.models.common.fields import ASSUMED_EVERYWHERE, experts_per_token
from moezoo.models.common.names import ATTENTION, DECODER, each_expert, gated_mlp

ASSUMES = ASSUMED_EVERYWHERE


class TemperedAttention(GroupedQueryAttention):
    """Attention whose queries are scaled up with the logarithm of their position.

    The factor rises in steps of `floor` tokens. As in transformers, padding before a sequence is
    counted.
    """

    counts_padding = True

    def __init__(self, *sizes: int, floor: int, strength: float, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.floor = floor
        self.strength = strength

    def attended(self, qkv: Tensor, context: Context, layer_idx: int) -> Tensor:
        q, kv = qkv.split_with_sizes((self.sizes[0], sum(self.sizes[1:])), -1)
        steps = ((context.positions.float() + 1) / self.floor).floor()
        temper = steps.log1p() * self.strength + 1
        qkv = torch.cat(((q * temper[..., None]).to(q.dtype), kv), -1)
        return super().attended(qkv, context, layer_idx)


class ScaledInputMoE(FusedMoE):
    """An MoE layer whose routing weights multiply the experts' inputs, not their outputs."""

    def experts(self, x: Tensor, topk_weights: Tensor, rows: Tensor) -> Tensor:
        num_tokens, k = rows.shape
        scaled = (x[:, None] * topk_weights[..., None]).to(x.dtype).flatten(0, 1)
        ones = torch.ones_like(topk_weights).view(-1, 1)
        y = super().experts(scaled, ones, rows.reshape(-1, 1))
        if k == 1:
            return y
        return y.unflatten(0, (num_tokens, k)).sum(1, dtype=torch.float32).to(x.dtype)


def build(config: Llama4TextConfig) -> Decoder:
    chunk = config.attention_chunk_size
    if "chunked_attention" in config.layer_types and (chunk or 0) < 1:
        raise UnsupportedArchitectureError.of_field(config, "attention_chunk_size", "1 or more")
    if len(config.no_rope_layers) < config.num_hidden_layers:
        raise UnsupportedArchitectureError.of_field(config, "no_rope_layers", "one for each layer")
    if config.attn_temperature_tuning and config.floor_scale < 1:
        raise UnsupportedArchitectureError.of_field(config, "floor_scale", "1 or more")

    def attention(layer_idx: int) -> GroupedQueryAttention:
        rotates = bool(config.no_rope_layers[layer_idx])
        layer: Any = GroupedQueryAttention
        if rotates and config.use_qk_norm:
            norm = partial(
                F.rms_norm, normalized_shape=(head_width(config),), eps=config.rms_norm_eps
            )
            layer = partial(NormAfterRotation, query_norm=norm, key_norm=norm)
        elif not rotates and config.attn_temperature_tuning:
            layer = partial(TemperedAttention, floor=config.floor_scale, strength=config.attn_scale)
        return grouped_queries(
            config,
            layer=layer,
            **attention_biases(config),
            window=Chunked(chunk) if config.layer_types[layer_idx] == "chunked_attention" else None,
            rotate=rotate_interleaved if rotates else unrotated,
        )

    k = experts_per_token(config, config.num_local_experts)
    route = partial(topk_sigmoid, k=k, renormalize=False)

    def feed_forward(layer_idx: int) -> nn.Module:
        if layer_idx not in config.moe_layers:
            return mlp(config, config.intermediate_size_mlp)
        width = config.intermediate_size
        return moe_layer(config, width, route, layer=ScaledInputMoE, shared=mlp(config, width))

    return pre_norm_decoder(config, attention, feed_forward)


MLP = "model.layers.{L}.feed_forward"
EXPERTS = f"{MLP}.experts"

CHECKPOINT: tuple[Rule | Skip, ...] = (
    *DECODER,
    *ATTENTION,
    *gated_mlp("layers.{L}.mlp", MLP),
    Rule("layers.{L}.mlp.gate", f"{MLP}.router.weight"),
    Rule("layers.{L}.mlp.w13", f"{EXPERTS}.gate_up_proj", shard="expert", view="transpose"),
    Rule("layers.{L}.mlp.w2", f"{EXPERTS}.down_proj", shard="expert", view="transpose"),
    # Names in quantised checkpoints whose experts were turned into linear layers first.
    *each_expert(EXPERTS),
    *gated_mlp("layers.{L}.mlp.shared", f"{MLP}.shared_expert"),
)
