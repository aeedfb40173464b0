"""linear_weight_only and linear_fp8: a linear layer with quantised weights, as one expert.

    y = x @ w.T + bias

`down_weight_only` and `down_fp8` multiply. The launch before brings x into the form that they take,
in the order of the weights' columns, and writes the tiles: there is nothing to permute.

Rounding points are theirs: for fp8 x is quantised per row and 128 of K.

Legend: R rows, N and K rows and columns of the weights.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.down_fp8 import down_fp8
from moezoo.layers.kernels.down_weight_only import down_weight_only
from moezoo.layers.kernels.interleave import interleave_block, padded
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.packed_operand import ways
from moezoo.layers.kernels.permute import Permutation, store_tiles
from moezoo.layers.kernels.quantize import quantize_groups
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2
from moezoo.layers.kernels.tiles import Tile, multiprocessors, plan
from moezoo.layers.kernels.unpack import CHUNK
from moezoo.layers.kernels.weight_only_tiles import plan_weight_only
from moezoo.layers.quant import WeightOnly
from moezoo.layers.quant.channel_fp8 import Fp8Weights
from moezoo.layers.quant.fp8 import BLOCK, Fp8Rows, blocks, quantize_rows

GROUPS = 8
"""Number of groups of 128 that a program quantises."""

LEAST_COLUMNS = 64
"""Least columns of a tile where there are too few weights for all multiprocessors."""


def linear_weight_only_ref(x: Tensor, w: WeightOnly, bias: Tensor | None = None) -> Tensor:
    y = x.float() @ w.dequantize().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_fp8_ref(x: Tensor, w: Fp8Weights, bias: Tensor | None = None) -> Tensor:
    y = quantize_rows(x).dequantize()[:, : x.shape[1]] @ w.dequantize().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@triton.jit(do_not_specialize=["num_rows", "max_tiles"])
def _interleaved_rows_kernel(
    x_ptr,
    columns_ptr,
    out_ptr,
    tiles_ptr,
    num_rows,
    max_tiles,
    num_columns,
    num_chunks,
    stride_xr,
    stride_xk,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0)
    block = tl.program_id(1)
    if row < num_rows:
        # fmt: off
        interleave_block(
            row, block, x_ptr, columns_ptr, out_ptr, num_columns, num_chunks, stride_xr, stride_xk,
            WAYS, BLOCK,
        )
        # fmt: on
    elif block == 0:
        store_tiles(0, 0, num_rows, 0, tiles_ptr, max_tiles, TILE_ROWS, BLOCK_N)


# num_groups stays a variable, see `quantize`.
@triton.jit(do_not_specialize=["num_rows", "max_tiles", "num_groups", "stride_sg"])
def _fp8_rows_kernel(
    x_ptr,
    x8_ptr,
    scales_ptr,
    tiles_ptr,
    num_rows,
    max_tiles,
    num_groups,
    num_columns,
    stride_xr,
    stride_xk,
    stride_sg,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    program = tl.program_id(0)
    if program > 0:
        # fmt: off
        quantize_groups(
            program - 1, x_ptr, x8_ptr, scales_ptr, num_rows, num_groups, num_columns, stride_xr,
            stride_xk, 1, stride_sg, GROUPS, GROUP,
        )
        # fmt: on
    else:
        store_tiles(0, 0, num_rows, 0, tiles_ptr, max_tiles, TILE_ROWS, BLOCK_N)


def linear_weight_only(
    x: Tensor, w: WeightOnly, bias: Tensor | None = None, *, tile: Tile | None = None
) -> Tensor:
    """Return x @ w.T + bias, [R, N] in x's dtype, for weights w [N, K] of 4 or 8 bits.

    x [R, K] is fp32, bf16 or fp16, of any strides; bias is [N].

    Raises ValueError for shapes or strides that do not fit.
    """
    _check(x, w, bias)
    if tile is None:
        parts = w.map(lambda tensor: tensor[None, None])
        tile = _narrow(plan_weight_only(x, parts, parts[0], num_rows=len(x)).down, x, len(w.data))
    num_rows, num_columns = x.shape
    order = w.order
    w = w if order is None else replace(w, order=None)
    num_ways = ways(type(w), num_columns)
    width = padded(num_columns, num_ways)
    rows = _permutation(num_rows, tile.m, x.device)
    interleaved = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if interleaved.numel():
        num_chunks = width // (CHUNK.value * num_ways)
        block = min(32, next_power_of_2(num_chunks))
        _interleaved_rows_kernel[(num_rows + 1, cdiv(num_chunks, block))](
            x,
            order,
            interleaved,
            rows.tiles,
            num_rows,
            rows.tiles.shape[1],
            num_columns,
            num_chunks,
            *x.stride(),
            WAYS=num_ways,
            BLOCK=block,
            TILE_ROWS=tile.m,
            BLOCK_N=32,
            num_warps=4,
            **launch_options(x.device),
        )
    bias2 = None if bias is None else bias[None]
    return down_weight_only(
        interleaved, w.map(lambda tensor: tensor[None]), rows, tile=tile, bias2=bias2
    )


def linear_fp8(
    x: Tensor, w: Fp8Weights, bias: Tensor | None = None, *, tile: Tile | None = None
) -> Tensor:
    """Return x @ w.T + bias, [R, N] in x's dtype, for weights w [N, K] in fp8.

    x [R, K] is fp32, bf16 or fp16, of any strides; bias is [N].

    Raises ValueError for shapes that do not fit.
    """
    _check(x, w, bias)
    if tile is None:
        tile = plan(x, w.data[None, None], w.data[None], num_rows=len(x)).down
        tile = _narrow(tile, x, len(w.data))
    num_rows, num_columns = x.shape
    num_groups = blocks(num_columns)
    rows = _permutation(num_rows, tile.m, x.device)
    x8 = torch.empty(num_rows, num_groups * BLOCK, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_groups, num_rows, dtype=torch.float32, device=x.device)
    if x8.numel():
        _fp8_rows_kernel[(1 + cdiv(num_rows * num_groups, GROUPS),)](
            x,
            x8,
            scales,
            rows.tiles,
            num_rows,
            rows.tiles.shape[1],
            num_groups,
            num_columns,
            *x.stride(),
            num_rows,
            GROUPS=GROUPS,
            GROUP=BLOCK,
            TILE_ROWS=tile.m,
            BLOCK_N=32,
            num_warps=4,
            **launch_options(x.device),
        )
    bias2 = None if bias is None else bias[None]
    one = w.map(lambda tensor: tensor[None])
    return down_fp8(Fp8Rows(x8, scales.mT), one, rows, dtype=x.dtype, tile=tile, bias2=bias2)


def _check(x: Tensor, w: WeightOnly | Fp8Weights, bias: Tensor | None) -> None:
    if w.data.ndim != 2 or x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x must be [R, K] and w [N, K], got {list(x.shape)} and {list(w.shape)}")
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"bias must be {list(w.shape[:1])}, got {list(bias.shape)}")


def _narrow(tile: Tile, x: Tensor, num_columns: int) -> Tile:
    """Return the tile with fewer columns, where one matrix has too few tiles for all
    multiprocessors."""
    n, row_tiles = tile.n, cdiv(len(x), tile.m)
    while n > LEAST_COLUMNS and row_tiles * cdiv(num_columns, n) < multiprocessors(x.device):
        n //= 2
    return replace(tile, n=n)


def _permutation(num_rows: int, tile_rows: int, device: torch.device) -> Permutation:
    """Return a permutation without an order: rows stay in place, all tiles are in use."""

    def int32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    tiles = int32(3, cdiv(num_rows, tile_rows))
    return Permutation(int32(num_rows), int32(num_rows, 1), int32(2), tiles, None)
