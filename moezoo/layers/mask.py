"""Causal masks: which keys each new token may see.

Legend: B batch, T new tokens, S keys (cached and new).
"""

import torch
from torch.nn import functional as F

from moezoo.layers.kernels.windows import Chunked, first_key


class CausalMask:
    """Masks that say which keys the T newest tokens may see, built when a window first needs one.

    `past` is the number of tokens before them. `visible` is bool [B, past + T], False at padding,
    or None; or a 4-D mask that is used as it is, bool or a float to be added to the scores.
    `packed` are the tokens' positions in their texts, int [B or 1, T], where rows have several
    texts, which do not see each other; there is then no past and no `visible`.
    """

    def __init__(
        self,
        past: int,
        length: int,
        device: torch.device,
        visible: torch.Tensor | None = None,
        packed: torch.Tensor | None = None,
    ) -> None:
        self.past = past
        self.length = length
        self.device = device
        self.visible = visible
        self.packed = packed
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def to(self, device: torch.device) -> "CausalMask":
        """Return the mask for layers on another device."""
        visible = None if self.visible is None else self.visible.to(device)
        packed = None if self.packed is None else self.packed.to(device)
        return CausalMask(self.past, self.length, device, visible, packed)

    def is_plain(self, num_keys: int, window: int | None) -> bool:
        """Whether causality alone decides and the keys are exactly the T new tokens."""
        fits = window is None or self.length <= window
        hides_none = self.visible is None and self.packed is None
        return hides_none and num_keys == self.length and fits

    def __call__(self, num_keys: int, window: int | None) -> torch.Tensor | None:
        """Return a mask broadcastable to [B, heads, T, S], or None if no key is hidden."""
        key = (num_keys, window)
        if key not in self._masks:
            self._masks[key] = self._build(num_keys, window)
        return self._masks[key]

    def _build(self, num_keys: int, window: int | None) -> torch.Tensor | None:
        if self.packed is not None:
            texts = text_numbers(self.packed)
            queries, keys = self.packed[:, :, None], self.packed[:, None]
            mask = (texts[:, :, None] == texts[:, None]) & (keys <= queries)
            if window is not None:
                mask &= keys >= first_key(queries, window)
            return mask[:, None]
        total = self.past + self.length
        # A cache returns the newest keys alone (sliding window), or more than it has (static).
        first = max(total - num_keys, 0)
        if self.visible is not None and self.visible.dim() == 4:
            return self.visible[..., first : first + num_keys]
        sees_all = window is None or first_key(total - 1, window) <= total - num_keys
        if self.visible is None and self.length == 1 and num_keys <= total and sees_all:
            return None
        queries = torch.arange(self.past, total, device=self.device)[:, None]
        keys = torch.arange(first, first + num_keys, device=self.device)
        mask = keys <= queries
        if isinstance(window, Chunked) and self.visible is not None:
            # Chunks are counted from the first token, which padding may precede.
            padding = (self.visible.cumsum(-1) == 0).sum(-1)[:, None, None, None]
            mask = mask & (keys >= first_key(queries - padding, window) + padding)
        elif window is not None:
            mask &= keys >= first_key(queries, window)
        if self.visible is None:
            return mask[None, None]
        visible = self.visible[:, first : first + num_keys]
        if visible.shape[1] < num_keys:
            visible = F.pad(visible, (0, num_keys - visible.shape[1]))
        # A padding token sees itself, so that its row is not empty: softmax of nothing is NaN.
        return (mask & visible[:, None, None]) | (keys == queries)


def visible_tokens(
    attention_mask: torch.Tensor | None, batch: int, total: int
) -> torch.Tensor | None:
    """Convert a mask to what `CausalMask` takes: a 2-D one to bool, or to None if it hides nothing;
    a 4-D one stays as it is.

    Raises `ValueError` for another shape than [batch, total], the rows and all tokens so far.
    """
    if attention_mask is None or attention_mask.dim() == 4:
        return attention_mask
    if attention_mask.shape != (batch, total):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, expected [B, past + T], which is "
            f"{[batch, total]}, or a 4-D mask"
        )
    visible = attention_mask.bool()
    # A graph that torch.compile traces has to work for any mask.
    return visible if torch.compiler.is_compiling() or not visible.all() else None


def packed_positions(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Return position_ids [B or 1, T] if a row has several texts, else None. As in transformers, a
    text begins wherever a position is not the one before plus 1."""
    # A graph that torch.compile traces has to work for any positions.
    if torch.compiler.is_compiling() or (position_ids.diff() != 1).any():
        return position_ids
    return None


def text_numbers(packed: torch.Tensor) -> torch.Tensor:
    """Return the number of each token's text in its row, from 0, int [B or 1, T], for positions
    that are `packed_positions`."""
    return F.pad((packed.diff() != 1).cumsum(-1), (1, 0))
