"""gated_up_weight_only and down_weight_only: `gated_up` and `down` for weights of 4 and 8 bits.

    h[r] = act(w13[e][:I] @ x[t] + bias) * (w13[e][I:] @ x[t] + bias)
    y[r] = w2[e] @ h[r] + bias
    t = order[r] // K,  e the expert with offsets[e] <= r < offsets[e+1]

x and h have their columns in the order of `interleave`. Rounding points: with tiles of up to 64
rows integers are exact in the products, and their sums over a group of columns are scaled in fp32.
With more rows scales are rounded to x's dtype, and so are weights times scales; sums with a scale
per row stay as they were. mxfp4's weights are exact (in fp16, as far as it holds them). Sums are
fp32, h and y are rounded once.

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token, S = T*K rows.
"""

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.kernels.gated_up import activate, activate_gated
from moezoo.layers.kernels.interleave import interleave_ref, padded
from moezoo.layers.kernels.overlap import (
    capability,
    launch_options,
    start_next,
    wait,
    wait_for_previous,
)
from moezoo.layers.kernels.packed_products import num_slices, out_of_turns, products
from moezoo.layers.kernels.permute import Permutation
from moezoo.layers.kernels.tiles import Tile, descriptor, load_tile, swizzle
from moezoo.layers.kernels.unpack import CHUNK
from moezoo.layers.quant import Int4, Int8, Mxfp4, WeightOnly
from moezoo.layers.quant.mxfp4 import GROUP

FORMATS: dict[type, str] = {Int8: "int8", Int4: "int4", Mxfp4: "mxfp4"}
"""By which the kernels know them."""


FEW_ROWS = 64
"""Up to so many rows a tile, sums over groups are scaled, with more the weights: see `products`."""


def ways(weights: type, num_columns: int) -> int:
    """Columns in a word of the weights: as many as 16 bits hold, or 8 where those do not fit."""
    in_a_byte = 1 if weights is Int8 else 2
    return in_a_byte if num_columns % (2 * in_a_byte) else 2 * in_a_byte


def _in_order(x: Tensor, weights: type, num_columns: int) -> Tensor:
    """The inverse of `interleave`."""
    return x.unflatten(-1, (-1, ways(weights, num_columns), CHUNK.value)).mT.flatten(-3)[
        :, :num_columns
    ]


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
    gating = Gating.of(activation)
    order, offsets = permutation.order, permutation.offsets
    num_experts, _, intermediate_size, hidden_size = w13.shape
    x = _in_order(x, type(w13), hidden_size)
    h = x.new_zeros(permutation.positions.numel(), intermediate_size)
    for e in range(num_experts):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        parts = x[order[rows].long() // k].float() @ w13[e].dequantize().mT  # [1 or 2, rows, I]
        if bias13 is not None:
            parts += bias13[e].float().unsqueeze(1)
        h[rows] = gating(*parts).to(h.dtype)
    return interleave_ref(h, ways(type(w13), intermediate_size))


def down_weight_only_ref(
    h: Tensor,
    w2: WeightOnly,
    permutation: Permutation,
    *,
    tile: Tile | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    num_experts, hidden_size, intermediate_size = w2.shape
    h = _in_order(h, type(w2), intermediate_size)
    y = h.new_zeros(len(h), hidden_size)
    for e in range(num_experts):
        rows = slice(int(permutation.offsets[e]), int(permutation.offsets[e + 1]))
        y_e = h[rows].float() @ w2[e].dequantize().T
        if bias2 is not None:
            y_e += bias2[e].float()
        y[rows] = y_e.to(y.dtype)
    return y


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
        SLICES, CHAIN, DESCRIPTORS, False, EVEN_K, PAIRS, BLOCK_M, BLOCK_N, BLOCK_W,
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
        DESCRIPTORS, DESCRIPTORS, EVEN_K, PAIRS, BLOCK_M, BLOCK_N, BLOCK_W,
    )
    # fmt: on
    if HAS_BIAS:
        p_bias = bias_ptr + expert.to(tl.int64) * stride_be + cols * stride_bn
        y += tl.load(p_bias, mask=m_cols, other=0.0).to(tl.float32)[:, None]
    p_y = y_ptr + rows.to(tl.int64)[None, :] * hidden_size + cols[:, None]
    tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=m_rows[None, :] & m_cols[:, None])


@triton.jit(do_not_specialize=["max_tiles", "num_programs", "k"])
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
    num_programs,
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
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr,
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
    num_n = tl.cdiv(intermediate_size, BLOCK_N)
    for pid in tl.range(tl.program_id(0), num_tiles * num_n, num_programs, flatten=FLATTEN):
        tile, pid_n = swizzle(pid, num_tiles, num_n, GROUP_M)
        expert, first_row, end = load_tile(tiles_ptr + tile, max_tiles)
        first_col = pid_n * BLOCK_N
        # fmt: off
        if TAIL > 0 and end - first_row <= TAIL:
            _gated_up_tile(
                expert, first_row, end, first_col, x_ptr, w, scales_ptr, zeros_ptr, bias_ptr, h_ptr,
                order_ptr, stride_xt, num_words, intermediate_size, stride_hr, k, stride_we,
                stride_wp, stride_wn, stride_se, stride_sp, stride_sn, stride_be, stride_bp,
                stride_bn, FORMAT, WAYS, H_WAYS, PARTS, HAS_ZEROS, GROUP, SCALES_ALIGNED, SLICES,
                CHAIN, ACTIVATION, LIMIT, UP_OFFSET, HAS_BIAS, DESCRIPTORS, EVEN_K, PAIRS, TAIL,
                BLOCK_N, BLOCK_W,
            )
        else:
            _gated_up_tile(
                expert, first_row, end, first_col, x_ptr, w, scales_ptr, zeros_ptr, bias_ptr, h_ptr,
                order_ptr, stride_xt, num_words, intermediate_size, stride_hr, k, stride_we,
                stride_wp, stride_wn, stride_se, stride_sp, stride_sn, stride_be, stride_bp,
                stride_bn, FORMAT, WAYS, H_WAYS, PARTS, HAS_ZEROS, GROUP, SCALES_ALIGNED, SLICES,
                CHAIN, ACTIVATION, LIMIT, UP_OFFSET, HAS_BIAS, DESCRIPTORS, EVEN_K, PAIRS, BLOCK_M,
                BLOCK_N, BLOCK_W,
            )
        # fmt: on


@triton.jit(do_not_specialize=["max_tiles", "num_programs"])
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
    num_programs,
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
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr,
    FLATTEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    # What counted the tiles had finished before the first product let this one start.
    num_tiles = max_tiles if num_tiles_ptr is None else tl.load(num_tiles_ptr)
    wait_for_previous(OVERLAP)
    num_n = tl.cdiv(hidden_size, BLOCK_N)
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
                GROUP, SCALES_ALIGNED, SLICES, CHAIN, HAS_BIAS, DESCRIPTORS, EVEN_K, PAIRS, TAIL,
                BLOCK_N, BLOCK_W,
            )
        else:
            _down_tile(
                expert, first_row, end, first_col, h, w, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
                stride_hr, num_words, hidden_size, stride_we, stride_wp, stride_wn, stride_se,
                stride_sp, stride_sn, stride_be, stride_bn, FORMAT, WAYS, HAS_ZEROS, GROUP,
                SCALES_ALIGNED, SLICES, CHAIN, HAS_BIAS, DESCRIPTORS, EVEN_K, PAIRS, BLOCK_M,
                BLOCK_N, BLOCK_W,
            )
        # fmt: on


class _Packed(NamedTuple):
    """Weights as the kernels take them: words [E, P, N, W], scales and zeros [E, P, N, G]."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    options: dict[str, Any]


def unpacks_pairs(x: Tensor) -> bool:
    """Whether the GPU of x calculates with pairs of its dtype; before Hopper not in bf16."""
    if not x.is_cuda or torch.version.hip is not None or x.dtype.itemsize != 2:
        return False
    return x.dtype == torch.float16 or capability(x.device) >= (9, 0)


def _packed(name: str, w: WeightOnly, x: Tensor, tile: Tile) -> _Packed:
    """w of four dimensions, for x's dtype.

    Raises ValueError for what the kernels do not read.
    """
    if w.order is not None:
        raise ValueError(f"{name} has its columns in an order of its own: dequantize() it")
    zeros = w.zeros if isinstance(w, Int4) else None
    num_columns = w.shape[-1]
    num_ways = ways(type(w), num_columns)
    words = w.data
    if num_ways * (8 if isinstance(w, Int8) else 4) == 16:
        step = 2 * words.element_size()
        if words.data_ptr() % step or any(s % step for s in words.stride()[:-1]):
            raise ValueError(f"rows of {name}'s data must begin at even bytes, {words.stride()}")
        words = words.view(torch.int16)
    tensors = {"data": words, "scales": w.scales} | ({} if zeros is None else {"zeros": zeros})
    for field, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}'s {field} must have dense rows, got {tensor.stride()}")
    if zeros is not None and zeros.stride() != w.scales.stride():
        raise ValueError(
            f"{name}'s zeros must have the strides of its scales, got {zeros.stride()} and "
            f"{w.scales.stride()}"
        )
    mxfp4 = isinstance(w, Mxfp4)
    group = GROUP if mxfp4 else 0 if w.scales.shape[-1] == 1 else w.group_size
    group, block_words, chain = group // num_ways, tile.k // num_ways, tile.m > FEW_ROWS
    options = {
        "FORMAT": FORMATS[type(w)],
        "WAYS": num_ways,
        "HAS_ZEROS": zeros is not None,
        "GROUP": group,
        "SCALES_ALIGNED": gcd(16, *w.scales.stride()[:-1]) if mxfp4 else 1,
        "SLICES": num_slices(block_words, group, mxfp4=mxfp4, zeros=zeros is not None, chain=chain),
        "CHAIN": chain,
        "DESCRIPTORS": tile.descriptors,
        "EVEN_K": num_columns % tile.k == 0,
        "PAIRS": words.dtype == torch.int16 and unpacks_pairs(x),
        "FLATTEN": tile.programs_per_sm > 0 and not tile.tail,
        "GROUP_M": tile.group_m,
        "TAIL": tile.tail,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_W": block_words,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **launch_options(x.device, persistent=tile.programs_per_sm > 0),
    }
    return _Packed(words, w.scales, zeros, options)


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
    """-> h [S, P] in x's dtype, rows in expert order and columns as `interleave` has them, P of I;
    rows from offsets[E] on are not written.

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
    packed = _packed("w13", w13, x, tile)
    h_ways = ways(type(w13), intermediate_size)
    width = padded(intermediate_size, h_ways)
    h = torch.empty(order.numel(), width, dtype=x.dtype, device=x.device)
    num_programs = tile.num_programs(tiles.shape[1], intermediate_size, x.device)
    if num_programs == 0:
        return h
    words, options = packed.words, packed.options
    block = (1, num_parts, tile.n, options["BLOCK_W"])
    _gated_up_weight_only_kernel[(num_programs,)](
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
        num_programs,
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


def down_weight_only(
    h: Tensor,
    w2: WeightOnly,
    permutation: Permutation,
    *,
    tile: Tile,
    bias2: Tensor | None = None,
) -> Tensor:
    """-> y [S, H] in h's dtype, rows in expert order; those from offsets[E] on are not written.

    h [S, P] as `gated_up_weight_only` made it, w2 [E, H, I] and bias2 [E, H]; `permutation` has
    `tile.m` rows a tile, and the launch just before this one did not count them.

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
    packed = _packed("w2", w2.map(lambda tensor: tensor.unsqueeze(1)), h, tile)
    y = torch.empty(order.numel(), hidden_size, dtype=h.dtype, device=h.device)
    num_programs = tile.num_programs(tiles.shape[1], hidden_size, h.device)
    if num_programs == 0:
        return y
    words, options = packed.words, packed.options
    block = (1, 1, tile.n, options["BLOCK_W"])
    rows = tail_rows = h
    if tile.descriptors:
        columns = tile.k // options["SLICES"]
        rows = descriptor(h, (tile.m, columns))
        tail_rows = descriptor(h, (tile.tail, columns)) if tile.tail else rows
    _down_weight_only_kernel[(num_programs,)](
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
        num_programs,
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
