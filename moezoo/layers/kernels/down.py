"""down: the second grouped product, its rows still in expert order.

    y[r] = w2[e] @ h[r] + bias,  e the expert with offsets[e] <= r < offsets[e+1]

Products accumulate in fp32, y is rounded once.

Legend: H hidden, I expert intermediate, E experts, S rows, N most tiles (see `permute`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.permute import Permutation
from moezoo.layers.kernels.tiles import Tile, descriptor, load_tile, own_tile, swizzle


def down_ref(
    h: Tensor,
    w2: Tensor,
    permutation: Permutation,
    *,
    tile: Tile | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    y = h.new_zeros(len(h), w2.shape[1])
    for e in range(w2.shape[0]):
        rows = slice(int(permutation.offsets[e]), int(permutation.offsets[e + 1]))
        y_e = h[rows].float() @ w2[e].float().T
        if bias2 is not None:
            y_e += bias2[e].float()
        y[rows] = y_e.to(y.dtype)
    return y


@triton.jit
def _rows_times_columns(
    expert,
    first_row,
    end,
    first_col,
    h,
    w,
    bias_ptr,
    y_ptr,
    intermediate_size,
    hidden_size,
    stride_we,
    stride_wn,
    stride_wi,
    stride_be,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = first_row + tl.arange(0, BLOCK_M)
    m_rows = rows < end
    cols = first_col + tl.arange(0, BLOCK_N)
    m_cols = cols < hidden_size
    inner = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read a valid row and column 0, or rows of the next expert, and
    # are not stored.
    if not DESCRIPTORS:
        h_rows = tl.where(m_rows, rows, first_row).to(tl.int64)
        p_h = h + h_rows[:, None] * intermediate_size + inner[None, :]
        w_cols = tl.where(m_cols, cols, 0).to(tl.int64)
        o_w = expert.to(tl.int64) * stride_we + w_cols * stride_wn
        p_w = w + o_w[:, None] + inner[None, :] * stride_wi

    if WEIGHTS_FIRST:
        y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, intermediate_size, BLOCK_K):
        if DESCRIPTORS:
            b_h = h.load([first_row, start])
            b_w = tl.reshape(w.load([expert, first_col, start]), [BLOCK_N, BLOCK_K])
        else:
            if EVEN_K:
                b_h = tl.load(p_h)
                b_w = tl.load(p_w)
            else:
                m_inner = (start + inner < intermediate_size)[None, :]
                b_h = tl.load(p_h, mask=m_inner, other=0.0)
                b_w = tl.load(p_w, mask=m_inner, other=0.0)
            p_h += BLOCK_K
            p_w += BLOCK_K * stride_wi
        if WEIGHTS_FIRST:
            y = tl.dot(b_w, b_h.T, y, input_precision="ieee")
        else:
            y = tl.dot(b_h, b_w.T, y, input_precision="ieee")

    if HAS_BIAS:
        p_bias = bias_ptr + expert.to(tl.int64) * stride_be + cols * stride_bn
        bias = tl.load(p_bias, mask=m_cols, other=0.0).to(tl.float32)
        y += bias[:, None] if WEIGHTS_FIRST else bias[None, :]
    if WEIGHTS_FIRST:
        o_y = rows.to(tl.int64)[None, :] * hidden_size + cols[:, None]
        m_y = m_rows[None, :] & m_cols[:, None]
    else:
        o_y = rows.to(tl.int64)[:, None] * hidden_size + cols[None, :]
        m_y = m_rows[:, None] & m_cols[None, :]
    tl.store(y_ptr + o_y, y.to(y_ptr.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["max_tiles"])
def _down_kernel(
    h,
    h_tail,
    w,
    bias_ptr,
    y_ptr,
    tiles_ptr,
    num_tiles_ptr,
    max_tiles,
    intermediate_size,
    hidden_size,
    stride_we,
    stride_wn,
    stride_wi,
    stride_be,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    DIRECT: tl.constexpr,
    FLATTEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    num_tiles = tl.load(num_tiles_ptr)
    if DIRECT:
        tile, pid_n, expert, first_row, end = own_tile(tiles_ptr, max_tiles)
        if tile < num_tiles:
            first_col = pid_n * BLOCK_N
            # fmt: off
            _rows_times_columns(
                expert, first_row, end, first_col, h, w, bias_ptr, y_ptr, intermediate_size,
                hidden_size, stride_we, stride_wn, stride_wi, stride_be, stride_bn, HAS_BIAS,
                DESCRIPTORS, EVEN_K, WEIGHTS_FIRST, BLOCK_M, BLOCK_N, BLOCK_K,
            )
            # fmt: on
    else:
        num_n = tl.cdiv(hidden_size, BLOCK_N)
        num_programs = tl.num_programs(0)
        for pid in tl.range(tl.program_id(0), num_tiles * num_n, num_programs, flatten=FLATTEN):
            tile, pid_n = swizzle(pid, num_tiles, num_n, GROUP_M)
            expert, first_row, end = load_tile(tiles_ptr + tile, max_tiles)
            first_col = pid_n * BLOCK_N
            # fmt: off
            if TAIL > 0 and end - first_row <= TAIL:
                _rows_times_columns(
                    expert, first_row, end, first_col, h_tail, w, bias_ptr, y_ptr,
                    intermediate_size, hidden_size, stride_we, stride_wn, stride_wi, stride_be,
                    stride_bn, HAS_BIAS, DESCRIPTORS, EVEN_K, WEIGHTS_FIRST, TAIL, BLOCK_N, BLOCK_K,
                )
            else:
                _rows_times_columns(
                    expert, first_row, end, first_col, h, w, bias_ptr, y_ptr, intermediate_size,
                    hidden_size, stride_we, stride_wn, stride_wi, stride_be, stride_bn, HAS_BIAS,
                    DESCRIPTORS, EVEN_K, WEIGHTS_FIRST, BLOCK_M, BLOCK_N, BLOCK_K,
                )
            # fmt: on


def down(
    h: Tensor,
    w2: Tensor,
    permutation: Permutation,
    *,
    tile: Tile,
    bias2: Tensor | None = None,
) -> Tensor:
    """Return y [S, H] in h's dtype, rows in expert order; rows from offsets[E] on are not written.

    h [S, I] contiguous, rows in expert order; w2 [E, H, I] and bias2 [E, H] of h's dtype and any
    strides; `permutation` as `permute` made it with `tile.m` rows a tile.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    num_experts, hidden_size, intermediate_size = w2.shape
    order, _, offsets, tiles, num_tiles = permutation
    if w2.dtype != h.dtype or h.shape != (order.numel(), intermediate_size):
        raise ValueError(
            f"h must be [{order.numel()}, {intermediate_size}] {w2.dtype}, as order and w2 are, "
            f"got {list(h.shape)} {h.dtype}"
        )
    if not h.is_contiguous():
        raise ValueError(f"h must be contiguous, got strides {h.stride()}")
    if offsets.numel() != num_experts + 1:
        raise ValueError(f"offsets must be [{num_experts + 1}], got {list(offsets.shape)}")
    if bias2 is not None and bias2.shape != w2.shape[:2]:
        raise ValueError(f"bias2 must be {list(w2.shape[:2])}, got {list(bias2.shape)}")
    y = torch.empty(order.numel(), hidden_size, dtype=h.dtype, device=h.device)
    grid = tile.grid(tiles.shape[1], hidden_size, h.device)
    if 0 in grid:
        return y
    if tile.descriptors:
        rows = descriptor(h, (tile.m, tile.k))
        tail_rows = descriptor(h, (tile.tail, tile.k)) if tile.tail else rows
        w = descriptor(w2, (1, tile.n, tile.k))
    else:
        rows, tail_rows, w = h, h, w2
    _down_kernel[grid](
        rows,
        tail_rows,
        w,
        bias2,
        y,
        tiles,
        num_tiles,
        tiles.shape[1],
        intermediate_size,
        hidden_size,
        *w2.stride(),
        *((0, 0) if bias2 is None else bias2.stride()),
        HAS_BIAS=bias2 is not None,
        DESCRIPTORS=tile.descriptors,
        EVEN_K=intermediate_size % tile.k == 0,
        WEIGHTS_FIRST=tile.weights_first,
        DIRECT=tile.direct,
        FLATTEN=tile.flattened,
        GROUP_M=tile.group_m,
        TAIL=tile.tail,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(h.device, persistent=tile.persistent),
    )
    return y
