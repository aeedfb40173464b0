"""Windows: how far back a query sees."""

from typing import TypeVar

from torch import Tensor

Position = TypeVar("Position", int, Tensor)


class Chunked(int):
    """A window that begins anew at each multiple of it: a query sees the keys of its own chunk.

    As many newest keys are all that a cache has to keep, as for any other window.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chunked) and int(self) == int(other)

    def __hash__(self) -> int:
        return hash((Chunked, int(self)))


def first_key(position: Position, window: int) -> Position:
    """The position of the first key that a query at `position` sees; below 0 where all are seen."""
    size = int(window)
    if isinstance(window, Chunked):
        return position // size * size
    return position - size + 1
