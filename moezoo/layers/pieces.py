"""A product in fp32 with weights that are not there in fp32, or only some rows at a time."""

from collections.abc import Callable

import torch

PIECE = 2**20
"""Weights widened at a time: 4 MB, which caches hold. New memory would cost more than the product.
"""


def product_in_pieces(
    x: torch.Tensor,
    wide_rows: Callable[[int, int], torch.Tensor],
    bias: torch.Tensor | None,
    *,
    out: torch.Tensor,
    step: int,
) -> torch.Tensor:
    """x [T, K] fp32 times the rows `wide_rows(start, stop)` [rows, K] fp32, `step` of them at once,
    plus bias [N]: into out [T, N], rounded to its dtype."""
    num_rows = out.shape[1]
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        piece = wide_rows(start, stop)
        # With few rows of x, MKL is up to 3 times as fast if the weights are on the left.
        y = (piece @ x.t()).t() if x.shape[0] <= 64 else x @ piece.t()
        if bias is not None:
            y += bias[start:stop]
        out[:, start:stop] = y
    return out
