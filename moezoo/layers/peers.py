"""The other ranks that a decoder's experts are divided over, as a decoder and generation see them.

`moezoo.parallel` has the classes that do it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch


class Balancer(Protocol):
    """What keeps the ranks evenly loaded that a decoder's experts are divided over."""

    def begin(self, real: torch.Tensor | None) -> None:
        """A step begins; real is bool [T], False at padding, or None without any."""
        ...

    def end_step(self, *, dummy: bool = False) -> None:
        """All that a step does is queued; `dummy` if this rank had no tokens in it."""
        ...

    def undone(self) -> AbstractContextManager[None]:
        """Steps within do nobody's work, and are not counted."""
        ...


class Turn(NamedTuple):
    """A forward pass that ranks make together."""

    goes_on: bool
    """False where none of them has anything to do: there is no such pass."""
    capacity: int | None
    """In a step of decoding the most tokens of a rank; None where one has a prompt."""
    tokens: Sequence[int]
    """Of each rank."""


class Peers(Protocol):
    """The other ranks that a decoder's experts are divided over, as generation sees them.

    Ranks make forward passes together. Each begins every one of them, and one that has no tokens
    goes through it without, until none has any.
    """

    alike: bool
    """Whether all have the same tokens, and not each its own."""
    limit: int | None
    """The most tokens of a rank in a forward pass, where there is such a limit."""

    def begin(self, rows: int, prompts: Sequence[Sequence[int]] = ()) -> Turn:
        """Agree on the next pass: this rank has a token for each of so many rows, or pieces of
        prompts, or neither.

        Raises, on every rank, `ExpertMapError` where ranks that are alike have not the same, and
        `ValueError` where one has more tokens than the limit; `RankError` where one does not come.
        """
        ...

    def passing(self, turn: Turn) -> AbstractContextManager[None]:
        """The block is that pass: layers need not agree again on what is known of it, and it can be
        captured if there is a capacity."""
        ...

    def step_without_tokens(self, decoder: Any) -> None:
        """This rank's part in a pass for which it has nothing."""
        ...

    def chosen(self, tensor: torch.Tensor) -> torch.Tensor:
        """What was chosen for rows of this rank; that of the first one where all are alike."""
        ...

    def largest(self, *numbers: int) -> list[int]:
        """Each of these numbers where it is largest."""
        ...

    def same(self, **numbers: int) -> None:
        """Raise `ExpertMapError`, on every rank, unless all give the same numbers."""
        ...
