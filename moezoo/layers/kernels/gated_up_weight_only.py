"""gated_up_weight_only: `gated_up` for weights of 4 and 8 bits.

    h[r] = act(w13[e][:I] @ x[t] + bias) * (w13[e][I:] @ x[t] + bias)
    t = order[r] // K,  e the expert with offsets[e] <= r < offsets[e+1]

x and h have their columns in the order of `interleave`; `packed_operand` says what is rounded.

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token, S = T*K rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.kernels.gated_up import activate, activate_gated, gated_up_ref
from moezoo.layers.kernels.interleave import interleave_ref, padded
from moezoo.layers.kernels.overlap import wait
from moezoo.layers.kernels.packed_operand import in_order, packed_operand, ways
from moezoo.layers.kernels.packed_products import out_of_turns, products
from moezoo.layers.kernels.permute import Permutation
from moezoo.layers.kernels.tiles import Tile, descriptor, load_tile, own_tile, swizzle
from moezoo.layers.kernels.unpack import CHUNK
from moezoo.layers.quant import WeightOnly


def gated_up_weight_only_ref(
    x: Tensor,
    w13: WeightOnly,
    permutation: Permutation,
    *,
    k: int,
    tile: Tile | None = None,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
) -> Tensor:
    x, w = in_order(x, type(w13), w13.shape[-1]), w13.dequantize()
    h = gated_up_ref(x, w, permutation, k=k, activation=activation, bias13=bias13)
    return interleave_ref(h, ways(type(w13), h.shape[1]))


@triton.jit
def _gated_up_tile(
    expert,
    first_row,
    end,
    first_col,
    x_ptr,
    w,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    h_ptr,
    order_ptr,
    stride_xt,
    num_words,
    intermediate_size,
    stride_hr,
    k,
    stride_we,
    stride_wp,
    stride_wn,
    stride_se,
    stride_sp,
    stride_sn,
    stride_be,
    stride_bp,
    stride_bn,
    FORMAT: tl.constexpr,
    WAYS: tl.constexpr,
    H_WAYS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES_ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    CHAIN: tl.constexpr,
    SCALES_AT_ONCE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
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
    m_cols = cols < intermediate_size
    tokens = (tl.load(order_ptr + rows, mask=m_rows, other=0) // k).to(tl.int64)
    # fmt: off
    parts = products(
        expert, first_col, intermediate_size, 0, None, x_ptr + tokens * stride_xt, m_rows, w,
        scales_ptr, zeros_ptr, num_words, stride_we, stride_wp, stride_wn, stride_se, stride_sp,
        stride_sn, x_ptr.dtype.element_ty, FORMAT, WAYS, PARTS, HAS_ZEROS, GROUP, SCALES_ALIGNED,
        SLICES, CHAIN, SCALES_AT_ONCE, DESCRIPTORS, False, EVEN_K, PAIRS, BLOCK_M, BLOCK_N, BLOCK_W,
    )
    # fmt: on
    if HAS_BIAS:
        p_bias = bias_ptr + expert.to(tl.int64) * stride_be + cols * stride_bn
        bias = tl.load(p_bias, mask=m_cols, other=0.0).to(tl.float32)[:, None]
    if PARTS == 2:
        gate, up = out_of_turns(parts)
        if HAS_BIAS:
            gate += bias
            up += tl.load(p_bias + stride_bp, mask=m_cols, other=0.0).to(tl.float32)[:, None]
        h = activate_gated(gate, up, ACTIVATION, LIMIT, UP_OFFSET)
    else:
        if HAS_BIAS:
            parts += bias
        h = activate(parts, ACTIVATION)
    h = tl.where(m_cols[:, None], h, 0.0).to(h_ptr.dtype.element_ty)
    chunks = tl.reshape(h, [BLOCK_N // (CHUNK * H_WAYS), CHUNK, H_WAYS, BLOCK_M])
    h = tl.reshape(tl.permute(chunks, [0, 2, 1, 3]), [BLOCK_N, BLOCK_M])
    p_h = h_ptr + rows.to(tl.int64)[None, :] * stride_hr + cols[:, None]
    tl.store(p_h, h, mask=m_rows[None, :] & (cols < stride_hr)[:, None])


@triton.jit(do_not_specialize=["max_tiles", "k"])
def _gated_up_weight_only_kernel(
    x_ptr,
    w,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    h_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    max_tiles,
    stride_xt,
    num_words,
    intermediate_size,
    stride_hr,
    k,
    stride_we,
    stride_wp,
    stride_wn,
    stride_se,
    stride_sp,
    stride_sn,
    stride_be,
    stride_bp,
    stride_bn,
    FORMAT: tl.constexpr,
    WAYS: tl.constexpr,
    H_WAYS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES_ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    CHAIN: tl.constexpr,
    SCALES_AT_ONCE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
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
    wait(OVERLAP)
    num_tiles = tl.load(num_tiles_ptr)
    if DIRECT:
        tile, pid_n, expert, first_row, end = own_tile(tiles_ptr, max_tiles)
        if tile < num_tiles:
            first_col = pid_n * BLOCK_N
            # fmt: off
            _gated_up_tile(
                expert, first_row, end, first_col, x_ptr, w, scales_ptr, zeros_ptr, bias_ptr, h_ptr,
                order_ptr, stride_xt, num_words, intermediate_size, stride_hr, k, stride_we,
                stride_wp, stride_wn, stride_se, stride_sp, stride_sn, stride_be, stride_bp,
                stride_bn, FORMAT, WAYS, H_WAYS, PARTS, HAS_ZEROS, GROUP, SCALES_ALIGNED, SLICES,
                CHAIN, SCALES_AT_ONCE, ACTIVATION, LIMIT, UP_OFFSET, HAS_BIAS, DESCRIPTORS, EVEN_K,
                PAIRS, BLOCK_M, BLOCK_N, BLOCK_W,
            )
            # fmt: on
    else:
        num_n = tl.cdiv(intermediate_size, BLOCK_N)
        num_programs = tl.num_programs(0)
        for pid in tl.range(tl.program_id(0), num_tiles * num_n, num_programs, flatten=FLATTEN):
            tile, pid_n = swizzle(pid, num_tiles, num_n, GROUP_M)
            expert, first_row, end = load_tile(tiles_ptr + tile, max_tiles)
            first_col = pid_n * BLOCK_N
            # fmt: off
            if TAIL > 0 and end - first_row <= TAIL:
                _gated_up_tile(
                    expert, first_row, end, first_col, x_ptr, w, scales_ptr, zeros_ptr, bias_ptr,
                    h_ptr, order_ptr, stride_xt, num_words, intermediate_size, stride_hr, k,
                    stride_we, stride_wp, stride_wn, stride_se, stride_sp, stride_sn, stride_be,
                    stride_bp, stride_bn, FORMAT, WAYS, H_WAYS, PARTS, HAS_ZEROS, GROUP,
                    SCALES_ALIGNED, SLICES, CHAIN, SCALES_AT_ONCE, ACTIVATION, LIMIT, UP_OFFSET,
                    HAS_BIAS, DESCRIPTORS, EVEN_K, PAIRS, TAIL, BLOCK_N, BLOCK_W,
                )
            else:
                _gated_up_tile(
                    expert, first_row, end, first_col, x_ptr, w, scales_ptr, zeros_ptr, bias_ptr,
                    h_ptr, order_ptr, stride_xt, num_words, intermediate_size, stride_hr, k,
                    stride_we, stride_wp, stride_wn, stride_se, stride_sp, stride_sn, stride_be,
                    stride_bp, stride_bn, FORMAT, WAYS, H_WAYS, PARTS, HAS_ZEROS, GROUP,
                    SCALES_ALIGNED, SLICES, CHAIN, SCALES_AT_ONCE, ACTIVATION, LIMIT, UP_OFFSET,
                    HAS_BIAS, DESCRIPTORS, EVEN_K, PAIRS, BLOCK_M, BLOCK_N, BLOCK_W,
                )
            # fmt: on


def gated_up_weight_only(
    x: Tensor,
    w13: WeightOnly,
    permutation: Permutation,
    *,
    k: int,
    tile: Tile,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
) -> Tensor:
    """Return h [S, P] in x's dtype, rows in expert order, columns in the order of `interleave`.

    P is I padded as `interleave` does. Rows from offsets[E] on are not written.

    x as `interleave` made it for `ways` of w13, from [T, H] fp32, bf16 or fp16; w13 [E, 2, I, H],
    or without a gate [E, 1, I, H], and bias13 [E, 2 or 1, I]. `permutation` has `tile.m` rows a
    tile.

    Raises ValueError for shapes or strides that do not fit, for weights whose columns have an order
    of their own, and for an unknown activation.
    """
    gating = Gating.of(activation)
    if w13.data.ndim != 4 or w13.shape[1] not in (1, 2):
        raise ValueError(f"w13 must be [E, 2 or 1, I, H], got {list(w13.shape)}")
    num_experts, num_parts, intermediate_size, hidden_size = w13.shape
    order, _, offsets, tiles, num_tiles = permutation
    x_width = padded(hidden_size, ways(type(w13), hidden_size))
    if x.ndim != 2 or x.shape[1] != x_width or not x.is_contiguous():
        raise ValueError(
            f"x must be [T, {x_width}] as w13 is, and contiguous, got {list(x.shape)} with strides "
            f"{x.stride()}"
        )
    if order.numel() != x.shape[0] * k or offsets.numel() != num_experts + 1:
        raise ValueError(
            f"order must be [{x.shape[0] * k}] and offsets [{num_experts + 1}], got "
            f"{list(order.shape)} and {list(offsets.shape)}"
        )
    if bias13 is not None and bias13.shape != w13.shape[:-1]:
        raise ValueError(f"bias13 must be {list(w13.shape[:-1])}, got {list(bias13.shape)}")
    packed = packed_operand("w13", w13, x, tile)
    h_ways = ways(type(w13), intermediate_size)
    width = padded(intermediate_size, h_ways)
    h = torch.empty(order.numel(), width, dtype=x.dtype, device=x.device)
    grid = tile.grid(tiles.shape[1], intermediate_size, x.device)
    if 0 in grid:
        return h
    words, options = packed.words, packed.options
    block = (1, num_parts, tile.n, options["BLOCK_W"])
    _gated_up_weight_only_kernel[grid](
        x,
        descriptor(words, block) if tile.descriptors else words,
        packed.scales,
        packed.zeros,
        bias13,
        h,
        order,
        tiles,
        num_tiles,
        tiles.shape[1],
        x.stride(0),
        words.shape[-1],
        intermediate_size,
        width,
        k,
        *words.stride()[:-1],
        *packed.scales.stride()[:-1],
        *((0, 0, 0) if bias13 is None else bias13.stride()),
        H_WAYS=h_ways,
        PARTS=num_parts,
        ACTIVATION=ACTIVATIONS[gating.activation].__name__,
        LIMIT=gating.limit,
        UP_OFFSET=gating.up_offset,
        HAS_BIAS=bias13 is not None,
        **options,
    )
    return h
