"""Layers with a state: numbers of a sequence that do not grow with its length.

Such a layer is a `moezoo.layers.mixer.SequenceMixer` that also has `mix`, its computation on a
rectangle of tokens. Its `forward` asks the `Context` to `recur`: the context knows which tokens
belong to which sequence, hands `mix` the states of those sequences, and keeps the states that come
back. The first state is the end of a causal convolution's input, a second one the recurrence's sum
over all tokens.

Legend: B sequences, T new tokens of each.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

States = tuple[Tensor, ...]
"""Of B sequences, each [B, *shape]."""


class StateShape(NamedTuple):
    """Of one sequence; `dtype` None is the model's."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


class StateLayer(Protocol):
    @property
    def state_shapes(self) -> tuple[StateShape, ...]: ...

    def mix(
        self, inputs: tuple[Tensor, ...], states: States, real: Tensor | None
    ) -> tuple[Tensor, States]:
        """inputs, each [B, T, ..], and the states before them -> output [B, T, ..], states after.

        `real` is bool [B, T], False for places that no token fills: what is there changes no state.
        None where tokens fill all. The states may be those that were given, changed in place.
        """
        ...


def no_states(layer: StateLayer, batch: int, like: Tensor) -> States:
    """Zeros: the states of sequences that begin, on the device and in the dtype of `like`."""
    return tuple(
        like.new_zeros(batch, *shape, dtype=dtype or like.dtype)
        for shape, dtype in layer.state_shapes
    )


def cached_states(cache: Any, layer_idx: int) -> States | None:
    """What a cache of transformers has of a layer; None before its first token.

    Raises `ValueError` for a cache that was made without the model's config, and so has no place
    for them.
    """
    kept = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(kept, LinearAttentionCacheLayerMixin):
        raise ValueError(
            f"past_key_values has no place for the state of layer {layer_idx}: make it with "
            "DynamicCache(config=model.config)"
        )
    if not kept.has_previous_state[0]:
        return None
    found = (kept.conv_states[0], kept.recurrent_states[0])
    return tuple(state for state in found if state is not None)


def cache_states(cache: Any, layer_idx: int, states: States) -> None:
    """Put them into a cache of transformers, in the place of those that it had."""
    window, *recurrent = states
    cache.update_conv_state(window, layer_idx)
    for state in recurrent:
        cache.update_recurrent_state(state, layer_idx)
