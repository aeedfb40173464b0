"""few_tokens: the experts of a few tokens, most of which are chosen once.

    h[t, k] = act(w13[e][:I] @ x[t] + bias) * (w13[e][I:] @ x[t] + bias),  e = topk_ids[t, k]
    out[t]  = sum over k with topk_ids[t, k] in 0..E-1 of
              topk_weights[t, k] * (w2[e] @ h[t, k] + bias)

out[t] may be the sum with the output of a shared expert. The weights of its first product do not
depend on what was chosen, and are asked for while the kernel before still runs.

Nothing is permuted, and with one row an expert the matrix units have nothing to share: products are
made and summed in ordinary registers, and the second kernel sums over K as well. Tokens that share
an expert read its weights at the same time, so that one of them finds them in L2. A program asks
for a whole row of weights at once; those of the second kernel do so while the first one ends.
Products accumulate in fp32; h, and each expert's row of the sum, are rounded once, as is the sum.
What a token gets does not depend on the others.

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating, in_parts
from moezoo.layers.kernels.gated_up import activate, activate_gated
from moezoo.layers.kernels.overlap import launch_options, start_next, wait, wait_for_previous
from moezoo.layers.kernels.shared_expert import SharedExpert
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
    shared: SharedExpert | None = None,
) -> Tensor:
    gating = Gating.of(activation)
    w13, bias13 = in_parts(w13, bias13)
    out = x.new_zeros(x.shape, dtype=torch.float32)
    if shared is not None:
        h = gating(*(x.float() @ shared.w13.float().T).chunk(2, -1)).to(x.dtype).float()
        out += (h @ shared.w2.float().T).to(x.dtype)
        if shared.logits is not None:
            out *= shared.logits.float().sigmoid().unsqueeze(1)
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


@triton.jit
def _load_row(p_row, mask, inner, size, stride, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """PIECES of a row, all asked for before the first one is used."""
    pieces = ()
    for i in tl.static_range(PIECES):
        m_piece = mask & (i * BLOCK + inner < size)
        pieces += (tl.load(p_row + i * BLOCK * stride, mask=m_piece, other=0.0),)
    return pieces


@triton.jit
def _add_products(products, w, p_h, mask, inner, size, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    for i in tl.static_range(PIECES):
        m_h = mask & (i * BLOCK + inner < size)
        products += w[i].to(tl.float32) * tl.load(p_h + i * BLOCK, mask=m_h, other=0.0).to(
            tl.float32
        )
    return products


@triton.jit
def _gate_and_up(
    p_gate,
    up_offset,
    p_x,
    hidden_size,
    stride_wh,
    stride_xh,
    PARTS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A row of gates times x, and if there are 2 PARTS that of ups, `up_offset` further on. With
    OVERLAP, waits once it has asked for the first PIECES of the weights."""
    inner = tl.arange(0, BLOCK_K)
    here = inner >= 0
    p_gate += inner * stride_wh
    p_x += inner * stride_xh
    b_gate = _load_row(p_gate, here, inner, hidden_size, stride_wh, PIECES, BLOCK_K)
    b_up = b_gate
    if PARTS == 2:
        p_up = p_gate + up_offset
        b_up = _load_row(p_up, here, inner, hidden_size, stride_wh, PIECES, BLOCK_K)
    wait(OVERLAP)
    gates = tl.zeros([BLOCK_K], tl.float32)
    ups = tl.zeros([BLOCK_K], tl.float32)
    gates, ups = _add_gate_and_up(
        gates, ups, b_gate, b_up, p_x, inner, hidden_size, stride_xh, PARTS, PIECES, BLOCK_K
    )
    for start in range(PIECES * BLOCK_K, hidden_size, PIECES * BLOCK_K):
        left = hidden_size - start
        p_gate += PIECES * BLOCK_K * stride_wh
        p_x += PIECES * BLOCK_K * stride_xh
        b_gate = _load_row(p_gate, here, inner, left, stride_wh, PIECES, BLOCK_K)
        b_up = b_gate
        if PARTS == 2:
            p_up = p_gate + up_offset
            b_up = _load_row(p_up, here, inner, left, stride_wh, PIECES, BLOCK_K)
        gates, ups = _add_gate_and_up(
            gates, ups, b_gate, b_up, p_x, inner, left, stride_xh, PARTS, PIECES, BLOCK_K
        )
    return tl.sum(gates, 0), tl.sum(ups, 0)


@triton.jit
def _add_gate_and_up(
    gates,
    ups,
    b_gate,
    b_up,
    p_x,
    inner,
    left,
    stride_xh,
    PARTS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    for i in tl.static_range(PIECES):
        m_x = i * BLOCK_K + inner < left
        b_x = tl.load(p_x + i * BLOCK_K * stride_xh, mask=m_x, other=0.0).to(tl.float32)
        gates += b_gate[i].to(tl.float32) * b_x
        if PARTS == 2:
            ups += b_up[i].to(tl.float32) * b_x
    return gates, ups


@triton.jit(do_not_specialize=["k", "num_shared", "shared_rows", "shared_size"])
def _few_tokens_gated_up_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    ids_ptr,
    h_ptr,
    shared_ptr,
    shared_h_ptr,
    num_experts,
    hidden_size,
    intermediate_size,
    k,
    num_shared,
    shared_rows,
    shared_size,
    stride_xt,
    stride_xh,
    stride_we,
    stride_wg,
    stride_wn,
    stride_wh,
    stride_be,
    stride_bg,
    stride_bn,
    stride_sn,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program computes one column of one slot; the first `shared_rows` rows of programs compute
    those of the shared expert, one token after the other."""
    slot = tl.program_id(0)
    col = tl.program_id(1).to(tl.int64)
    if HAS_SHARED:
        if tl.program_id(1) < shared_rows:
            index = tl.program_id(1) * tl.num_programs(0) + slot
            if index < num_shared:
                row = (index % shared_size).to(tl.int64)
                gate, up = _gate_and_up(
                    shared_ptr + row * stride_sn,
                    shared_size.to(tl.int64) * stride_sn,
                    x_ptr + index // shared_size * stride_xt,
                    *(hidden_size, 1, stride_xh),
                    *(2, PIECES, BLOCK_K, OVERLAP),
                )
                h = activate_gated(gate, up, ACTIVATION, LIMIT, UP_OFFSET)
                tl.store(shared_h_ptr + index, h.to(shared_h_ptr.dtype.element_ty))
            return
        col -= shared_rows
    wait(OVERLAP)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    if (expert >= 0) & (expert < num_experts):
        gate, up = _gate_and_up(
            w_ptr + expert * stride_we + col * stride_wn,
            stride_wg,
            x_ptr + slot // k * stride_xt,
            *(hidden_size, stride_wh, stride_xh),
            *(PARTS, PIECES, BLOCK_K, False),
        )
        if HAS_BIAS:
            p_bias = bias_ptr + expert * stride_be + col * stride_bn
            gate += tl.load(p_bias).to(tl.float32)
            if PARTS == 2:
                up += tl.load(p_bias + stride_bg).to(tl.float32)
        if PARTS == 2:
            h = activate_gated(gate, up, ACTIVATION, LIMIT, UP_OFFSET)
        else:
            h = activate(gate, ACTIVATION)
        tl.store(h_ptr + slot * intermediate_size + col, h.to(h_ptr.dtype.element_ty))


@triton.jit
def _few_tokens_down_kernel(
    h_ptr,
    w_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    shared_h_ptr,
    shared_ptr,
    shared_logits_ptr,
    num_experts,
    intermediate_size,
    hidden_size,
    shared_size,
    stride_we,
    stride_wn,
    stride_wi,
    stride_be,
    stride_bn,
    stride_sn,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHARED_PIECES: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program computes one column: the rows of its blocks are those of the slots' experts. The
    shared expert's row, in SHARED_PIECES, is held in full; 0 if there is none."""
    start_next(OVERLAP)
    token = tl.program_id(0)
    col = tl.program_id(1).to(tl.int64)
    slots = tl.arange(0, BLOCK_SLOTS)
    # What chose the experts had finished before the first kernel let this one start.
    experts = tl.load(ids_ptr + token * K + slots, mask=slots < K, other=-1).to(tl.int64)
    weights = tl.load(weights_ptr + token * K + slots, mask=slots < K, other=0.0)
    m_slots = (experts >= 0) & (experts < num_experts)
    experts = tl.where(m_slots, experts, 0)
    inner = tl.arange(0, BLOCK_K)[None, :]
    mask = m_slots[:, None]
    p_w = w_ptr + experts[:, None] * stride_we + col * stride_wn + inner * stride_wi
    p_h = h_ptr + (token * K + slots)[:, None] * intermediate_size + inner
    if SHARED_PIECES:
        shared_inner = tl.arange(0, SHARED_BLOCK)
        here = shared_inner >= 0
        p_shared = shared_ptr + col * stride_sn + shared_inner
        b_shared = _load_row(
            p_shared, here, shared_inner, shared_size, 1, SHARED_PIECES, SHARED_BLOCK
        )
    b_w = _load_row(p_w, mask, inner, intermediate_size, stride_wi, PIECES, BLOCK_K)
    wait_for_previous(OVERLAP)
    products = tl.zeros([BLOCK_SLOTS, BLOCK_K], tl.float32)
    products = _add_products(products, b_w, p_h, mask, inner, intermediate_size, PIECES, BLOCK_K)
    for start in range(PIECES * BLOCK_K, intermediate_size, PIECES * BLOCK_K):
        left = intermediate_size - start
        b_w = _load_row(p_w + start * stride_wi, mask, inner, left, stride_wi, PIECES, BLOCK_K)
        products = _add_products(products, b_w, p_h + start, mask, inner, left, PIECES, BLOCK_K)
    y = tl.sum(products, 1)
    if HAS_BIAS:
        p_bias = bias_ptr + experts * stride_be + col * stride_bn
        y += tl.load(p_bias, mask=m_slots, other=0.0).to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    out = tl.sum(tl.where(m_slots, y * weights, 0.0), 0)
    if SHARED_PIECES:
        products = tl.zeros([SHARED_BLOCK], tl.float32)
        p_h = shared_h_ptr + token * shared_size + shared_inner
        products = _add_products(
            products, b_shared, p_h, here, shared_inner, shared_size, SHARED_PIECES, SHARED_BLOCK
        )
        y = tl.sum(products, 0).to(out_ptr.dtype.element_ty).to(tl.float32)
        if shared_logits_ptr is not None:
            y *= tl.sigmoid(tl.load(shared_logits_ptr + token).to(tl.float32))
        out += y
    tl.store(out_ptr + token * hidden_size + col, out.to(out_ptr.dtype.element_ty))


def _pieces(size: int, block: int, limit: int) -> int:
    """Return how many blocks of a row are loaded at once: up to `limit`, for the fewest rounds."""
    blocks = cdiv(size, block)
    return cdiv(blocks, cdiv(blocks, limit))


def check_shapes(
    x: Tensor,
    w13_shape: Sequence[int],
    w2_shape: Sequence[int],
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> None:
    """Raise ValueError unless x is [T, H], topk_weights and topk_ids [T, K], and w2 [E, H, I] for a
    w13 of [E, 2 or 1, I, H]."""
    num_experts, _, intermediate_size, hidden_size = w13_shape
    if (
        x.ndim != 2
        or x.shape[1] != hidden_size
        or tuple(w2_shape) != (num_experts, hidden_size, intermediate_size)
    ):
        raise ValueError(
            f"x must be [T, {hidden_size}] and w2 [{num_experts}, {hidden_size}, "
            f"{intermediate_size}] as w13 is, got {list(x.shape)} and {list(w2_shape)}"
        )
    if topk_ids.shape != topk_weights.shape or len(topk_ids) != len(x):
        raise ValueError(
            f"topk_weights and topk_ids must be [{len(x)}, K], "
            f"got {list(topk_weights.shape)} and {list(topk_ids.shape)}"
        )


def _check_shared(x: Tensor, shared: SharedExpert) -> None:
    num_tokens, hidden_size = x.shape
    size = len(shared.w13) // 2
    shapes = tuple(shared.w13.shape), tuple(shared.w2.shape)
    if shapes != ((2 * size, hidden_size), (hidden_size, size)) or any(
        w.stride(1) != 1 and w.shape[1] > 1 for w in shared[:2]
    ):
        raise ValueError(
            f"the shared expert's w13 must be [2I', {hidden_size}] and w2 [{hidden_size}, I'] of "
            f"dense rows, got {list(shapes[0])}, {shared.w13.stride()} and {list(shapes[1])}, "
            f"{shared.w2.stride()}"
        )
    if shared.logits is not None and shared.logits.shape != (num_tokens,):
        raise ValueError(
            f"the shared expert's logits must be [{num_tokens}], got {list(shared.logits.shape)}"
        )


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
    shared: SharedExpert | None = None,
) -> Tensor:
    """Return the output of a layer's experts for x [T, H]: [T, H] in x's dtype.

    topk_weights is [T, K] fp32, topk_ids [T, K] int32 or int64. Weights and biases as `gated_up`
    and `down` take them. An id outside 0..E-1 contributes nothing. A shared expert has x's dtype
    and the activation of the others; its weights must not be written by the kernel launched just
    before.

    Raises ValueError for shapes that do not fit.
    """
    gating = Gating.of(activation)
    w13, bias13 = in_parts(w13, bias13)
    num_experts, num_parts, intermediate_size, hidden_size = w13.shape
    check_shapes(x, w13.shape, w2.shape, topk_weights, topk_ids)
    if shared is not None:
        _check_shared(x, shared)
    num_tokens, k = topk_ids.shape
    topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if topk_ids.numel() == 0:
        return out.zero_()
    shared13, shared2, logits = shared or (None, None, None)
    shared_size = 0 if shared2 is None else shared2.shape[1]
    num_slots, num_shared = num_tokens * k, num_tokens * shared_size
    shared_rows = cdiv(num_shared, num_slots)
    h = torch.empty(num_slots, intermediate_size, dtype=x.dtype, device=x.device)
    shared_h = torch.empty(num_shared, dtype=x.dtype, device=x.device) if shared_size else None
    options = launch_options(x.device)
    # Two warps hold a column of 2048 numbers of gate and up, a longer one has not room there.
    block_k = min(2048, next_power_of_2(hidden_size))
    pieces = _pieces(hidden_size, block_k, 2)
    _few_tokens_gated_up_kernel[(num_slots, shared_rows + intermediate_size)](
        x,
        w13,
        bias13,
        topk_ids,
        h,
        shared13,
        shared_h,
        num_experts,
        hidden_size,
        intermediate_size,
        k,
        num_shared,
        shared_rows,
        shared_size,
        *x.stride(),
        *w13.stride(),
        *((0, 0, 0) if bias13 is None else bias13.stride()),
        0 if shared13 is None else shared13.stride(0),
        PARTS=num_parts,
        ACTIVATION=ACTIVATIONS[gating.activation].__name__,
        LIMIT=gating.limit,
        UP_OFFSET=gating.up_offset,
        HAS_BIAS=bias13 is not None,
        HAS_SHARED=shared_size > 0,
        PIECES=pieces,
        BLOCK_K=block_k,
        num_warps=2 * pieces,
        **options,
    )
    block_slots = next_power_of_2(k)
    # Eight warps a column, 16 bytes a thread and piece, as many as registers hold. Rows of 2048 in
    # eight pieces took 238 us on an H100 (DeepSeek-V3, one token), and 244 in twice four.
    block_k = max(1, min(2048 // block_slots, next_power_of_2(intermediate_size)))
    shared_block = min(2048, next_power_of_2(shared_size))
    _few_tokens_down_kernel[(num_tokens, hidden_size)](
        h,
        w2,
        bias2,
        topk_ids,
        topk_weights,
        out,
        shared_h,
        shared2,
        logits,
        num_experts,
        intermediate_size,
        hidden_size,
        shared_size,
        *w2.stride(),
        *((0, 0) if bias2 is None else bias2.stride()),
        0 if shared2 is None else shared2.stride(0),
        K=k,
        HAS_BIAS=bias2 is not None,
        BLOCK_SLOTS=block_slots,
        PIECES=_pieces(intermediate_size, block_k, 8),
        BLOCK_K=block_k,
        SHARED_PIECES=cdiv(shared_size, shared_block),
        SHARED_BLOCK=shared_block,
        num_warps=8,
        **options,
    )
    return out
