"""Grouped-query attention of the sizes that a config names."""

import copy
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import RotaryEmbedding, RotaryEmbeddings


def head_width(config: PreTrainedConfig) -> int:
    width: int | None = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


def grouped_queries(config: PreTrainedConfig, **options: Any) -> GroupedQueryAttention:
    """`options` are the layer's own."""
    return GroupedQueryAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim=head_width(config),
        **options,
    )


def attention_biases(config: PreTrainedConfig) -> dict[str, bool]:
    """Options for attention layers: all projections have biases, or none."""
    return dict.fromkeys(("qkv_bias", "out_bias"), config.attention_bias)


def norm_of_each_head(config: PreTrainedConfig) -> dict[str, RMSNorm]:
    """Options for `grouped_queries`: queries and keys are normalised head by head."""
    width = head_width(config)
    return {name: RMSNorm(width, config.rms_norm_eps) for name in ("q_norm", "k_norm")}


def norm_of_all_heads(config: PreTrainedConfig) -> dict[str, RMSNorm]:
    """Options for `grouped_queries`: all queries, and all keys, are normalised as one vector."""
    width = head_width(config)
    heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}
    return {name: RMSNorm(count * width, config.rms_norm_eps) for name, count in heads.items()}


def window_of(config: PreTrainedConfig, layer_idx: int) -> int | None:
    """The layer's sliding window, None where `config.layer_types` says that it has none."""
    slides = config.layer_types[layer_idx] == "sliding_attention"
    return config.sliding_window if slides else None


def rotary_embeddings(
    config: PreTrainedConfig, embedding: Callable[[PreTrainedConfig], RotaryEmbedding]
) -> RotaryEmbeddings:
    """The `embedding` of each kind of layer, where `config.rope_parameters` has one for each."""
    found = {}
    for kind in sorted(set(config.layer_types)):
        if not isinstance(config.rope_parameters.get(kind), dict):
            raise UnsupportedArchitectureError.of_field(config, "rope_parameters", f"one of {kind}")
        own = copy.copy(config)
        own.rope_parameters = dict(config.rope_parameters[kind])
        found[kind] = embedding(own)
    return RotaryEmbeddings(found)
