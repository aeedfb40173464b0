"""Grouped-query attention of the sizes that a config names."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import RotaryEmbedding, RotaryEmbeddings


def head_width(config: PreTrainedConfig) -> int:
    width: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    if not width:
        raise UnsupportedArchitectureError.of_field(
            config, "num_attention_heads", f"{config.hidden_size} or fewer"
        )
    return width


def grouped_queries(
    config: PreTrainedConfig,
    *,
    layer: Callable[..., GroupedQueryAttention] = GroupedQueryAttention,
    **options: Any,
) -> GroupedQueryAttention:
    """`options` are the layer's own."""
    return layer(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim=head_width(config),
        **options,
    )


def attention_biases(config: PreTrainedConfig) -> dict[str, Any]:
    """Options for attention layers: all projections have biases, or none."""
    return dict.fromkeys(("qkv_bias", "out_bias"), config.attention_bias)


def norm_of_each_head(config: PreTrainedConfig) -> dict[str, Any]:
    """Options for `grouped_queries`: queries and keys are normalised head by head."""
    width = head_width(config)
    return {name: RMSNorm(width, config.rms_norm_eps) for name in ("q_norm", "k_norm")}


def norm_of_all_heads(config: PreTrainedConfig) -> dict[str, Any]:
    """Options for `grouped_queries`: all queries, and all keys, are normalised as one vector."""
    width = head_width(config)
    heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}
    return {name: RMSNorm(count * width, config.rms_norm_eps) for name, count in heads.items()}


def window_of(config: PreTrainedConfig, layer_idx: int) -> int | None:
    """The layer's sliding window, None where `config.layer_types` says that it has none."""
    slides = config.layer_types[layer_idx] == "sliding_attention"
    return config.sliding_window if slides else None


def with_rope(config: PreTrainedConfig, parameters: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of the config whose `rope_parameters` are these."""
    config = copy.copy(config)
    config.rope_parameters = dict(parameters)
    return config


def rotary_embeddings(
    config: PreTrainedConfig, embedding: Callable[[PreTrainedConfig], RotaryEmbedding]
) -> RotaryEmbeddings:
    """The `embedding` of each kind of layer, where `config.rope_parameters` has one for each."""
    found = {}
    for kind in sorted(set(config.layer_types)):
        if not isinstance(config.rope_parameters.get(kind), dict):
            raise UnsupportedArchitectureError.of_field(config, "rope_parameters", f"one of {kind}")
        found[kind] = embedding(with_rope(config, config.rope_parameters[kind]))
    return RotaryEmbeddings(found)
