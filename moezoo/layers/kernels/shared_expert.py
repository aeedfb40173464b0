"""The expert that all tokens go through beside those they choose, as kernels take it."""

from typing import NamedTuple

from torch import Tensor


class SharedExpert(NamedTuple):
    """w13 [2I', H], gate rows, then up rows, and w2 [H, I'], I' of its own; its output is
    multiplied by the sigmoid of logits [T], if there are any."""

    w13: Tensor
    w2: Tensor
    logits: Tensor | None = None
