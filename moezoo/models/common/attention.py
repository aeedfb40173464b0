"""Grouped-query attention of the sizes that a config names."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import RotaryEmbedding, RotaryEmbeddings, Rotation


class NormAfterRotation(GroupedQueryAttention):
    """Grouped-query attention that normalises queries and keys head by head after their rotation.

    `query_norm` and `key_norm` are functions or modules over the last dimension.
    """

    def __init__(
        self,
        *sizes: int,
        query_norm: Callable[[Tensor], Tensor],
        key_norm: Callable[[Tensor], Tensor],
        **options: Any,
    ) -> None:
        super().__init__(*sizes, **options)
        self.query_norm = query_norm
        self.key_norm = key_norm

    def heads(self, qkv: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(qkv, rotation)
        return self.query_norm(q), self.key_norm(k), v


def head_width(config: PreTrainedConfig) -> int:
    """Return `config.head_dim`, by default the hidden size divided by the number of query heads.

    Raises `UnsupportedArchitectureError` where there are more heads than hidden_size.
    """
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
    """Return a `layer` of the config's sizes; `options` are passed on to it."""
    return layer(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim=head_width(config),
        **options,
    )


def attention_biases(config: PreTrainedConfig) -> dict[str, Any]:
    """Return options for `grouped_queries`: as `config.attention_bias` says, all projections have
    biases or none has."""
    return dict.fromkeys(("qkv_bias", "out_bias"), config.attention_bias)


def norm_of_each_head(config: PreTrainedConfig) -> dict[str, Any]:
    """Return options for `grouped_queries`: RMSNorms of queries and keys, head by head."""
    width = head_width(config)
    return {name: RMSNorm(width, config.rms_norm_eps) for name in ("q_norm", "k_norm")}


def norm_of_all_heads(config: PreTrainedConfig) -> dict[str, Any]:
    """Return options for `grouped_queries`: RMSNorms of a token's query heads as one vector, and of
    its key heads as another."""
    width = head_width(config)
    heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}
    return {name: RMSNorm(count * width, config.rms_norm_eps) for name, count in heads.items()}


def window_of(config: PreTrainedConfig, layer_idx: int) -> int | None:
    """Return the layer's sliding window; None where `config.layer_types` says that it has none."""
    slides = config.layer_types[layer_idx] == "sliding_attention"
    return config.sliding_window if slides else None


def with_rope(config: PreTrainedConfig, parameters: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a copy of the config with these `rope_parameters`."""
    config = copy.copy(config)
    config.rope_parameters = dict(parameters)
    return config


def rotary_embeddings(
    config: PreTrainedConfig, embedding: Callable[[PreTrainedConfig], RotaryEmbedding]
) -> RotaryEmbeddings:
    """Return an `embedding` for each kind of layer that `config.layer_types` names.

    Raises `UnsupportedArchitectureError` where `config.rope_parameters` has none for a kind.
    """
    found = {}
    for kind in sorted(set(config.layer_types)):
        if not isinstance(config.rope_parameters.get(kind), dict):
            raise UnsupportedArchitectureError.of_field(config, "rope_parameters", f"one of {kind}")
        found[kind] = embedding(with_rope(config, config.rope_parameters[kind]))
    return RotaryEmbeddings(found)
