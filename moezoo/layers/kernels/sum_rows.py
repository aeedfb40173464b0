"""sum_rows: the sum of each token's rows, such as the answers of ranks.

    out[t] = sum over j with places[t, j] >= 0 of y[places[t, j]]

The sum is fp32, in rising order of j, and rounded once.

Legend: T tokens, J rows of a token at most, S rows, H hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.sizes import cdiv, next_power_of_2


def sum_rows_ref(y: Tensor, places: Tensor) -> Tensor:
    absent = (places < 0).unsqueeze(-1)
    rows = y[places.clamp(min=0).long()].float()
    return rows.masked_fill(absent, 0.0).sum(1).to(y.dtype)


@triton.jit
def _sum_rows_kernel(
    y_ptr,
    places_ptr,
    out_ptr,
    hidden_size,
    J: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_cols = cols < hidden_size
    out = tl.zeros([BLOCK_H], tl.float32)
    for j in tl.static_range(J):
        place = tl.load(places_ptr + token * J + j).to(tl.int64)
        m_y = m_cols & (place >= 0)
        out += tl.load(y_ptr + place * hidden_size + cols, mask=m_y, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * hidden_size + cols, out.to(out_ptr.dtype.element_ty), mask=m_cols)


def sum_rows(y: Tensor, places: Tensor) -> Tensor:
    """Return each token's sum of rows of y, [T, H] in y's dtype.

    y [S, H] is contiguous; places int [T, J] are in 0..S-1, or -1 for none.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    if y.ndim != 2 or not y.is_contiguous():
        raise ValueError(f"y must be [S, H] and contiguous, got {list(y.shape)}, {y.stride()}")
    if places.ndim != 2 or places.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"places must be int [T, J], got {list(places.shape)} {places.dtype}")
    hidden_size = y.shape[1]
    out = torch.empty(len(places), hidden_size, dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    block = min(1024, next_power_of_2(hidden_size))
    _sum_rows_kernel[(len(places), cdiv(hidden_size, block))](
        y, places.contiguous(), out, hidden_size, J=places.shape[1], BLOCK_H=block
    )
    return out
