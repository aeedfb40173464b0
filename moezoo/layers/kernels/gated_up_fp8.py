"""gated_up_fp8: `gated_up` in fp8, with a scale per block or per row of w13, and its result
quantised in turn.

    h[r] = act(w13[e][:I] @ x[t] + bias) * (w13[e][I:] @ x[t] + bias), per 128 of I in fp8

Products accumulate in the matrix units for 128 of H (on Hopper with 13 bits of fraction, too few
for more), then are scaled and added in fp32; a scale per row multiplies their sum. h is fp32 until
it is quantised.

A program computes all 128 columns of a group of h, so that it knows the group's scale. Gate and up
are two products: one at a time is in registers beside the two sums, which lets a tile of 128 rows
fit.

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token, S = T*K rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.kernels.gated_up import activate, activate_gated
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.permute import Permutation
from moezoo.layers.kernels.quantize import fp8_factor
from moezoo.layers.kernels.tiles import Tile, descriptor, load_tile, own_tile, swizzle
from moezoo.layers.quant.channel_fp8 import ChannelFp8, Fp8Weights
from moezoo.layers.quant.fp8 import BLOCK, Fp8Rows, blocks, quantize_rows


def gated_up_fp8_ref(
    x: Fp8Rows,
    w13: Fp8Weights,
    permutation: Permutation,
    *,
    k: int,
    tile: Tile | None = None,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
) -> Fp8Rows:
    gating = Gating.of(activation)
    order, offsets = permutation.order, permutation.offsets
    num_experts, _, intermediate_size, hidden_size = w13.shape
    tokens = x.dequantize()[:, :hidden_size]
    h = tokens.new_zeros(permutation.positions.numel(), intermediate_size)
    for e in range(num_experts):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        parts = tokens[order[rows].long() // k] @ w13[e].dequantize().mT  # [1 or 2, rows, I]
        if bias13 is not None:
            parts += bias13[e].float().unsqueeze(1)
        h[rows] = gating(*parts)
    return quantize_rows(h)


@triton.jit
def _rows_times_columns(
    expert,
    first_row,
    end,
    group_n,
    x_ptr,
    x_scales_ptr,
    w,
    w_scales_ptr,
    bias_ptr,
    h_ptr,
    h_scales_ptr,
    order_ptr,
    hidden_size,
    intermediate_size,
    k,
    stride_we,
    stride_wg,
    stride_wn,
    stride_wh,
    stride_se,
    stride_sg,
    stride_sn,
    stride_sh,
    stride_be,
    stride_bg,
    stride_bn,
    stride_hs,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PER_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_groups = tl.cdiv(hidden_size, BLOCK_K)
    rows = first_row + tl.arange(0, BLOCK_M)
    m_rows = rows < end
    first_col = group_n * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    m_cols = cols < intermediate_size
    inner = tl.arange(0, BLOCK_K)
    # Rows past the end read token 0, and are not stored; columns past the end are zero.
    tokens = (tl.load(order_ptr + rows, mask=m_rows, other=0) // k).to(tl.int64)
    p_x = x_ptr + (tokens * num_groups * BLOCK_K)[:, None] + inner[None, :]
    p_x_scales = x_scales_ptr + tokens * num_groups
    w_cols = tl.where(m_cols, cols, 0).to(tl.int64)
    p_w_scales = w_scales_ptr + expert.to(tl.int64) * stride_se
    p_w_scales += (w_cols if PER_ROW else group_n) * stride_sn
    if not DESCRIPTORS:
        o_w = expert.to(tl.int64) * stride_we + w_cols * stride_wn
        p_w = w + o_w[:, None] + inner[None, :] * stride_wh

    if WEIGHTS_FIRST:
        gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = gate
    for start in range(0, hidden_size, BLOCK_K):
        if not WEIGHTS_FIRST:
            x_scales = tl.load(p_x_scales)
            b_x = tl.load(p_x)
        gate_scale = 1.0 if PER_ROW else tl.load(p_w_scales)
        if DESCRIPTORS:
            b_gate = tl.reshape(w.load([expert, 0, first_col, start]), [BLOCK_N, BLOCK_K])
        elif EVEN_K:
            b_gate = tl.load(p_w)
        else:
            b_gate = tl.load(p_w, mask=(start + inner < hidden_size)[None, :], other=0.0)
        if PARTS == 2:
            up_scale = 1.0 if PER_ROW else tl.load(p_w_scales + stride_sg)
            if DESCRIPTORS:
                b_up = tl.reshape(w.load([expert, 1, first_col, start]), [BLOCK_N, BLOCK_K])
            elif EVEN_K:
                b_up = tl.load(p_w + stride_wg)
            else:
                m_inner = (start + inner < hidden_size)[None, :]
                b_up = tl.load(p_w + stride_wg, mask=m_inner, other=0.0)
        if WEIGHTS_FIRST:
            # Asked for last, since their addresses arrive later.
            x_scales = tl.load(p_x_scales)
            b_x = tl.load(p_x)
        p_x += BLOCK_K
        p_x_scales += 1
        if WEIGHTS_FIRST:
            gate += tl.dot(b_gate, b_x.T) * (x_scales * gate_scale)[None, :]
            if PARTS == 2:
                up += tl.dot(b_up, b_x.T) * (x_scales * up_scale)[None, :]
        else:
            gate += tl.dot(b_x, b_gate.T) * (x_scales * gate_scale)[:, None]
            if PARTS == 2:
                up += tl.dot(b_x, b_up.T) * (x_scales * up_scale)[:, None]
        if not PER_ROW:
            p_w_scales += stride_sh
        if not DESCRIPTORS:
            p_w += BLOCK_K * stride_wh

    if PER_ROW:
        scales = tl.load(p_w_scales)
        gate *= scales[:, None] if WEIGHTS_FIRST else scales[None, :]
        if PARTS == 2:
            scales = tl.load(p_w_scales + stride_sg)
            up *= scales[:, None] if WEIGHTS_FIRST else scales[None, :]
    if HAS_BIAS:
        p_bias = bias_ptr + expert.to(tl.int64) * stride_be + cols * stride_bn
        bias = tl.load(p_bias, mask=m_cols, other=0.0).to(tl.float32)
        gate += bias[:, None] if WEIGHTS_FIRST else bias[None, :]
        if PARTS == 2:
            bias = tl.load(p_bias + stride_bg, mask=m_cols, other=0.0).to(tl.float32)
            up += bias[:, None] if WEIGHTS_FIRST else bias[None, :]
    if PARTS == 2:
        h = activate_gated(gate, up, ACTIVATION, LIMIT, UP_OFFSET)
    else:
        h = activate(gate, ACTIVATION)
    padded = tl.cdiv(intermediate_size, BLOCK_N) * BLOCK_N
    if WEIGHTS_FIRST:
        h = tl.where(m_cols[:, None], h, 0.0)
        factors, scales = fp8_factor(tl.max(tl.abs(h), 0))
        h8 = (h * factors[None, :]).to(h_ptr.dtype.element_ty)
        o_h = rows.to(tl.int64)[None, :] * padded + cols[:, None]
        tl.store(h_ptr + o_h, h8, mask=m_rows[None, :])
    else:
        h = tl.where(m_cols[None, :], h, 0.0)
        factors, scales = fp8_factor(tl.max(tl.abs(h), 1))
        h8 = (h * factors[:, None]).to(h_ptr.dtype.element_ty)
        o_h = rows.to(tl.int64)[:, None] * padded + cols[None, :]
        tl.store(h_ptr + o_h, h8, mask=m_rows[:, None])
    tl.store(h_scales_ptr + group_n.to(tl.int64) * stride_hs + rows, scales, mask=m_rows)


SCALE_STRIDES = ["stride_se", "stride_sg", "stride_sn", "stride_sh", "stride_hs"]


# Scales are read one at a time: there is nothing to gain from knowing their strides.
@triton.jit(do_not_specialize=["max_tiles", "k", *SCALE_STRIDES])
def _gated_up_fp8_kernel(
    x_ptr,
    x_scales_ptr,
    w,
    w_scales_ptr,
    bias_ptr,
    h_ptr,
    h_scales_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    max_tiles,
    hidden_size,
    intermediate_size,
    k,
    stride_we,
    stride_wg,
    stride_wn,
    stride_wh,
    stride_se,
    stride_sg,
    stride_sn,
    stride_sh,
    stride_be,
    stride_bg,
    stride_bn,
    stride_hs,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
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
    num_tiles = tl.load(num_tiles_ptr)
    if DIRECT:
        tile, group_n, expert, first_row, end = own_tile(tiles_ptr, max_tiles)
        if tile < num_tiles:
            # fmt: off
            _rows_times_columns(
                expert, first_row, end, group_n, x_ptr, x_scales_ptr, w, w_scales_ptr, bias_ptr,
                h_ptr, h_scales_ptr, order_ptr, hidden_size, intermediate_size, k, stride_we,
                stride_wg, stride_wn, stride_wh, stride_se, stride_sg, stride_sn, stride_sh,
                stride_be, stride_bg, stride_bn, stride_hs, PARTS, ACTIVATION, LIMIT, UP_OFFSET,
                HAS_BIAS, PER_ROW, DESCRIPTORS, EVEN_K, WEIGHTS_FIRST, BLOCK_M, BLOCK_N, BLOCK_K,
            )
            # fmt: on
    else:
        num_n = tl.cdiv(intermediate_size, BLOCK_N)
        num_programs = tl.num_programs(0)
        for pid in tl.range(tl.program_id(0), num_tiles * num_n, num_programs, flatten=FLATTEN):
            tile, group_n = swizzle(pid, num_tiles, num_n, GROUP_M)
            expert, first_row, end = load_tile(tiles_ptr + tile, max_tiles)
            # fmt: off
            if TAIL > 0 and end - first_row <= TAIL:
                _rows_times_columns(
                    expert, first_row, end, group_n, x_ptr, x_scales_ptr, w, w_scales_ptr, bias_ptr,
                    h_ptr, h_scales_ptr, order_ptr, hidden_size, intermediate_size, k, stride_we,
                    stride_wg, stride_wn, stride_wh, stride_se, stride_sg, stride_sn, stride_sh,
                    stride_be, stride_bg, stride_bn, stride_hs, PARTS, ACTIVATION, LIMIT, UP_OFFSET,
                    HAS_BIAS, PER_ROW, DESCRIPTORS, EVEN_K, WEIGHTS_FIRST, TAIL, BLOCK_N, BLOCK_K,
                )
            else:
                _rows_times_columns(
                    expert, first_row, end, group_n, x_ptr, x_scales_ptr, w, w_scales_ptr, bias_ptr,
                    h_ptr, h_scales_ptr, order_ptr, hidden_size, intermediate_size, k, stride_we,
                    stride_wg, stride_wn, stride_wh, stride_se, stride_sg, stride_sn, stride_sh,
                    stride_be, stride_bg, stride_bn, stride_hs, PARTS, ACTIVATION, LIMIT, UP_OFFSET,
                    HAS_BIAS, PER_ROW, DESCRIPTORS, EVEN_K, WEIGHTS_FIRST, BLOCK_M, BLOCK_N,
                    BLOCK_K,
                )
            # fmt: on


def gated_up_fp8(
    x: Fp8Rows,
    w13: Fp8Weights,
    permutation: Permutation,
    *,
    k: int,
    tile: Tile,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
) -> Fp8Rows:
    """Return h, S rows of I in fp8 and in expert order; rows from offsets[E] on are not written.

    x as `permute_and_quantize` made it, w13 [E, 2, I, H], or without a gate [E, 1, I, H], of any
    strides; bias13 [E, 2 or 1, I]. `permutation` has `tile.m` rows a tile; `tile.n` and `tile.k`
    are 128. The scales of h lie one group of I after the other, as `down_fp8` reads them.

    Raises ValueError for shapes or dtypes that do not fit, and for an unknown activation.
    """
    gating = Gating.of(activation)
    if w13.data.ndim != 4 or w13.shape[1] not in (1, 2):
        raise ValueError(f"w13 must be [E, 2 or 1, I, H], got {list(w13.shape)}")
    num_experts, num_parts, intermediate_size, hidden_size = w13.shape
    num_tokens, num_groups = x.data.shape[0], blocks(hidden_size)
    if (x.data.dtype, x.scales.dtype) != (torch.float8_e4m3fn, torch.float32):
        raise ValueError(
            f"x must be float8_e4m3fn and its scales float32, got {x.data.dtype} and "
            f"{x.scales.dtype}"
        )
    if x.data.shape[1] != num_groups * BLOCK or x.scales.shape != (num_tokens, num_groups):
        raise ValueError(
            f"x must be [T, {num_groups * BLOCK}] with scales [T, {num_groups}] as w13 "
            f"{list(w13.shape)} is, got {list(x.data.shape)} and {list(x.scales.shape)}"
        )
    if not x.data.is_contiguous() or not x.scales.is_contiguous():
        raise ValueError("x and its scales must be contiguous")
    order, _, offsets, tiles, num_tiles = permutation
    if order.numel() != num_tokens * k or offsets.numel() != num_experts + 1:
        raise ValueError(
            f"order must be [{num_tokens * k}] and offsets [{num_experts + 1}], got "
            f"{list(order.shape)} and {list(offsets.shape)}"
        )
    if bias13 is not None and bias13.shape != w13.shape[:-1]:
        raise ValueError(f"bias13 must be {list(w13.shape[:-1])}, got {list(bias13.shape)}")
    if (tile.n, tile.k) != (BLOCK, BLOCK):
        raise ValueError(f"tile.n and tile.k must be {BLOCK}, got {tile.n} and {tile.k}")
    num_rows, width = order.numel(), blocks(intermediate_size)
    h = torch.empty(num_rows, width * BLOCK, dtype=torch.float8_e4m3fn, device=x.data.device)
    h_scales = torch.empty(width, num_rows, dtype=torch.float32, device=h.device)
    grid = tile.grid(tiles.shape[1], intermediate_size, h.device)
    if 0 in grid:
        return Fp8Rows(h, h_scales.mT)
    per_row = isinstance(w13, ChannelFp8)
    w = descriptor(w13.data, (1, 1, tile.n, tile.k)) if tile.descriptors else w13.data
    _gated_up_fp8_kernel[grid](
        *x,
        w,
        w13.scales,
        bias13,
        h,
        h_scales,
        order,
        tiles,
        num_tiles,
        tiles.shape[1],
        hidden_size,
        intermediate_size,
        k,
        *w13.data.stride(),
        *w13.scales.stride(),
        *((0,) if per_row else ()),
        *((0, 0, 0) if bias13 is None else bias13.stride()),
        h_scales.stride(0),
        PARTS=num_parts,
        ACTIVATION=ACTIVATIONS[gating.activation].__name__,
        LIMIT=gating.limit,
        UP_OFFSET=gating.up_offset,
        HAS_BIAS=bias13 is not None,
        PER_ROW=per_row,
        DESCRIPTORS=tile.descriptors,
        EVEN_K=tile.descriptors or hidden_size % tile.k == 0,
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
    return Fp8Rows(h, h_scales.mT)
