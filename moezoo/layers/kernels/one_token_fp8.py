"""one_token_fp8: the experts of one token in fp8, as `few_tokens` does them in 16 bits.

    h[k] = act(w13[e][:I] @ x + bias) * (w13[e][I:] @ x + bias),  e = topk_ids[k]
    out  = sum over k with topk_ids[k] in 0..E-1 of topk_weights[k] * (w2[e] @ h[k] + bias)

x and h are quantised per 128 as they are for more tokens, so that a token's result does not depend
on its company beyond the order of sums. Each program does it for itself, in registers: what it
takes to read x or h again is less than a launch. No program has 128 columns of h, so h goes from
one kernel to the other in fp32.

Products accumulate in fp32 for 128, then are scaled and added in fp32, a scale per row of weights
after that; each expert's row of the sum is rounded once, as is the sum.

Legend: H hidden, I expert intermediate, E experts, K experts per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.kernels.gated_up import activate, activate_gated
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.quantize import fp8_factor
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2
from moezoo.layers.quant.channel_fp8 import ChannelFp8, Fp8Weights
from moezoo.layers.quant.fp8 import BLOCK, blocks, quantize_rows

UP_BLOCK = (4, 8, 2)
DOWN_BLOCK = (4, 16, 4)
"""Columns and groups of 128 that a program of either kernel works on at a time, and its warps. The
second kernel's groups are over all slots."""


def one_token_fp8_ref(
    x: Tensor,
    w13: Fp8Weights,
    w2: Fp8Weights,
    *,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    gating = Gating.of(activation)
    num_experts, _, intermediate_size, hidden_size = w13.shape
    token = quantize_rows(x).dequantize()[0, :hidden_size]
    out = x.new_zeros(x.shape, dtype=torch.float32)
    for e, weight in zip(topk_ids[0].tolist(), topk_weights[0], strict=True):
        if not 0 <= e < num_experts:
            continue
        parts = w13[e].dequantize() @ token  # [1 or 2, I]
        if bias13 is not None:
            parts += bias13[e].float()
        h = quantize_rows(gating(*parts)[None]).dequantize()[0, :intermediate_size]
        y = w2[e].dequantize() @ h
        if bias2 is not None:
            y += bias2[e].float()
        out += weight * y.to(x.dtype).float()
    return out.to(x.dtype)


@triton.jit
def _rounded(x):
    """x [R, 128] fp32 -> the values that its fp8 has, before scaling, and the scales [R]."""
    factors, scales = fp8_factor(tl.max(tl.abs(x), 1))
    return (x * factors[:, None]).to(tl.float8e4nv).to(tl.float32), scales


@triton.jit(do_not_specialize=["stride_se", "stride_sg", "stride_sn", "stride_sh"])
def _one_token_gated_up_fp8_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    ids_ptr,
    h_ptr,
    num_experts,
    hidden_size,
    intermediate_size,
    stride_xh,
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
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PER_ROW: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    slot = tl.program_id(1)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    if (expert >= 0) & (expert < num_experts):
        # Its columns have one row of scales: BLOCK_N divides 128.
        first_col = tl.program_id(0) * BLOCK_N
        cols = first_col + tl.arange(0, BLOCK_N)
        m_cols = cols < intermediate_size
        w_cols = tl.where(m_cols, cols, 0).to(tl.int64)
        p_scales = scales_ptr + expert * stride_se
        if not PER_ROW:
            p_scales += first_col // GROUP * stride_sn
        p_w = w_ptr + expert * stride_we
        gate = tl.zeros([GROUPS, BLOCK_N], tl.float32)
        up = tl.zeros([GROUPS, BLOCK_N], tl.float32)
        num_groups = tl.cdiv(hidden_size, GROUP)
        for start in range(0, num_groups, GROUPS):
            groups = start + tl.arange(0, GROUPS)
            m_groups = groups < num_groups
            inner = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            m_inner = inner < hidden_size
            p_gate = p_w + w_cols[None, :, None] * stride_wn + inner[:, None, :] * stride_wh
            b_gate = tl.load(p_gate, mask=m_inner[:, None, :], other=0.0)
            if PARTS == 2:
                b_up = tl.load(p_gate + stride_wg, mask=m_inner[:, None, :], other=0.0)
            x = tl.load(x_ptr + inner * stride_xh, mask=m_inner, other=0.0).to(tl.float32)
            if PER_ROW:
                gate_scales = 1.0
            else:
                gate_scales = tl.load(p_scales + groups * stride_sh, mask=m_groups, other=0.0)
            x, x_scales = _rounded(x)
            gates = tl.sum(b_gate.to(tl.float32) * x[:, None, :], 2)
            gate += gates * (x_scales * gate_scales)[:, None]
            if PARTS == 2:
                if PER_ROW:
                    up_scales = 1.0
                else:
                    p_up_scales = p_scales + stride_sg + groups * stride_sh
                    up_scales = tl.load(p_up_scales, mask=m_groups, other=0.0)
                ups = tl.sum(b_up.to(tl.float32) * x[:, None, :], 2)
                up += ups * (x_scales * up_scales)[:, None]
        gates = tl.sum(gate, 0)
        ups = tl.sum(up, 0)
        if PER_ROW:
            gates *= tl.load(p_scales + w_cols * stride_sn)
            if PARTS == 2:
                ups *= tl.load(p_scales + stride_sg + w_cols * stride_sn)
        if HAS_BIAS:
            p_bias = bias_ptr + expert * stride_be + w_cols * stride_bn
            gates += tl.load(p_bias).to(tl.float32)
            if PARTS == 2:
                ups += tl.load(p_bias + stride_bg).to(tl.float32)
        if PARTS == 2:
            h = activate_gated(gates, ups, ACTIVATION, LIMIT, UP_OFFSET)
        else:
            h = activate(gates, ACTIVATION)
        tl.store(h_ptr + slot * intermediate_size + cols, h, mask=m_cols)


@triton.jit(do_not_specialize=["stride_se", "stride_sn", "stride_si"])
def _one_token_down_fp8_kernel(
    h_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    num_experts,
    intermediate_size,
    hidden_size,
    stride_we,
    stride_wn,
    stride_wi,
    stride_se,
    stride_sn,
    stride_si,
    stride_be,
    stride_bn,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    # A row of a block is a group of one slot's expert: GROUPS of them below each other.
    row_slots = tl.arange(0, BLOCK_SLOTS * GROUPS) // GROUPS
    row_groups = tl.arange(0, BLOCK_SLOTS * GROUPS) % GROUPS
    row_experts = tl.load(ids_ptr + row_slots, mask=row_slots < K, other=-1).to(tl.int64)
    m_rows = (row_experts >= 0) & (row_experts < num_experts)
    row_experts = tl.where(m_rows, row_experts, 0)
    first_col = tl.program_id(0) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    m_cols = cols < hidden_size
    w_cols = tl.where(m_cols, cols, 0).to(tl.int64)
    if not PER_ROW:
        p_scales = scales_ptr + row_experts * stride_se + first_col // GROUP * stride_sn
    o_h = tl.where(m_rows, row_slots, 0) * intermediate_size
    o_w = (row_experts * stride_we)[:, None] + (w_cols * stride_wn)[None, :]
    products = tl.zeros([BLOCK_SLOTS * GROUPS, BLOCK_N], tl.float32)
    num_groups = tl.cdiv(intermediate_size, GROUP)
    for start in range(0, num_groups, GROUPS):
        groups = start + row_groups
        inner = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        m_inner = m_rows[:, None] & (inner < intermediate_size)
        p_w = w_ptr + o_w[:, :, None] + inner[:, None, :] * stride_wi
        b_w = tl.load(p_w, mask=m_inner[:, None, :], other=0.0)
        h = tl.load(h_ptr + o_h[:, None] + inner, mask=m_inner, other=0.0)
        if PER_ROW:
            scales = 1.0
        else:
            m_scales = m_rows & (groups < num_groups)
            scales = tl.load(p_scales + groups * stride_si, mask=m_scales, other=0.0)
        h, h_scales = _rounded(h)
        sums = tl.sum(b_w.to(tl.float32) * h[:, None, :], 2)
        products += sums * (h_scales * scales)[:, None]
    y = tl.sum(tl.reshape(products, [BLOCK_SLOTS, GROUPS, BLOCK_N]), 1)
    slots = tl.arange(0, BLOCK_SLOTS)
    experts = tl.load(ids_ptr + slots, mask=slots < K, other=-1).to(tl.int64)
    m_slots = (experts >= 0) & (experts < num_experts)
    experts = tl.where(m_slots, experts, 0)
    if PER_ROW:
        o_scales = experts[:, None] * stride_se + (w_cols * stride_sn)[None, :]
        y *= tl.load(scales_ptr + o_scales)
    if HAS_BIAS:
        o_bias = experts[:, None] * stride_be
        y += tl.load(bias_ptr + o_bias + (w_cols * stride_bn)[None, :]).to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    weights = tl.load(weights_ptr + slots, mask=m_slots, other=0.0)
    out = tl.sum(tl.where(m_slots[:, None], y * weights[:, None], 0.0), 0)
    tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=m_cols)


def one_token_fp8(
    x: Tensor,
    w13: Fp8Weights,
    w2: Fp8Weights,
    *,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    """Return the output of a layer's experts for one token x [1, H]: [1, H] in x's dtype.

    topk_weights is [1, K] fp32, topk_ids [1, K] int32 or int64. w13 [E, 2, I, H] or [E, 1, I, H]
    and w2 [E, H, I], biases as `gated_up_fp8` and `down_fp8` take them. An id outside 0..E-1
    contributes nothing.

    Raises ValueError for shapes that do not fit.
    """
    gating = Gating.of(activation)
    if w13.data.ndim != 4 or w13.shape[1] not in (1, 2):
        raise ValueError(f"w13 must be [E, 2 or 1, I, H], got {list(w13.shape)}")
    num_experts, num_parts, intermediate_size, hidden_size = w13.shape
    if x.shape != (1, hidden_size) or w2.shape != (num_experts, hidden_size, intermediate_size):
        raise ValueError(
            f"x must be [1, {hidden_size}] and w2 [{num_experts}, {hidden_size}, "
            f"{intermediate_size}] as w13 is, got {list(x.shape)} and {list(w2.shape)}"
        )
    if topk_ids.shape != topk_weights.shape or len(topk_ids) != 1:
        raise ValueError(
            "topk_weights and topk_ids must be [1, K], "
            f"got {list(topk_weights.shape)} and {list(topk_ids.shape)}"
        )
    k = topk_ids.shape[1]
    topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
    h = torch.empty(k, intermediate_size, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    options = launch_options(x.device)
    per_row = isinstance(w13, ChannelFp8)
    block_n, max_groups, num_warps = UP_BLOCK
    _one_token_gated_up_fp8_kernel[(cdiv(intermediate_size, block_n), k)](
        x,
        w13.data,
        w13.scales,
        bias13,
        topk_ids,
        h,
        num_experts,
        hidden_size,
        intermediate_size,
        x.stride(1),
        *w13.data.stride(),
        *w13.scales.stride(),
        *((0,) if per_row else ()),
        *((0, 0, 0) if bias13 is None else bias13.stride()),
        PARTS=num_parts,
        ACTIVATION=ACTIVATIONS[gating.activation].__name__,
        LIMIT=gating.limit,
        UP_OFFSET=gating.up_offset,
        HAS_BIAS=bias13 is not None,
        PER_ROW=per_row,
        GROUPS=min(max_groups, next_power_of_2(blocks(hidden_size))),
        GROUP=BLOCK,
        BLOCK_N=block_n,
        num_warps=num_warps,
        **options,
    )
    block_n, max_groups, num_warps = DOWN_BLOCK
    block_slots = next_power_of_2(k)
    groups = max(1, max_groups // block_slots)
    _one_token_down_fp8_kernel[(cdiv(hidden_size, block_n),)](
        h,
        w2.data,
        w2.scales,
        bias2,
        topk_ids,
        topk_weights,
        out,
        num_experts,
        intermediate_size,
        hidden_size,
        *w2.data.stride(),
        *w2.scales.stride(),
        *((0,) if per_row else ()),
        *((0, 0) if bias2 is None else bias2.stride()),
        K=k,
        HAS_BIAS=bias2 is not None,
        PER_ROW=per_row,
        BLOCK_SLOTS=block_slots,
        GROUPS=min(groups, next_power_of_2(blocks(intermediate_size))),
        GROUP=BLOCK,
        BLOCK_N=block_n,
        num_warps=num_warps,
        **options,
    )
    return out
