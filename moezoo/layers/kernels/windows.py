"""Attention windows, which limit how far back a query sees."""

from typing import TypeVar

from torch import Tensor

Position = TypeVar("Position", int, Tensor)


class Chunked(int):
    """A window in chunks of its size: a query sees the keys of its own chunk up to itself.

    As for a sliding window of the same size, a cache has to keep only that many newest keys.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chunked) and int(self) == int(other)

    def __hash__(self) -> int:
        return hash((Chunked, int(self)))


def first_key(position: Position, window: int) -> Position:
    """Return the first key's position that a query at `position` sees; below 0 if it sees all."""
    size = int(window)
    if isinstance(window, Chunked):
        return position // size * size
    return position - size + 1
