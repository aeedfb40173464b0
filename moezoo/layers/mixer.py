"""The base class of what stands in a decoder layer's attention place.

Legend: B batch, T new tokens, H hidden.
"""

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor, nn

from moezoo.layers.context import Context
from moezoo.layers.norm import NormOfSum
from moezoo.layers.states import StateShape


class SequenceMixer(nn.Module):
    """A layer that combines tokens with earlier ones of their sequence: attention or a recurrence.

    The attributes here are all that decoders, caches and CUDA graphs ask of it beyond a call; a
    subclass sets those that differ. One with states (`state_shapes`) is a
    `moezoo.layers.states.StateLayer` too.
    """

    layer_type: str = "full_attention"
    """The name that transformers' `config.layer_types` has for such a layer."""
    window: int | None = None
    """Number of newest tokens that a query sees, its own included, or a `Chunked`; None for all."""
    counts_padding: bool = False
    """Whether the output depends on the number of padding tokens before a sequence."""
    prevents_capture: bool = False
    """Whether the layer does what a CUDA graph cannot record, so that steps are not captured."""

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes [heads, width] of the tensors that a KV cache stores for each token: one, two for
        keys and values, or none."""
        return ()

    @property
    def state_shapes(self) -> tuple[StateShape, ...]:
        """Shapes of the states that are kept for each sequence, whatever its length."""
        return ()

    def forward(self, x: Tensor | NormOfSum, context: Context, layer_idx: int) -> Tensor:
        """x [B, T, H] -> [B, T, H]; keys, values and states are cached under `layer_idx`."""
        raise NotImplementedError


def state_bytes(mixers: Iterable[SequenceMixer], dtype: torch.dtype) -> int:
    """Return the bytes of one sequence's states in all `mixers`, in a model of this dtype."""
    return sum(
        prod(shape) * (own or dtype).itemsize
        for mixer in mixers
        for shape, own in mixer.state_shapes
    )
