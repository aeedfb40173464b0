"""The operands of a shared expert, which all tokens go through, for kernels."""

from typing import NamedTuple

from torch import Tensor


class SharedExpert(NamedTuple):
    """Weights of a shared expert: w13 [2I', H], gate rows, then up rows, and w2 [H, I'].

    I' is its own intermediate size. Its output is multiplied by the sigmoid of logits [T], if any.
    """

    w13: Tensor
    w2: Tensor
    logits: Tensor | None = None
