"""Granite 3 MoE (IBM, 2024), also with a shared expert: multipliers in four places."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GraniteMoeConfig, GraniteMoeSharedConfig, PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.context import Context
from moezoo.layers.decoder import Decoder, DecoderLayer, ScaledDecoder, pre_norm_decoder
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.moe import FusedMoE
from moezoo.layers.norm import input_for
from moezoo.loaders.mapping import Rule
from moezoo.models.attentions import attention_biases, grouped_queries
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.mixtures import mixture, mlp, softmax_route
from moezoo.models.names import ATTENTION, DECODER, each_expert

ASSUMES = ASSUMED_EVERYWHERE

MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


class ScaledLayer(DecoderLayer):
    """x + factor * attn(norm(x)), then x + factor * mlp(norm(x))."""

    def __init__(self, *args: Any, factor: float, **modules: Any) -> None:
        super().__init__(*args, **modules)
        self.factor = factor

    def forward(
        self, x: torch.Tensor, update: torch.Tensor | None, context: Context, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self.attn_norm.of_sum(x, update)
        update = self.factor * self.attn(input_for(self.attn, normed), context, layer_idx)
        normed = self.mlp_norm.of_sum(normed.sum, update)
        update = self.factor * self.mlp(input_for(self.mlp, normed))
        return normed.sum, update


def granite_decoder(
    config: PreTrainedConfig, attention: Callable[[int], SequenceMixer], shared_size: int | None
) -> Decoder:
    """Of `attention(layer_idx)` and mixtures, with a shared expert unless `shared_size` is None."""
    for field in MULTIPLIERS:
        if not isinstance(getattr(config, field), int | float):
            raise UnsupportedArchitectureError.of_field(config, field, "a number")
    if not config.logits_scaling:
        raise UnsupportedArchitectureError.of_field(config, "logits_scaling", "other than 0")

    def feed_forward(layer_idx: int) -> FusedMoE:
        route = softmax_route(config, renormalize=True)
        shared = None if shared_size is None else mlp(config, shared_size)
        return mixture(config, config.intermediate_size, route, shared=shared)

    return pre_norm_decoder(
        config,
        attention,
        feed_forward,
        layer=partial(ScaledLayer, factor=config.residual_multiplier),
        decoder=partial(
            ScaledDecoder,
            embedding_scale=config.embedding_multiplier,
            logit_scale=1 / config.logits_scaling,
        ),
    )


def granite_attention(config: PreTrainedConfig, **options: Any) -> GroupedQueryAttention:
    return grouped_queries(
        config,
        **attention_biases(config),
        scale=config.attention_multiplier,
        **options,
    )


def build(config: GraniteMoeConfig | GraniteMoeSharedConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        return granite_attention(config)

    shared_size = None
    if isinstance(config, GraniteMoeSharedConfig):
        shared_size = config.shared_intermediate_size or None
    return granite_decoder(config, attention, shared_size)


MOE = "model.layers.{L}.block_sparse_moe"

CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    Rule("layers.{L}.mlp.gate", f"{MOE}.router.layer.weight"),
    Rule("layers.{L}.mlp.gate", f"{MOE}.router.weight"),
    Rule("layers.{L}.mlp.w13", f"{MOE}.input_linear.weight", shard="expert"),
    Rule("layers.{L}.mlp.w13", f"{MOE}.experts.gate_up_proj", shard="expert"),
    Rule("layers.{L}.mlp.w2", f"{MOE}.output_linear.weight", shard="expert"),
    Rule("layers.{L}.mlp.w2", f"{MOE}.experts.down_proj", shard="expert"),
    # For formats that have matrices only.
    *each_expert(f"{MOE}.experts"),
    Rule("layers.{L}.mlp.shared.gate_up.weight", "model.layers.{L}.shared_mlp.input_linear.weight"),
    Rule("layers.{L}.mlp.shared.down.weight", "model.layers.{L}.shared_mlp.output_linear.weight"),
)
