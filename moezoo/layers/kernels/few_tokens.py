"""few_tokens: the experts of a few tokens, most of which are chosen once.

    h[t, k] = act(w13[e][:I] @ x[t] + bias) * (w13[e][I:] @ x[t] + bias),  e = topk_ids[t, k]
    out[t]  = sum over k with topk_ids[t, k] in 0..E-1 of
              topk_weights[t, k] * (w2[e] @ h[t, k] + bias)

Nothing is permuted, and with one row an expert the matrix units have nothing to share: products are
made and summed in ordinary registers, and the second kernel sums over K as well. Tokens that share
an expert read its weights at the same time, so that one of them finds them in L2. Products
accumulate in fp32; h, and each expert's row of the sum, are rounded once, as is the sum. What a
token gets does not depend on the others.

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating, in_parts
from moezoo.layers.kernels.gated_up import activate, activate_gated
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2


def few_tokens_ref(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    gating = Gating.of(activation)
    w13, bias13 = in_parts(w13, bias13)
    out = x.new_zeros(x.shape, dtype=torch.float32)
    for t, k in torch.cartesian_prod(*map(torch.arange, topk_ids.shape)).tolist():
        e = int(topk_ids[t, k])
        if not 0 <= e < len(w2):
            continue
        parts = w13[e].float() @ x[t].float()  # [1 or 2, I]
        if bias13 is not None:
            parts += bias13[e].float()
        y = w2[e].float() @ gating(*parts).to(x.dtype).float()
        if bias2 is not None:
            y += bias2[e].float()
        out[t] += topk_weights[t, k] * y.to(x.dtype).float()
    return out.to(x.dtype)


@triton.jit(do_not_specialize=["k"])
def _few_tokens_gated_up_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    ids_ptr,
    h_ptr,
    num_experts,
    hidden_size,
    intermediate_size,
    k,
    stride_xt,
    stride_xh,
    stride_we,
    stride_wg,
    stride_wn,
    stride_wh,
    stride_be,
    stride_bg,
    stride_bn,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    slot = tl.program_id(0)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    if (expert >= 0) & (expert < num_experts):
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_cols = cols < intermediate_size
        inner = tl.arange(0, BLOCK_K)
        w_cols = tl.where(m_cols, cols, 0).to(tl.int64)
        p_gate = w_ptr + expert * stride_we + w_cols[:, None] * stride_wn
        p_gate += inner[None, :] * stride_wh
        gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        p_x = x_ptr + (slot // k) * stride_xt + inner * stride_xh
        for start in range(0, hidden_size, BLOCK_K):
            m_inner = start + inner < hidden_size
            b_gate = tl.load(p_gate, mask=m_inner[None, :], other=0.0)
            if PARTS == 2:
                b_up = tl.load(p_gate + stride_wg, mask=m_inner[None, :], other=0.0)
            b_x = tl.load(p_x, mask=m_inner, other=0.0).to(tl.float32)[None, :]
            gate += b_gate.to(tl.float32) * b_x
            if PARTS == 2:
                up += b_up.to(tl.float32) * b_x
            p_x += BLOCK_K * stride_xh
            p_gate += BLOCK_K * stride_wh
        gates = tl.sum(gate, 1)
        ups = tl.sum(up, 1)
        if HAS_BIAS:
            p_bias = bias_ptr + expert * stride_be + w_cols * stride_bn
            gates += tl.load(p_bias).to(tl.float32)
            if PARTS == 2:
                ups += tl.load(p_bias + stride_bg).to(tl.float32)
        if PARTS == 2:
            h = activate_gated(gates, ups, ACTIVATION, LIMIT, UP_OFFSET)
        else:
            h = activate(gates, ACTIVATION)
        p_h = h_ptr + slot * intermediate_size + cols
        tl.store(p_h, h.to(h_ptr.dtype.element_ty), mask=m_cols)


@triton.jit
def _few_tokens_down_kernel(
    h_ptr,
    w_ptr,
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
    stride_be,
    stride_bn,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    token = tl.program_id(0)
    # The rows of a block are the slots' experts below each other, BLOCK_N columns of y of each.
    rows = tl.arange(0, BLOCK_SLOTS * BLOCK_N)
    slots = rows // BLOCK_N
    cols = tl.program_id(1) * BLOCK_N + rows % BLOCK_N
    p_ids = ids_ptr + token * K + slots
    experts = tl.load(p_ids, mask=slots < K, other=-1).to(tl.int64)
    m_rows = (experts >= 0) & (experts < num_experts) & (cols < hidden_size)
    experts = tl.where(m_rows, experts, 0)
    w_cols = tl.where(m_rows, cols, 0).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    p_w = w_ptr + (experts * stride_we + w_cols * stride_wn)[:, None] + inner[None, :] * stride_wi
    h_rows = token * K + tl.where(m_rows, slots, 0)
    p_h = h_ptr + h_rows[:, None] * intermediate_size + inner[None, :]
    products = tl.zeros([BLOCK_SLOTS * BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, intermediate_size, BLOCK_K):
        m_w = m_rows[:, None] & (start + inner < intermediate_size)[None, :]
        b_w = tl.load(p_w, mask=m_w, other=0.0).to(tl.float32)
        products += b_w * tl.load(p_h, mask=m_w, other=0.0).to(tl.float32)
        p_w += BLOCK_K * stride_wi
        p_h += BLOCK_K
    y = tl.sum(products, 1)
    if HAS_BIAS:
        p_bias = bias_ptr + experts * stride_be + w_cols * stride_bn
        y += tl.load(p_bias, mask=m_rows, other=0.0).to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    weights = tl.load(weights_ptr + token * K + slots, mask=m_rows, other=0.0)
    weighted = tl.where(m_rows, y * weights, 0.0)
    out = tl.sum(tl.reshape(weighted, [BLOCK_SLOTS, BLOCK_N]), 0)
    out_cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    p_out = out_ptr + token * hidden_size + out_cols
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=out_cols < hidden_size)


def few_tokens(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    """x [T, H], topk_weights [T, K] fp32, topk_ids [T, K] int32 or int64 -> [T, H] in x's dtype.

    Weights and biases as `gated_up` and `down` take them. An id outside 0..E-1 contributes nothing.

    Raises ValueError for shapes that do not fit.
    """
    gating = Gating.of(activation)
    w13, bias13 = in_parts(w13, bias13)
    num_experts, num_parts, intermediate_size, hidden_size = w13.shape
    if (
        x.ndim != 2
        or x.shape[1] != hidden_size
        or w2.shape != (num_experts, hidden_size, intermediate_size)
    ):
        raise ValueError(
            f"x must be [T, {hidden_size}] and w2 [{num_experts}, {hidden_size}, "
            f"{intermediate_size}] as w13 is, got {list(x.shape)} and {list(w2.shape)}"
        )
    if topk_ids.shape != topk_weights.shape or len(topk_ids) != len(x):
        raise ValueError(
            f"topk_weights and topk_ids must be [{len(x)}, K], "
            f"got {list(topk_weights.shape)} and {list(topk_ids.shape)}"
        )
    num_tokens, k = topk_ids.shape
    topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
    h = torch.empty(num_tokens * k, intermediate_size, dtype=x.dtype, device=x.device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if topk_ids.numel() == 0:
        return out.zero_()
    options = launch_options(x.device)
    block_n, block_k = 2, min(1024, next_power_of_2(hidden_size))
    _few_tokens_gated_up_kernel[(num_tokens * k, cdiv(intermediate_size, block_n))](
        x,
        w13,
        bias13,
        topk_ids,
        h,
        num_experts,
        hidden_size,
        intermediate_size,
        k,
        *x.stride(),
        *w13.stride(),
        *((0, 0, 0) if bias13 is None else bias13.stride()),
        PARTS=num_parts,
        ACTIVATION=ACTIVATIONS[gating.activation].__name__,
        LIMIT=gating.limit,
        UP_OFFSET=gating.up_offset,
        HAS_BIAS=bias13 is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=2,
        **options,
    )
    block_slots = next_power_of_2(k)
    # One column a program, and what eight warps hold of K rows of weights.
    block_k = min(2048 // block_slots, next_power_of_2(intermediate_size))
    _few_tokens_down_kernel[(num_tokens, hidden_size)](
        h,
        w2,
        bias2,
        topk_ids,
        topk_weights,
        out,
        num_experts,
        intermediate_size,
        hidden_size,
        *w2.stride(),
        *((0, 0) if bias2 is None else bias2.stride()),
        K=k,
        HAS_BIAS=bias2 is not None,
        BLOCK_SLOTS=block_slots,
        BLOCK_N=1,
        BLOCK_K=max(1, block_k),
        num_warps=8,
        **options,
    )
    return out
