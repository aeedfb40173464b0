"""down_weight_only: `down` for weights of 4 and 8 bits.

    y[r] = w2[e] @ h[r] + bias
    e the expert with offsets[e] <= r < offsets[e+1]

h has its columns in the order of `interleave`; `packed_operand` says what is rounded.

Legend: H hidden, I expert intermediate, E experts, S chosen rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.down import down_ref
from moezoo.layers.kernels.interleave import padded
from moezoo.layers.kernels.overlap import start_next, wait_for_previous
from moezoo.layers.kernels.packed_operand import in_order, packed_operand, ways
from moezoo.layers.kernels.packed_products import products
from moezoo.layers.kernels.permute import Permutation
from moezoo.layers.kernels.tiles import Tile, descriptor, load_tile, own_tile, swizzle
from moezoo.layers.quant import WeightOnly


def down_weight_only_ref(
    h: Tensor,
    w2: WeightOnly,
    permutation: Permutation,
    *,
    tile: Tile | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    h = in_order(h, type(w2), w2.shape[-1])
    return down_ref(h, w2.dequantize(), permutation, bias2=bias2)


@triton.jit
def _down_tile(
    expert,
    first_row,
    end,
    first_col,
    h,
    w,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    stride_hr,
    num_words,
    hidden_size,
    stride_we,
    stride_wp,
    stride_wn,
    stride_se,
    stride_sp,
    stride_sn,
    stride_be,
    stride_bn,
    FORMAT: tl.constexpr,
    WAYS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES_ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    CHAIN: tl.constexpr,
    SCALES_AT_ONCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    rows = first_row + tl.arange(0, BLOCK_M)
    m_rows = rows < end
    cols = first_col + tl.arange(0, BLOCK_N)
    m_cols = cols < hidden_size
    p_rows = None if DESCRIPTORS else h + rows.to(tl.int64) * stride_hr
    # fmt: off
    y = products(
        expert, first_col, hidden_size, first_row, h, p_rows, m_rows, w, scales_ptr, zeros_ptr,
        num_words, stride_we, stride_wp, stride_wn, stride_se, stride_sp, stride_sn,
        y_ptr.dtype.element_ty, FORMAT, WAYS, 1, HAS_ZEROS, GROUP, SCALES_ALIGNED, SLICES, CHAIN,
        SCALES_AT_ONCE, DESCRIPTORS, DESCRIPTORS, EVEN_K, PAIRS, BLOCK_M, BLOCK_N, BLOCK_W,
    )
    # fmt: on
    if HAS_BIAS:
        p_bias = bias_ptr + expert.to(tl.int64) * stride_be + cols * stride_bn
        y += tl.load(p_bias, mask=m_cols, other=0.0).to(tl.float32)[:, None]
    p_y = y_ptr + rows.to(tl.int64)[None, :] * hidden_size + cols[:, None]
    tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=m_rows[None, :] & m_cols[:, None])


@triton.jit(do_not_specialize=["max_tiles"])
def _down_weight_only_kernel(
    h,
    h_tail,
    w,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    tiles_ptr,
    num_tiles_ptr,
    max_tiles,
    stride_hr,
    num_words,
    hidden_size,
    stride_we,
    stride_wp,
    stride_wn,
    stride_se,
    stride_sp,
    stride_sn,
    stride_be,
    stride_bn,
    FORMAT: tl.constexpr,
    WAYS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES_ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    CHAIN: tl.constexpr,
    SCALES_AT_ONCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr,
    DIRECT: tl.constexpr,
    FLATTEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    if num_tiles_ptr is None:
        wait_for_previous(OVERLAP)
        num_tiles = max_tiles
    else:
        # What counted the tiles had finished before the first product let this one start.
        num_tiles = tl.load(num_tiles_ptr)
    if DIRECT:
        tile, pid_n, expert, first_row, end = own_tile(tiles_ptr, max_tiles)
    if num_tiles_ptr is not None:
        wait_for_previous(OVERLAP)
    if DIRECT:
        if tile < num_tiles:
            first_col = pid_n * BLOCK_N
            # fmt: off
            _down_tile(
                expert, first_row, end, first_col, h, w, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
                stride_hr, num_words, hidden_size, stride_we, stride_wp, stride_wn, stride_se,
                stride_sp, stride_sn, stride_be, stride_bn, FORMAT, WAYS, HAS_ZEROS, GROUP,
                SCALES_ALIGNED, SLICES, CHAIN, SCALES_AT_ONCE, HAS_BIAS, DESCRIPTORS, EVEN_K, PAIRS,
                BLOCK_M, BLOCK_N, BLOCK_W,
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
                _down_tile(
                    expert, first_row, end, first_col, h_tail, w, scales_ptr, zeros_ptr, bias_ptr,
                    y_ptr, stride_hr, num_words, hidden_size, stride_we, stride_wp, stride_wn,
                    stride_se, stride_sp, stride_sn, stride_be, stride_bn, FORMAT, WAYS, HAS_ZEROS,
                    GROUP, SCALES_ALIGNED, SLICES, CHAIN, SCALES_AT_ONCE, HAS_BIAS, DESCRIPTORS,
                    EVEN_K, PAIRS, TAIL, BLOCK_N, BLOCK_W,
                )
            else:
                _down_tile(
                    expert, first_row, end, first_col, h, w, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
                    stride_hr, num_words, hidden_size, stride_we, stride_wp, stride_wn, stride_se,
                    stride_sp, stride_sn, stride_be, stride_bn, FORMAT, WAYS, HAS_ZEROS, GROUP,
                    SCALES_ALIGNED, SLICES, CHAIN, SCALES_AT_ONCE, HAS_BIAS, DESCRIPTORS, EVEN_K,
                    PAIRS, BLOCK_M, BLOCK_N, BLOCK_W,
                )
            # fmt: on


def down_weight_only(
    h: Tensor,
    w2: WeightOnly,
    permutation: Permutation,
    *,
    tile: Tile,
    bias2: Tensor | None = None,
) -> Tensor:
    """Return y [S, H] in h's dtype, rows in expert order; rows from offsets[E] on are not written.

    h [S, P] as `gated_up_weight_only` made it, w2 [E, H, I] and bias2 [E, H]; `permutation` has
    `tile.m` rows a tile. Between the launch that counted the tiles and this one lies another, which
    begins with `wait`; tiles that nobody counted are read after waiting.

    Raises ValueError as `gated_up_weight_only` does.
    """
    if w2.data.ndim != 3:
        raise ValueError(f"w2 must be [E, H, I], got {list(w2.shape)}")
    num_experts, hidden_size, intermediate_size = w2.shape
    order, _, offsets, tiles, num_tiles = permutation
    width = padded(intermediate_size, ways(type(w2), intermediate_size))
    if h.shape != (order.numel(), width) or not h.is_contiguous():
        raise ValueError(
            f"h must be [{order.numel()}, {width}], as order and w2 are, and contiguous, got "
            f"{list(h.shape)} with strides {h.stride()}"
        )
    if offsets.numel() != num_experts + 1:
        raise ValueError(f"offsets must be [{num_experts + 1}], got {list(offsets.shape)}")
    if bias2 is not None and bias2.shape != w2.shape[:2]:
        raise ValueError(f"bias2 must be {list(w2.shape[:2])}, got {list(bias2.shape)}")
    packed = packed_operand("w2", w2.map(lambda tensor: tensor.unsqueeze(1)), h, tile)
    y = torch.empty(order.numel(), hidden_size, dtype=h.dtype, device=h.device)
    grid = tile.grid(tiles.shape[1], hidden_size, h.device)
    if 0 in grid:
        return y
    words, options = packed.words, packed.options
    block = (1, 1, tile.n, options["BLOCK_W"])
    rows = tail_rows = h
    if tile.descriptors:
        columns = tile.k // options["SLICES"]
        rows = descriptor(h, (tile.m, columns))
        tail_rows = descriptor(h, (tile.tail, columns)) if tile.tail else rows
    _down_weight_only_kernel[grid](
        rows,
        tail_rows,
        descriptor(words, block) if tile.descriptors else words,
        packed.scales,
        packed.zeros,
        bias2,
        y,
        tiles,
        num_tiles,
        tiles.shape[1],
        width,
        words.shape[-1],
        hidden_size,
        *words.stride()[:-1],
        *packed.scales.stride()[:-1],
        *((0, 0) if bias2 is None else bias2.stride()),
        HAS_BIAS=bias2 is not None,
        **options,
    )
    return y
