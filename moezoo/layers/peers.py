"""Interfaces of the ranks that a decoder's experts are divided over, as a decoder and generation
use them.

`moezoo.parallel` has the classes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch


class Balancer(Protocol):
    """Keeps the load of the ranks even that a decoder's experts are divided over."""

    def begin(self, real: torch.Tensor | None) -> None:
        """Begin a step; `real` is bool [T], False at padding, or None without padding."""
        ...

    def end_step(self, *, dummy: bool = False) -> None:
        """End a step, all of which is queued; `dummy` if this rank had no tokens in it."""
        ...

    def uncounted(self) -> AbstractContextManager[None]:
        """Return a context whose steps are not counted, as their results are not used."""
        ...


class Turn(NamedTuple):
    """What the ranks have agreed on for a forward pass."""

    goes_on: bool
    """Whether there is a pass; False where no rank has anything to do."""
    capacity: int | None
    """Largest number of tokens of a rank if all are decoding; None where one has a prompt."""
    tokens: Sequence[int]
    """Number of tokens of each rank."""


class Peers(Protocol):
    """The other ranks that a decoder's experts are divided over.

    Ranks make forward passes together: a rank without tokens takes part in each pass too, until no
    rank has any.
    """

    same_tokens: bool
    """Whether all ranks have the same tokens; otherwise each has its own."""
    limit: int | None
    """Largest number of tokens of a rank in a forward pass; None for no limit."""

    def begin(self, rows: int, prompts: Sequence[Sequence[int]] = ()) -> Turn:
        """Agree on the next pass, in which this rank has a token for each of `rows` rows, or pieces
        of prompts, or neither.

        Raises, on every rank, `ExpertMapError` where ranks that are alike do not have the same
        tokens, and `ValueError` where one has more tokens than the limit; `RankError` where a rank
        does not answer.
        """
        ...

    def forward_pass(self, turn: Turn) -> AbstractContextManager[None]:
        """Return the context of that pass: layers need not agree again on what the turn says, and
        it can be captured if there is a capacity."""
        ...

    def step_without_tokens(self, decoder: Any) -> None:
        """Take part in a pass of `decoder` in which this rank has no tokens."""
        ...

    def chosen(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tokens chosen for this rank's rows, those of the first rank if all are
        alike."""
        ...

    def largest(self, *numbers: int) -> list[int]:
        """Return the maximum of each number over all ranks."""
        ...

    def same(self, **numbers: int) -> None:
        """Raise `ExpertMapError`, on every rank, unless all give the same numbers."""
        ...
