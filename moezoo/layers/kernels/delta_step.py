"""delta_step: one more token of the gated delta rule, and the gated norm of what it reads.

    q, k  = q / |q| / sqrt(Dk), k / |k|
    state = state * exp(-exp(A_log) * softplus(a + dt_bias))
    state = state + k (v - state^T k)^T * sigmoid(b)
    y     = state^T q
    out   = y / sqrt(mean(y^2) + eps) * norm_weight * silu(z)

for each head of a row; |x| is sqrt(sum(x^2) + 1e-6). In fp32, out rounded once. A row that is not
used keeps its state.

Legend: N rows, Hk key heads, H value heads, Dk and Dv their widths. Head h has the q and k of head
h // (H / Hk).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from moezoo.layers.kernels.convolution_step import as_bytes
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import next_power_of_2


def delta_step_ref(
    qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    state: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    used: Tensor | None = None,
) -> Tensor:
    num_heads, k_dim, v_dim = state.shape[1:]
    key_dim = (qkv.shape[1] - num_heads * v_dim) // 2
    groups = num_heads * k_dim // key_dim
    q, k, v = qkv.float().split_with_sizes((key_dim, key_dim, num_heads * v_dim), -1)
    q, k = (x.unflatten(-1, (-1, k_dim)).repeat_interleave(groups, 1) for x in (q, k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    v = v.unflatten(-1, (num_heads, v_dim))
    decay = torch.exp(-A_log.float().exp() * F.softplus(a.float() + dt_bias.float()))
    new = state * decay[..., None, None]
    read = torch.einsum("nhkv,nhk->nhv", new, k)
    correction = (v - read) * b.float().sigmoid()[..., None]
    new = new + k[..., None] * correction[..., None, :]
    y = torch.einsum("nhkv,nhk->nhv", new, q * k_dim**-0.5)
    state.copy_(new if used is None else torch.where(used[:, None, None, None], new, state))
    out = F.rms_norm(y, (v_dim,), norm_weight.float(), eps) * F.silu(z.float())
    return out.flatten(1).to(qkv.dtype)


@triton.jit
def _unit(x):
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def _delta_step_kernel(
    qkv_ptr,
    z_ptr,
    b_ptr,
    a_ptr,
    state_ptr,
    A_log_ptr,
    dt_bias_ptr,
    norm_weight_ptr,
    used_ptr,
    out_ptr,
    eps,
    q_scale,
    stride_qkv,
    stride_zn,
    stride_zh,
    stride_bn,
    stride_bh,
    stride_an,
    stride_ah,
    stride_sn,
    NUM_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    HAS_USED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = (tl.program_id(0) // NUM_HEADS).to(tl.int64)
    head = tl.program_id(0) % NUM_HEADS
    rows = tl.arange(0, BLOCK_K)
    cols = tl.arange(0, BLOCK_V)
    m_rows = rows < K_DIM
    m_cols = cols < V_DIM
    m_state = m_rows[:, None] & m_cols[None, :]
    rate = -tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    weight = tl.load(norm_weight_ptr + cols, mask=m_cols, other=0.0).to(tl.float32)
    wait(OVERLAP)
    KEY_DIM: tl.constexpr = NUM_HEADS // GROUPS * K_DIM
    p_q = qkv_ptr + row * stride_qkv + head // GROUPS * K_DIM
    p_v = qkv_ptr + row * stride_qkv + 2 * KEY_DIM + head * V_DIM
    q = tl.load(p_q + rows, mask=m_rows, other=0.0).to(tl.float32)
    k = tl.load(p_q + KEY_DIM + rows, mask=m_rows, other=0.0).to(tl.float32)
    v = tl.load(p_v + cols, mask=m_cols, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * stride_an + head * stride_ah).to(tl.float32) + dt_bias
    b = tl.load(b_ptr + row * stride_bn + head * stride_bh).to(tl.float32)
    z = tl.load(z_ptr + row * stride_zn + head * stride_zh + cols, mask=m_cols, other=0.0)
    p_state = state_ptr + row * stride_sn + head * (K_DIM * V_DIM)
    p_state += rows[:, None] * V_DIM + cols[None, :]
    state = tl.load(p_state, mask=m_state, other=0.0)
    q, k = _unit(q) * q_scale, _unit(k)
    # softplus, which is its argument where exp would overflow
    softplus = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    state *= tl.exp(rate * softplus)
    correction = (v - tl.sum(state * k[:, None], 0)) / (1.0 + tl.exp(-b))
    state += k[:, None] * correction[None, :]
    y = tl.sum(state * q[:, None], 0)
    if HAS_USED:
        m_state = m_state & (tl.load(used_ptr + row) != 0)
    tl.debug_barrier()
    tl.store(p_state, state, mask=m_state)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / V_DIM + eps) * weight
    z = z.to(tl.float32)
    out = y * z / (1.0 + tl.exp(-z))
    p_out = out_ptr + (row * NUM_HEADS + head) * V_DIM + cols
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=m_cols)


def delta_step(
    qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    state: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    used: Tensor | None = None,
) -> Tensor:
    """Return out [N, H Dv] in the dtype of qkv, and change state fp32 [N, H, Dk, Dv] in place.

    qkv is [N, 2 Hk Dk + H Dv], z [N, H, Dv], b and a [N, H]. A_log and dt_bias [H], norm_weight
    [Dv], all of any float dtype and contiguous. `used` bool [N] says which rows' states change.
    Rows may lie apart, and so may heads of z, b and a.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    num_rows = len(qkv)
    if state.ndim != 4 or len(state) != num_rows or state.dtype != torch.float32:
        raise ValueError(
            f"state must be [{num_rows}, H, Dk, Dv] float32, got {list(state.shape)} {state.dtype}"
        )
    _, num_heads, k_dim, v_dim = state.shape
    if num_rows and not state[0].is_contiguous():
        raise ValueError(f"state must have dense rows, got strides {state.stride()}")
    key_heads, rest = divmod(qkv.shape[1] - num_heads * v_dim, 2 * k_dim)
    if qkv.ndim != 2 or rest or key_heads < 1 or num_heads % key_heads or qkv.stride(1) != 1:
        raise ValueError(
            f"qkv must be [N, 2 Hk {k_dim} + {num_heads * v_dim}] of dense rows, Hk a divisor of "
            f"{num_heads}, got {list(qkv.shape)}, {qkv.stride()}"
        )
    for name, x, shape in (
        ("z", z, (num_rows, num_heads, v_dim)),
        ("b", b, (num_rows, num_heads)),
        ("a", a, (num_rows, num_heads)),
        ("A_log", A_log, (num_heads,)),
        ("dt_bias", dt_bias, (num_heads,)),
        ("norm_weight", norm_weight, (v_dim,)),
    ):
        if x.shape != shape or (name not in "ba" and x.stride(-1) != 1):
            raise ValueError(
                f"{name} must be {list(shape)} and dense, got {list(x.shape)}, {x.stride()}"
            )
    used = as_bytes(used, num_rows)
    out = torch.empty(num_rows, num_heads * v_dim, dtype=qkv.dtype, device=qkv.device)
    if out.numel() == 0:
        return out
    block_k, block_v = next_power_of_2(k_dim), next_power_of_2(v_dim)
    _delta_step_kernel[(num_rows * num_heads,)](
        qkv,
        z,
        b,
        a,
        state,
        A_log,
        dt_bias,
        norm_weight,
        used,
        out,
        eps,
        k_dim**-0.5,
        qkv.stride(0),
        *z.stride()[:2],
        *b.stride(),
        *a.stride(),
        state.stride(0),
        NUM_HEADS=num_heads,
        GROUPS=num_heads // key_heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        HAS_USED=used is not None,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        # 64 numbers of the state a thread.
        num_warps=min(16, max(1, block_k * block_v // 2048)),
        **launch_options(qkv.device),
    )
    return out
