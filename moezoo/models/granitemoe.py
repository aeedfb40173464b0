"""Granite 3 MoE (IBM, 2024), also with a shared expert: multipliers in four places."""

from collections.abc import Callable
from functools import partial
from operator import mul
from typing import Any

from transformers import GraniteMoeConfig, GraniteMoeSharedConfig, PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, DecoderLayer, ScaledDecoder, pre_norm_decoder
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.moe import FusedMoE
from moezoo.loaders.mapping import Rule
from moezoo.models.common.attention import attention_biases, grouped_queries
from moezoo.models.common.feed_forward import mlp, moe_layer, softmax_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE, AtLeast
from moezoo.models.common.names import ATTENTION, DECODER, each_expert

ASSUMES = ASSUMED_EVERYWHERE | {"shared_intermediate_size": AtLeast(0)}

MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


def granite_decoder(
    config: PreTrainedConfig, attention: Callable[[int], SequenceMixer], shared_size: int | None
) -> Decoder:
    """Return a decoder of `attention(layer_idx)` and MoE layers.

    Each has a shared expert of an intermediate size of `shared_size`, or none if that is None.
    Raises `UnsupportedArchitectureError` for multipliers that are not numbers.
    """
    for field in MULTIPLIERS:
        if not isinstance(getattr(config, field), int | float):
            raise UnsupportedArchitectureError.of_field(config, field, "a number")
    if not config.logits_scaling:
        raise UnsupportedArchitectureError.of_field(config, "logits_scaling", "other than 0")

    def feed_forward(layer_idx: int) -> FusedMoE:
        route = softmax_route(config, renormalize=True)
        shared = None if shared_size is None else mlp(config, shared_size)
        return moe_layer(config, config.intermediate_size, route, shared=shared)

    scale = partial(mul, config.residual_multiplier)
    return pre_norm_decoder(
        config,
        attention,
        feed_forward,
        layer=partial(DecoderLayer, after_attn=scale, after_mlp=scale),
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
    # Names in quantised checkpoints, which have a matrix for each expert.
    *each_expert(f"{MOE}.experts"),
    Rule("layers.{L}.mlp.shared.gate_up.weight", "model.layers.{L}.shared_mlp.input_linear.weight"),
    Rule("layers.{L}.mlp.shared.down.weight", "model.layers.{L}.shared_mlp.output_linear.weight"),
)
