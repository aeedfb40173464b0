"""Layers with states, whose size does not grow with the length of a sequence.

Such a layer is a `moezoo.layers.mixer.SequenceMixer` that also has `mix`, its computation on a
rectangle of tokens. Its `forward` asks the `Context` to `recur`: the context knows which tokens
belong to which sequence, hands `mix` the states of those sequences, and keeps the states that come
back. The first state is the end of a causal convolution's input, the second one, if there is one,
what a recurrence has accumulated over all tokens.

Legend: B sequences, T new tokens of each.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

States = tuple[Tensor, ...]
"""The states of B sequences in a layer, each [B, *shape]."""


class StateShape(NamedTuple):
    """Shape and dtype of one sequence's state; `dtype` None is the model's."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


class StateLayer(Protocol):
    """The part of a layer with states that a `Context` needs."""

    @property
    def state_shapes(self) -> tuple[StateShape, ...]:
        """Shapes of the states that are kept for each sequence."""
        ...

    def mix(
        self, inputs: tuple[Tensor, ...], states: States, real: Tensor | None
    ) -> tuple[Tensor, States]:
        """Compute the output [B, T, ..] of inputs, each [B, T, ..], and the states after them.

        `states` are those before the inputs; the returned ones may be the same, changed in place.
        `real` is bool [B, T], False for places without a token, which change no state, or None if
        all have one.
        """
        ...


def no_states(layer: StateLayer, batch: int, like: Tensor) -> States:
    """Return the states of `batch` sequences before their first token: zeros, on the device and by
    default in the dtype of `like`."""
    return tuple(
        like.new_zeros(batch, *shape, dtype=dtype or like.dtype)
        for shape, dtype in layer.state_shapes
    )


def cached_states(cache: Any, layer_idx: int) -> States | None:
    """Return a layer's states in transformers' cache; None before the first token.

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
    """Replace a layer's states in transformers' cache."""
    window, *recurrent = states
    cache.update_conv_state(window, layer_idx)
    for state in recurrent:
        cache.update_recurrent_state(state, layer_idx)
