"""gated_up: the first grouped product, with the gated activation in its epilogue.

    h[r] = act(w13[e][:I] @ x[t] + bias) * (w13[e][I:] @ x[t] + bias)
    t = order[r] // K,  e the expert with offsets[e] <= r < offsets[e+1]

and with `Gating`'s bounds where there are some. As [E, 2, I, H], w13 may have its gate and up rows
in any places of memory; as [E, 1, I, H] it has no gate, and h[r] = act(w13[e] @ x[t] + bias).

Products accumulate in fp32, h is rounded once. The rows of x are gathered by pointer; one program
holds the gate and the up accumulator of the same columns.

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token, S = T*K rows,
N tile numbers (see `permute`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.kernels.permute import first_tile
from moezoo.layers.kernels.tiles import GROUP_M, choose_tile


def gated_up_ref(
    x: Tensor,
    w13: Tensor,
    order: Tensor,
    offsets: Tensor,
    tile_experts: Tensor,
    *,
    k: int,
    tile_rows: int,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
) -> Tensor:
    gating = Gating.of(activation)
    if w13.ndim == 3:
        w13 = w13.unflatten(1, (2, -1))
        bias13 = None if bias13 is None else bias13.unflatten(1, (2, -1))
    h = x.new_zeros(order.numel(), w13.shape[2])
    for e in range(w13.shape[0]):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        parts = x[order[rows].long() // k].float() @ w13[e].float().mT  # [1 or 2, rows, I]
        if bias13 is not None:
            parts += bias13[e].float().unsqueeze(1)
        act = gating if len(parts) == 2 else ACTIVATIONS[gating.activation]
        h[rows] = act(*parts).to(h.dtype)
    return h


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), with u = sqrt(2/pi) * (x + 0.044715 x^3).
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "relu2":
        return tl.where(x < 0.0, 0.0, x * x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        # Not maximum(x, 0), which would swallow NaN.
        return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _gate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr):
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if UP_OFFSET != 0.0:
        up += UP_OFFSET
    return _activate(gate, ACTIVATION) * up


@triton.jit
def _gated_up_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    h_ptr,
    order_ptr,
    offsets_ptr,
    tile_experts_ptr,
    num_tiles,
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
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILE_PER_ROW: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_n = tl.cdiv(intermediate_size, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * num_n)
    group_size = tl.minimum(num_tiles - group * GROUP_M, GROUP_M)
    tile = group * GROUP_M + (pid % (GROUP_M * num_n)) % group_size
    pid_n = (pid % (GROUP_M * num_n)) // group_size
    expert = tl.load(tile_experts_ptr + tile)
    if expert < 0:
        return
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    tile_in_expert = tile - first_tile(expert, begin, BLOCK_M, TILE_PER_ROW)
    rows = begin + tile_in_expert * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = rows < end
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_cols = cols < intermediate_size

    # Rows and columns past the end read row 0 and column 0, and are not stored.
    tokens = (tl.load(order_ptr + rows, mask=m_rows, other=0) // k).to(tl.int64)
    w_rows = tl.where(m_cols, cols, 0).to(tl.int64)
    expert = expert.to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    p_x = x_ptr + tokens[:, None] * stride_xt + inner[None, :] * stride_xh
    p_gate = w_ptr + expert * stride_we + w_rows[None, :] * stride_wn + inner[:, None] * stride_wh
    p_up = p_gate + stride_wg

    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        if EVEN_K:
            b_x = tl.load(p_x)
            b_gate = tl.load(p_gate)
            if GATED:
                b_up = tl.load(p_up)
        else:
            m_inner = start + inner < hidden_size
            b_x = tl.load(p_x, mask=m_inner[None, :], other=0.0)
            b_gate = tl.load(p_gate, mask=m_inner[:, None], other=0.0)
            if GATED:
                b_up = tl.load(p_up, mask=m_inner[:, None], other=0.0)
        gate = tl.dot(b_x, b_gate, gate, input_precision="ieee")
        if GATED:
            up = tl.dot(b_x, b_up, up, input_precision="ieee")
        p_x += BLOCK_K * stride_xh
        p_gate += BLOCK_K * stride_wh
        p_up += BLOCK_K * stride_wh

    if HAS_BIAS:
        p_bias = bias_ptr + expert * stride_be + w_rows * stride_bn
        gate += tl.load(p_bias).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(p_bias + stride_bg).to(tl.float32)[None, :]
    h = _gate(gate, up, ACTIVATION, LIMIT, UP_OFFSET) if GATED else _activate(gate, ACTIVATION)
    o_h = rows.to(tl.int64)[:, None] * intermediate_size + cols[None, :]
    tl.store(h_ptr + o_h, h.to(h_ptr.dtype.element_ty), mask=m_rows[:, None] & m_cols[None, :])


def gated_up(
    x: Tensor,
    w13: Tensor,
    order: Tensor,
    offsets: Tensor,
    tile_experts: Tensor,
    *,
    k: int,
    tile_rows: int,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
) -> Tensor:
    """-> h [S, I] in x's dtype, rows in expert order; those from offsets[E] on are not written.

    x [T, H] and w13 [E, 2I, H], bias13 [E, 2I], all fp32, bf16 or fp16, of any strides; or w13
    [E, 2, I, H] and bias13 [E, 2, I]; or without a gate w13 [E, 1, I, H] and bias13 [E, 1, I].
    order [S], offsets [E+1] and tile_experts [N] int32 as `permute` made them with the same
    `tile_rows`.

    Raises ValueError for shapes or dtypes that do not fit, and for an unknown activation.
    """
    gating = Gating.of(activation)
    num_experts, hidden_size = w13.shape[0], w13.shape[-1]
    halves = w13.shape[1] in (1, 2) if w13.ndim == 4 else w13.ndim == 3 and w13.shape[1] % 2 == 0
    if w13.dtype != x.dtype or x.ndim != 2 or x.shape[1] != hidden_size or not halves:
        raise ValueError(
            f"x must be [T, H] and w13 [E, 2I, H] of one dtype, got {list(x.shape)} {x.dtype} and "
            f"{list(w13.shape)} {w13.dtype}"
        )
    if order.numel() != x.shape[0] * k or offsets.numel() != num_experts + 1:
        raise ValueError(
            f"order must be [{x.shape[0] * k}] and offsets [{num_experts + 1}], got "
            f"{list(order.shape)} and {list(offsets.shape)}"
        )
    if bias13 is not None and bias13.shape != w13.shape[:-1]:
        raise ValueError(f"bias13 must be {list(w13.shape[:-1])}, got {list(bias13.shape)}")
    if w13.ndim == 3:
        w13 = w13.unflatten(1, (2, -1))
        bias13 = None if bias13 is None else bias13.unflatten(1, (2, -1))
    _, num_parts, intermediate_size, _ = w13.shape
    n = tile_experts.numel()
    h = torch.empty(order.numel(), intermediate_size, dtype=x.dtype, device=x.device)
    tile = choose_tile(tile_rows, num_parts, x.dtype, x.device)
    num_programs = n * triton.cdiv(intermediate_size, tile.n)
    if num_programs == 0:
        return h
    _gated_up_kernel[(num_programs,)](
        x,
        w13,
        bias13,
        h,
        order,
        offsets,
        tile_experts,
        n,
        hidden_size,
        intermediate_size,
        k,
        *x.stride(),
        *w13.stride(),
        *((0, 0, 0) if bias13 is None else bias13.stride()),
        GATED=num_parts == 2,
        ACTIVATION=ACTIVATIONS[gating.activation].__name__,
        LIMIT=gating.limit,
        UP_OFFSET=gating.up_offset,
        HAS_BIAS=bias13 is not None,
        EVEN_K=hidden_size % tile.k == 0,
        TILE_PER_ROW=n == order.numel(),
        GROUP_M=GROUP_M,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return h
