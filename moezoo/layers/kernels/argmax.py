"""argmax: the position of the largest number of each row; the first of equals, NaN above all.

    out[r] = min of {c : x[r, c] = max of x[r]}

A first launch finds the largest of each piece of a row, a second one that of all pieces: with few
rows, torch's own routine gives a row of 150,000 logits to a single multiprocessor.

Legend: R rows, C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2
from moezoo.layers.kernels.topk import sort_key

PIECE = 4096
"""Least number of columns for a program of the first launch."""

MAX_PIECES = 1024
"""Most pieces of a row; one program of the second launch holds them all."""


def argmax_ref(x: Tensor) -> Tensor:
    wide = x.float()
    largest = torch.where(wide.isnan().any(1), torch.nan, wide.amax(1))[:, None]
    found = (wide == largest) | (wide.isnan() & largest.isnan())
    return found.int().argmax(1)


@triton.jit
def _first_of_largest(keys, columns, LAST: tl.constexpr):
    best = tl.max(keys, 0)
    return best, tl.min(tl.where(keys == best, columns, LAST), 0)


@triton.jit(do_not_specialize=["num_columns", "piece"])
def _pieces_kernel(
    x_ptr,
    keys_ptr,
    columns_ptr,
    num_columns,
    piece,
    stride_r,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * piece
    end = tl.minimum(begin + piece, num_columns)
    best = -0x80000000
    column = begin
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride_r + columns, mask=columns < end, other=0.0)
        keys = tl.where(columns < end, sort_key(x.to(tl.float32)), -0x80000000)
        here, where = _first_of_largest(keys, columns, 0x7FFFFFFF)
        column = tl.where(here > best, where, column)
        best = tl.maximum(here, best)
    slot = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(keys_ptr + slot, best)
    tl.store(columns_ptr + slot, column)


@triton.jit(do_not_specialize=["num_pieces"])
def _whole_kernel(
    keys_ptr, columns_ptr, out_ptr, num_pieces, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    wait(OVERLAP)
    row = tl.program_id(0)
    pieces = tl.arange(0, BLOCK)
    m_pieces = pieces < num_pieces
    keys = tl.load(keys_ptr + row * num_pieces + pieces, mask=m_pieces, other=-0x80000000)
    columns = tl.load(columns_ptr + row * num_pieces + pieces, mask=m_pieces, other=0x7FFFFFFF)
    _, column = _first_of_largest(keys, columns, 0x7FFFFFFF)
    tl.store(out_ptr + row, column.to(tl.int64))


def argmax(x: Tensor) -> Tensor:
    """Return the position of each row's largest number, int64 [R].

    x [R, C] has any float dtype; C is not 0.

    Raises ValueError for a shape or strides that do not fit.
    """
    if x.ndim != 2 or x.shape[1] == 0 or x.stride(1) != 1:
        raise ValueError(f"x must be [R, C] of dense rows, got {list(x.shape)}, {x.stride()}")
    num_rows, num_columns = x.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    if num_rows == 0:
        return out
    piece = PIECE * cdiv(num_columns, PIECE * MAX_PIECES)
    num_pieces = cdiv(num_columns, piece)
    keys, columns = torch.empty(2, num_rows, num_pieces, dtype=torch.int32, device=x.device)
    options = launch_options(x.device)
    _pieces_kernel[(num_pieces, num_rows)](
        *(x, keys, columns, num_columns, piece, x.stride(0)),
        BLOCK=min(PIECE, next_power_of_2(num_columns)),
        num_warps=8,
        **options,
    )
    _whole_kernel[(num_rows,)](
        *(keys, columns, out, num_pieces),
        BLOCK=next_power_of_2(num_pieces),
        num_warps=1,
        **options,
    )
    return out
