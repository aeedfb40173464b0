"""down_fp8: `down` in fp8, with a scale per block or per row of w2.

    y[r] = w2[e] @ h[r] + bias,  e the expert with offsets[e] <= r < offsets[e+1]

Products accumulate in the matrix units for 128 of I (see `gated_up_fp8`), then are scaled and added
in fp32; a scale per row multiplies their sum. y is rounded once. A tile of 256 columns is two
products of 128.

Legend: H hidden, I expert intermediate, E experts, S rows, N most tiles (see `permute`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.down import down_ref
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.permute import Permutation
from moezoo.layers.kernels.tiles import Tile, descriptor, load_tile, own_tile, swizzle
from moezoo.layers.quant.channel_fp8 import ChannelFp8, Fp8Weights
from moezoo.layers.quant.fp8 import BLOCK, Fp8Rows, blocks


def down_fp8_ref(
    h: Fp8Rows,
    w2: Fp8Weights,
    permutation: Permutation,
    *,
    dtype: torch.dtype,
    tile: Tile | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    rows = h.dequantize()[:, : w2.shape[-1]]
    return down_ref(rows, w2.dequantize(), permutation, bias2=bias2).to(dtype)


@triton.jit
def _store(
    y,
    rows,
    m_rows,
    cols,
    expert,
    bias_ptr,
    y_ptr,
    hidden_size,
    stride_be,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):
    m_cols = cols < hidden_size
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


@triton.jit
def _rows_times_columns(
    expert,
    first_row,
    end,
    first_col,
    h,
    h_scales_ptr,
    w,
    w_scales_ptr,
    bias_ptr,
    y_ptr,
    intermediate_size,
    hidden_size,
    stride_hs,
    stride_we,
    stride_wn,
    stride_wi,
    stride_se,
    stride_sn,
    stride_si,
    stride_be,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    PER_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A block of weights has one scale, so wider tiles are two halves.
    HALVES: tl.constexpr = 2 if BLOCK_N > BLOCK_K else 1
    WIDTH: tl.constexpr = BLOCK_N // HALVES
    rows = first_row + tl.arange(0, BLOCK_M)
    m_rows = rows < end
    cols = first_col + tl.arange(0, WIDTH)
    inner = tl.arange(0, BLOCK_K)
    p_h_scales = h_scales_ptr + rows
    p_w_scales = w_scales_ptr + expert.to(tl.int64) * stride_se + first_col // BLOCK_K * stride_sn
    # The second half may lie past the end: it then takes the first one's scale for its zeros.
    o_second = tl.where(first_col + WIDTH < hidden_size, stride_sn, 0)
    # Rows and columns past the end read a valid row and column 0, or rows of the next expert, and
    # are not stored.
    if not DESCRIPTORS:
        padded = tl.cdiv(intermediate_size, BLOCK_K) * BLOCK_K
        h_rows = tl.where(m_rows, rows, first_row).to(tl.int64)
        p_h = h + h_rows[:, None] * padded + inner[None, :]
        w_cols = tl.where(cols < hidden_size, cols, 0).to(tl.int64)
        o_w = expert.to(tl.int64) * stride_we + inner[None, :] * stride_wi
        p_w = w + o_w + w_cols[:, None] * stride_wn
        if HALVES == 2:
            second_cols = tl.where(cols + WIDTH < hidden_size, cols + WIDTH, 0).to(tl.int64)
            p_second = w + o_w + second_cols[:, None] * stride_wn

    if WEIGHTS_FIRST:
        y = tl.zeros([WIDTH, BLOCK_M], tl.float32)
    else:
        y = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    second = y
    for start in range(0, intermediate_size, BLOCK_K):
        h_scales = tl.load(p_h_scales, mask=m_rows, other=0.0)
        w_scale = 1.0 if PER_ROW else tl.load(p_w_scales)
        if DESCRIPTORS:
            b_h = h.load([first_row, start])
            b_w = tl.reshape(w.load([expert, first_col, start]), [WIDTH, BLOCK_K])
        else:
            b_h = tl.load(p_h)
            if EVEN_K:
                b_w = tl.load(p_w)
            else:
                m_inner = (start + inner < intermediate_size)[None, :]
                b_w = tl.load(p_w, mask=m_inner, other=0.0)
            p_h += BLOCK_K
            p_w += BLOCK_K * stride_wi
        if WEIGHTS_FIRST:
            y += tl.dot(b_w, b_h.T) * (h_scales * w_scale)[None, :]
        else:
            y += tl.dot(b_h, b_w.T) * (h_scales * w_scale)[:, None]
        if HALVES == 2:
            second_scale = 1.0 if PER_ROW else tl.load(p_w_scales + o_second)
            if DESCRIPTORS:
                b_second = tl.reshape(w.load([expert, first_col + WIDTH, start]), [WIDTH, BLOCK_K])
            else:
                if EVEN_K:
                    b_second = tl.load(p_second)
                else:
                    m_inner = (start + inner < intermediate_size)[None, :]
                    b_second = tl.load(p_second, mask=m_inner, other=0.0)
                p_second += BLOCK_K * stride_wi
            if WEIGHTS_FIRST:
                second += tl.dot(b_second, b_h.T) * (h_scales * second_scale)[None, :]
            else:
                second += tl.dot(b_h, b_second.T) * (h_scales * second_scale)[:, None]
        p_h_scales += stride_hs
        p_w_scales += stride_si

    if PER_ROW:
        p_w_scales = w_scales_ptr + expert.to(tl.int64) * stride_se
        scales = tl.load(p_w_scales + cols * stride_sn, mask=cols < hidden_size, other=0.0)
        y *= scales[:, None] if WEIGHTS_FIRST else scales[None, :]
        if HALVES == 2:
            p_second_scales = p_w_scales + (cols + WIDTH) * stride_sn
            scales = tl.load(p_second_scales, mask=cols + WIDTH < hidden_size, other=0.0)
            second *= scales[:, None] if WEIGHTS_FIRST else scales[None, :]
    # fmt: off
    _store(
        y, rows, m_rows, cols, expert, bias_ptr, y_ptr, hidden_size, stride_be, stride_bn,
        HAS_BIAS, WEIGHTS_FIRST,
    )
    if HALVES == 2:
        _store(
            second, rows, m_rows, cols + WIDTH, expert, bias_ptr, y_ptr, hidden_size, stride_be,
            stride_bn, HAS_BIAS, WEIGHTS_FIRST,
        )
    # fmt: on


SCALE_STRIDES = ["stride_se", "stride_sn", "stride_si", "stride_hs"]


# Scales are read one at a time: there is nothing to gain from knowing their strides.
@triton.jit(do_not_specialize=["max_tiles", *SCALE_STRIDES])
def _down_fp8_kernel(
    h,
    h_tail,
    h_scales_ptr,
    w,
    w_scales_ptr,
    bias_ptr,
    y_ptr,
    tiles_ptr,
    num_tiles_ptr,
    max_tiles,
    intermediate_size,
    hidden_size,
    stride_hs,
    stride_we,
    stride_wn,
    stride_wi,
    stride_se,
    stride_sn,
    stride_si,
    stride_be,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    PER_ROW: tl.constexpr,
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
    num_tiles = max_tiles if num_tiles_ptr is None else tl.load(num_tiles_ptr)
    if DIRECT:
        tile, pid_n, expert, first_row, end = own_tile(tiles_ptr, max_tiles)
        if tile < num_tiles:
            first_col = pid_n * BLOCK_N
            # fmt: off
            _rows_times_columns(
                expert, first_row, end, first_col, h, h_scales_ptr, w, w_scales_ptr, bias_ptr,
                y_ptr, intermediate_size, hidden_size, stride_hs, stride_we, stride_wn, stride_wi,
                stride_se, stride_sn, stride_si, stride_be, stride_bn, HAS_BIAS, PER_ROW,
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
                    expert, first_row, end, first_col, h_tail, h_scales_ptr, w, w_scales_ptr,
                    bias_ptr, y_ptr, intermediate_size, hidden_size, stride_hs, stride_we,
                    stride_wn, stride_wi, stride_se, stride_sn, stride_si, stride_be, stride_bn,
                    HAS_BIAS, PER_ROW, DESCRIPTORS, EVEN_K, WEIGHTS_FIRST, TAIL, BLOCK_N, BLOCK_K,
                )
            else:
                _rows_times_columns(
                    expert, first_row, end, first_col, h, h_scales_ptr, w, w_scales_ptr, bias_ptr,
                    y_ptr, intermediate_size, hidden_size, stride_hs, stride_we, stride_wn,
                    stride_wi, stride_se, stride_sn, stride_si, stride_be, stride_bn, HAS_BIAS,
                    PER_ROW, DESCRIPTORS, EVEN_K, WEIGHTS_FIRST, BLOCK_M, BLOCK_N, BLOCK_K,
                )
            # fmt: on


def down_fp8(
    h: Fp8Rows,
    w2: Fp8Weights,
    permutation: Permutation,
    *,
    dtype: torch.dtype,
    tile: Tile,
    bias2: Tensor | None = None,
) -> Tensor:
    """Return y [S, H] in `dtype`, rows in expert order; rows from offsets[E] on are not written.

    h as `gated_up_fp8` made it, w2 [E, H, I] and bias2 [E, H] of any strides. `permutation` has
    `tile.m` rows a tile; `tile.k` is 128 and `tile.n` 64, 128 or 256.

    Raises ValueError for shapes that do not fit.
    """
    if w2.data.ndim != 3:
        raise ValueError(f"w2 must be [E, H, I], got {list(w2.shape)}")
    num_experts, hidden_size, intermediate_size = w2.shape
    order, _, offsets, tiles, num_tiles = permutation
    num_rows, num_groups = order.numel(), blocks(intermediate_size)
    if h.data.shape != (num_rows, num_groups * BLOCK) or h.scales.shape != (num_rows, num_groups):
        raise ValueError(
            f"h must be [{num_rows}, {num_groups * BLOCK}] with scales [{num_rows}, {num_groups}], "
            f"as order and w2 are, got {list(h.data.shape)} and {list(h.scales.shape)}"
        )
    if not h.data.is_contiguous() or not h.scales.mT.is_contiguous():
        raise ValueError("h and its transposed scales must be contiguous")
    if offsets.numel() != num_experts + 1:
        raise ValueError(f"offsets must be [{num_experts + 1}], got {list(offsets.shape)}")
    if bias2 is not None and bias2.shape != w2.shape[:2]:
        raise ValueError(f"bias2 must be {list(w2.shape[:2])}, got {list(bias2.shape)}")
    if tile.k != BLOCK or tile.n not in (BLOCK // 2, BLOCK, 2 * BLOCK):
        raise ValueError(f"tile.k must be {BLOCK} and tile.n 64, 128 or 256, got {tile}")
    y = torch.empty(num_rows, hidden_size, dtype=dtype, device=h.data.device)
    grid = tile.grid(tiles.shape[1], hidden_size, y.device)
    if 0 in grid:
        return y
    per_row = isinstance(w2, ChannelFp8)
    if tile.descriptors:
        rows = descriptor(h.data, (tile.m, tile.k))
        tail_rows = descriptor(h.data, (tile.tail, tile.k)) if tile.tail else rows
        w = descriptor(w2.data, (1, min(tile.n, BLOCK), tile.k))
    else:
        rows, tail_rows, w = h.data, h.data, w2.data
    _down_fp8_kernel[grid](
        rows,
        tail_rows,
        h.scales,
        w,
        w2.scales,
        bias2,
        y,
        tiles,
        num_tiles,
        tiles.shape[1],
        intermediate_size,
        hidden_size,
        h.scales.stride(1),
        *w2.data.stride(),
        *w2.scales.stride(),
        *((0,) if per_row else ()),
        *((0, 0) if bias2 is None else bias2.stride()),
        HAS_BIAS=bias2 is not None,
        PER_ROW=per_row,
        DESCRIPTORS=tile.descriptors,
        EVEN_K=tile.descriptors or intermediate_size % tile.k == 0,
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
        **launch_options(y.device, persistent=tile.persistent),
    )
    return y
