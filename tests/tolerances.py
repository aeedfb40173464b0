"""How far two computations of the same thing may lie apart, by dtype."""

import torch
from torch import Tensor

RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Largest difference over largest magnitude. 16 bit: two units in the last place (of the largest
element), since a value may be rounded twice on the way; fp32: sums of up to some thousand terms."""


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|; infinite where one of them is not finite."""
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    difference = difference / expected.double().abs().max().clamp(min=1e-30)
    return difference.nan_to_num(torch.inf).item()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Same shape and dtype, values within RELATIVE of that dtype."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = relative_difference(actual, expected)
    assert difference <= RELATIVE[actual.dtype], f"relative difference {difference:.2e}"
