"""interleave: the columns of x in the order in which `unpack` has those of the weights.

    out[t, (chunk * WAYS + way) * 8 + i] = x[t, (chunk * 8 + i) * WAYS + way], and 0 for K and more

Legend: T rows, K columns, P the least whole number of chunks from K on, WAYS columns in a word.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2
from moezoo.layers.kernels.unpack import CHUNK


def padded(num_columns: int, ways: int) -> int:
    """P"""
    chunk: int = CHUNK.value * ways
    return cdiv(num_columns, chunk) * chunk


def interleave_ref(x: Tensor, ways: int) -> Tensor:
    x = F.pad(x, (0, padded(x.shape[1], ways) - x.shape[1]))
    return x.unflatten(-1, (-1, CHUNK.value, ways)).mT.flatten(-3)


@triton.jit
def interleave_row(
    row,
    first_chunk,
    x_ptr,
    order_ptr,
    out_ptr,
    num_columns,
    num_chunks,
    stride_xt,
    stride_xk,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK chunks of a row; with an order, column j of x is what it says of j."""
    row = row.to(tl.int64)
    chunks = first_chunk + tl.arange(0, BLOCK)[:, None, None]
    ways = tl.arange(0, WAYS)[None, :, None]
    inner = tl.arange(0, CHUNK)[None, None, :]
    cols = (chunks * CHUNK + inner) * WAYS + ways
    m_cols = cols < num_columns
    if order_ptr is not None:
        cols = tl.load(order_ptr + cols, mask=m_cols, other=0)
    x = tl.load(x_ptr + row * stride_xt + cols * stride_xk, mask=m_cols, other=0.0)
    p_out = out_ptr + row * num_chunks * WAYS * CHUNK + (chunks * WAYS + ways) * CHUNK + inner
    tl.store(p_out, x, mask=chunks < num_chunks)


@triton.jit
def _interleave_kernel(
    x_ptr,
    out_ptr,
    num_columns,
    num_chunks,
    stride_xt,
    stride_xk,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    # fmt: off
    interleave_row(
        tl.program_id(0), tl.program_id(1) * BLOCK, x_ptr, None, out_ptr, num_columns, num_chunks,
        stride_xt, stride_xk, WAYS, BLOCK,
    )
    # fmt: on


def interleave(x: Tensor, ways: int) -> Tensor:
    """x [T, K] of any strides -> [T, P]."""
    num_rows, num_columns = x.shape
    width = padded(num_columns, ways)
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    num_chunks = width // (CHUNK.value * ways)
    block = min(32, next_power_of_2(num_chunks))
    _interleave_kernel[(num_rows, cdiv(num_chunks, block))](
        x,
        out,
        num_columns,
        num_chunks,
        *x.stride(),
        WAYS=ways,
        BLOCK=block,
        num_warps=4,
        **launch_options(x.device),
    )
    return out
