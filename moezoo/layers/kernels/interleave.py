"""interleave: puts the columns of x in the order in which `unpack` delivers those of the weights.

    out[t, (chunk * WAYS + way) * 8 + i] = x[t, (chunk * 8 + i) * WAYS + way], and 0 for K and more

`permute_and_interleave` does it in the launch of `permute`, whose few programs wait for memory.

Legend: T rows, K columns, P the least whole number of chunks from K on, WAYS columns in a word.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels import permute as permuting
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.permute import (
    Permutation,
    empty_permutation,
    few_rows_options,
    permute,
    permute_expert,
    permute_ref,
)
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2
from moezoo.layers.kernels.unpack import CHUNK


def padded(num_columns: int, ways: int) -> int:
    """Return P, the number of columns after padding."""
    chunk: int = CHUNK.value * ways
    return cdiv(num_columns, chunk) * chunk


def interleave_ref(x: Tensor, ways: int) -> Tensor:
    x = F.pad(x, (0, padded(x.shape[1], ways) - x.shape[1]))
    return x.unflatten(-1, (-1, CHUNK.value, ways)).mT.flatten(-3)


def permute_and_interleave_ref(
    x: Tensor, topk_ids: Tensor, num_experts: int, tile_rows: int, *, ways: int
) -> tuple[Permutation, Tensor]:
    return permute_ref(topk_ids, num_experts, tile_rows), interleave_ref(x, ways)


@triton.jit
def interleave_block(
    row,
    block,
    x_ptr,
    columns_ptr,
    out_ptr,
    num_columns,
    num_chunks,
    stride_xt,
    stride_xk,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK chunks of a row; with columns, column j of x is columns[j] of what is stored."""
    row = row.to(tl.int64)
    chunks = block * BLOCK + tl.arange(0, BLOCK)[:, None, None]
    ways = tl.arange(0, WAYS)[None, :, None]
    inner = tl.arange(0, CHUNK)[None, None, :]
    cols = (chunks * CHUNK + inner) * WAYS + ways
    m_cols = cols < num_columns
    if columns_ptr is not None:
        cols = tl.load(columns_ptr + cols, mask=m_cols, other=0)
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
    interleave_block(
        tl.program_id(0), tl.program_id(1), x_ptr, None, out_ptr, num_columns, num_chunks,
        stride_xt, stride_xk, WAYS, BLOCK,
    )
    # fmt: on


@triton.jit(do_not_specialize=["num_rows", "max_tiles"])
def _permute_and_interleave_kernel(
    ids_ptr,
    order_ptr,
    positions_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    x_ptr,
    out_ptr,
    num_rows,
    num_experts,
    max_tiles,
    num_columns,
    num_chunks,
    stride_xt,
    stride_xk,
    TILE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    program = tl.program_id(0)
    if program < num_experts:
        # fmt: off
        permute_expert(
            program, ids_ptr, order_ptr, positions_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr,
            num_rows, num_experts, max_tiles, TILE_ROWS, BLOCKS, BLOCK_S, BLOCK_E, BLOCK_N,
        )
        # fmt: on
    else:
        num_blocks = tl.cdiv(num_chunks, BLOCK)
        block = program - num_experts
        # fmt: off
        interleave_block(
            block // num_blocks, block % num_blocks, x_ptr, None, out_ptr, num_columns, num_chunks,
            stride_xt, stride_xk, WAYS, BLOCK,
        )
        # fmt: on


def interleave(x: Tensor, ways: int) -> Tensor:
    """Return x [T, K], of any strides, with columns reordered and padded: [T, P]."""
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


def permute_and_interleave(
    x: Tensor, topk_ids: Tensor, num_experts: int, tile_rows: int, *, ways: int
) -> tuple[Permutation, Tensor]:
    """Return `permute` of topk_ids [T, K'] and `interleave` of x [T, K]: a Permutation and [T, P].

    Raises ValueError as `permute` does, and for another number of tokens.
    """
    if x.ndim != 2 or len(x) != len(topk_ids):
        raise ValueError(f"x must be [{len(topk_ids)}, K] as topk_ids are, got {list(x.shape)}")
    num_rows, (num_tokens, num_columns) = topk_ids.numel(), x.shape
    # Where rows are many a launch is nothing beside them; without columns there is none.
    if num_rows > permuting.FEW_ROWS or x.numel() == 0:
        return permute(topk_ids, num_experts, tile_rows), interleave(x, ways)
    rows = empty_permutation(topk_ids, num_experts, tile_rows)
    out = torch.empty(num_tokens, padded(num_columns, ways), dtype=x.dtype, device=x.device)
    num_chunks = out.shape[1] // (CHUNK.value * ways)
    # Smaller than `permute`'s: its registers would leave room for one program on a multiprocessor.
    options = few_rows_options(num_rows, num_experts, most=2048)
    block = min(32, next_power_of_2(num_chunks))
    _permute_and_interleave_kernel[(num_experts + num_tokens * cdiv(num_chunks, block),)](
        topk_ids.contiguous(),
        *rows,
        x,
        out,
        num_rows,
        num_experts,
        rows.tiles.shape[1],
        num_columns,
        num_chunks,
        *x.stride(),
        TILE_ROWS=tile_rows,
        WAYS=ways,
        BLOCK=block,
        **options,
        **launch_options(x.device),
    )
    return rows, out
