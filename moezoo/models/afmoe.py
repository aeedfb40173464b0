"""Trinity (Arcee AI, 2025): attention behind a gate, norms before and after each part."""

import math
from functools import partial
from typing import Any

import torch
from transformers import AfmoeConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.context import Context
from moezoo.layers.decoder import Decoder, DecoderLayer, ScaledDecoder, pre_norm_decoder
from moezoo.layers.linear import Linear
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.norm import NormOfSum, RMSNorm, input_for
from moezoo.layers.rope import rotate_half, unrotated
from moezoo.loaders.mapping import Rule
from moezoo.models.attentions import attention_biases, grouped_queries, norm_of_each_head, window_of
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.mixtures import dense_or_mixture, ungrouped_sigmoid_route
from moezoo.models.names import (
    AROUND_LAYERS,
    ATTENTION,
    CORRECTION_BIAS,
    DENSE_MLP,
    EXPERTS,
    QK_NORM,
    SHARED_EXPERTS,
)

ASSUMES = ASSUMED_EVERYWHERE | {
    # Of the releases, not read by transformers.
    "score_func": ("sigmoid",),
    "route_norm": (True,),
    "n_group": (1, None),
    "topk_group": (1, None),
    "num_expert_groups": (1, None),
    "num_limited_groups": (1, None),
}


class GatedAttention(GroupedQueryAttention):
    """o(attention * sigmoid(gate(x)))."""

    def __init__(self, hidden_size: int, *num_heads: int, **options: Any) -> None:
        super().__init__(hidden_size, *num_heads, **options)
        self.gate = Linear(hidden_size, self.sizes[0], bias=False)

    def forward(
        self, x: torch.Tensor | NormOfSum, context: Context, layer_idx: int
    ) -> torch.Tensor:
        qkv = self.qkv(input_for(self.qkv, x))
        gate = self.gate(input_for(self.gate, x)).sigmoid()
        return self.o(self.attended(qkv, context, layer_idx).flatten(2) * gate)


class SandwichLayer(DecoderLayer):
    """x + norm(attn(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, norm: RMSNorm, attn: SequenceMixer, **modules: Any) -> None:
        super().__init__(norm, attn, **modules)
        self.after_attn = RMSNorm(norm.dim, norm.eps)
        self.after_mlp = RMSNorm(norm.dim, norm.eps)

    def forward(
        self, x: torch.Tensor, update: torch.Tensor | None, context: Context, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self.attn_norm.of_sum(x, update)
        update = self.after_attn(self.attn(input_for(self.attn, normed), context, layer_idx))
        normed = self.mlp_norm.of_sum(normed.sum, update)
        return normed.sum, self.after_mlp(self.mlp(input_for(self.mlp, normed)))


def build(config: AfmoeConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        window = window_of(config, layer_idx)
        return grouped_queries(
            config,
            layer=GatedAttention,
            **attention_biases(config),
            window=window,
            rotate=unrotated if window is None else rotate_half,
            **norm_of_each_head(config),
        )

    feed_forward = dense_or_mixture(
        config,
        ungrouped_sigmoid_route(config, config.route_scale),
        dense=range(config.num_dense_layers),
        num_shared=config.num_shared_experts,
    )
    scale = math.sqrt(config.hidden_size) if config.mup_enabled else 1.0
    return pre_norm_decoder(
        config,
        attention,
        feed_forward,
        layer=SandwichLayer,
        decoder=partial(ScaledDecoder, embedding_scale=scale),
    )


LAYER = "model.layers.{L}"

CHECKPOINT = (
    *AROUND_LAYERS,
    Rule("layers.{L}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"),
    Rule("layers.{L}.after_attn.weight", f"{LAYER}.post_attention_layernorm.weight"),
    Rule("layers.{L}.mlp_norm.weight", f"{LAYER}.pre_mlp_layernorm.weight"),
    Rule("layers.{L}.after_mlp.weight", f"{LAYER}.post_mlp_layernorm.weight"),
    *ATTENTION,
    Rule("layers.{L}.attn.gate.weight", f"{LAYER}.self_attn.gate_proj.weight"),
    *QK_NORM,
    *DENSE_MLP,
    Rule("layers.{L}.mlp.gate", f"{LAYER}.mlp.router.gate.weight"),
    *EXPERTS,
    Rule(CORRECTION_BIAS.target, f"{LAYER}.mlp.expert_bias"),
    *SHARED_EXPERTS,
)
