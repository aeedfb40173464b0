"""Products in fp32 with weights that are converted to fp32 some rows at a time."""

from collections.abc import Callable

import torch

PIECE = 2**20
"""Number of weights converted at a time: 4 MB, which fit in a cache. To allocate memory for all of
them would take longer than the product."""


def product_in_pieces(
    x: torch.Tensor,
    wide_rows: Callable[[int, int], torch.Tensor],
    bias: torch.Tensor | None,
    *,
    out: torch.Tensor,
    step: int,
) -> torch.Tensor:
    """Write x @ weights.T + bias to out [T, N], rounded to its dtype, and return it.

    x is [T, K] fp32, bias [N]. `wide_rows(start, stop)` returns these rows of the weights in fp32,
    [stop - start, K]; it is called for `step` rows at a time.
    """
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
