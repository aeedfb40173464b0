"""gather: the rows of x in expert order, for a product that reads them by descriptor.

    out[positions[t, k]] = x[t]  for every k with positions[t, k] >= 0

Legend: T tokens, K experts per token, S = T*K rows, H hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, wait


def gather_ref(x: Tensor, positions: Tensor) -> Tensor:
    out = x.new_zeros(positions.numel(), x.shape[1])
    present = positions >= 0
    tokens = torch.arange(len(x), device=x.device).unsqueeze(1).expand_as(positions)
    out[positions[present].long()] = x[tokens[present]]
    return out


@triton.jit
def _gather_kernel(
    x_ptr,
    positions_ptr,
    out_ptr,
    hidden_size,
    stride_xt,
    stride_xh,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_cols = cols < hidden_size
    x = tl.load(x_ptr + token * stride_xt + cols * stride_xh, mask=m_cols)
    for k in tl.static_range(K):
        position = tl.load(positions_ptr + token * K + k).to(tl.int64)
        tl.store(out_ptr + position * hidden_size + cols, x, mask=m_cols & (position >= 0))


def gather(x: Tensor, positions: Tensor) -> Tensor:
    """x [T, H] of any strides, positions [T, K] int32 -> [S, H]; nobody's rows are not written.

    Raises ValueError for shapes that do not fit.
    """
    if x.ndim != 2 or positions.ndim != 2 or len(positions) != len(x):
        raise ValueError(
            f"x must be [T, H] and positions [T, K], got {list(x.shape)}, {list(positions.shape)}"
        )
    num_tokens, hidden_size = x.shape
    out = torch.empty(positions.numel(), hidden_size, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block = min(1024, triton.next_power_of_2(hidden_size))
    _gather_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        x,
        positions.contiguous(),
        out,
        hidden_size,
        *x.stride(),
        K=positions.shape[1],
        BLOCK_H=block,
        **launch_options(x.device),
    )
    return out
