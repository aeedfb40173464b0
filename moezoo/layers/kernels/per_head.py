"""absorb_query and expand_values: MLA's absorbed projections, a matrix per head, on few rows.

    absorb_query     out[t, n, :C] = q[t, n, :I] @ key[n],  out[t, n, C:] = q[t, n, I:]
    expand_values    out[t, n]     = value[n] @ x[t, n]

A program holds some of a head's weights in registers; it asks for them before the kernel that
computes x has finished. Products accumulate in fp32 and are rounded once.

Legend: T rows, N heads, C latent width, I width of a query without its rotated part, R rotated
width, V width of a value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, start_next, wait_for_previous
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2

FEW_ROWS = 8
"""Most rows: each reads the weights from registers once more."""

TILE = 8192
"""Number of weights that a program holds: 64 per thread."""


def absorb_query_ref(q: Tensor, key: Tensor) -> Tensor:
    nope, rest = q.split_with_sizes((key.shape[1], q.shape[2] - key.shape[1]), -1)
    absorbed = torch.einsum("tni,nic->tnc", nope.float(), key.float()).to(q.dtype)
    return torch.cat((absorbed, rest), -1)


def expand_values_ref(x: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("tnc,nvc->tnv", x.float(), value.float()).to(x.dtype)


@triton.jit
def _per_head_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    num_inner,
    num_outer,
    num_rest,
    stride_xt,
    stride_xn,
    stride_wn,
    stride_wo,
    stride_wi,
    stride_ot,
    stride_on,
    T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t, n, o] = sum over i of w[n, o, i] x[t, n, i]; with BLOCK_R the last program of a head
    copies what follows in x."""
    start_next(OVERLAP)
    head = tl.program_id(0)
    outer = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inner = tl.arange(0, BLOCK_I)
    m_outer, m_inner = outer < num_outer, inner < num_inner
    p_w = w_ptr + head.to(tl.int64) * stride_wn
    p_w += outer[:, None] * stride_wo + inner[None, :] * stride_wi
    w = tl.load(p_w, mask=m_outer[:, None] & m_inner[None, :], other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    for t in tl.static_range(T):
        p_x = x_ptr + t * stride_xt + head * stride_xn
        p_out = out_ptr + t * stride_ot + head * stride_on
        x = tl.load(p_x + inner, mask=m_inner, other=0.0).to(tl.float32)
        y = tl.sum(w * x[None, :], 1)
        tl.store(p_out + outer, y.to(out_ptr.dtype.element_ty), mask=m_outer)
        if BLOCK_R:
            rest = tl.arange(0, BLOCK_R)
            m_rest = (rest < num_rest) & (tl.program_id(1) == tl.num_programs(1) - 1)
            tail = tl.load(p_x + num_inner + rest, mask=m_rest, other=0.0)
            tl.store(p_out + num_outer + rest, tail, mask=m_rest)


def absorb_query(q: Tensor, key: Tensor) -> Tensor:
    """Return absorbed queries: q [T, N, I + R], T <= FEW_ROWS, key [N, I, C] -> [T, N, C + R].

    q and key have one dtype.
    Heads of q are dense; key has any strides, and must not be written by the kernel launched just
    before.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    rest = q.shape[-1] - key.shape[1]
    return _launch("q", q, "key", key.transpose(1, 2), rest)


def expand_values(x: Tensor, value: Tensor) -> Tensor:
    """Return values of heads: x [T, N, C], T <= FEW_ROWS, value [N, V, C] -> [T, N, V].

    Strides, dtypes and errors are those of `absorb_query`.
    """
    return _launch("x", x, "value", value, x.shape[-1] - value.shape[2])


def _launch(x_name: str, x: Tensor, w_name: str, w: Tensor, rest: int) -> Tensor:
    """Launch the kernel for weights w [N, O, I]."""
    num_heads, num_outer, num_inner = w.shape
    fits = x.ndim == 3 and x.shape[1] == num_heads and len(x) <= FEW_ROWS and x.dtype == w.dtype
    if not fits or rest < 0 or (rest and w_name == "value"):
        raise ValueError(
            f"{x_name} must be [T, {num_heads}, ..] of {w.dtype} with T <= {FEW_ROWS} as "
            f"{w_name} {list(w.shape)} has it, got {list(x.shape)} {x.dtype}"
        )
    if x.stride(2) != 1:
        raise ValueError(f"{x_name} must have dense heads, got strides {x.stride()}")
    out = x.new_empty(len(x), num_heads, num_outer + rest)
    if out.numel() == 0:
        return out
    block_i = next_power_of_2(num_inner)
    block_o = min(max(1, TILE // block_i), next_power_of_2(num_outer))
    _per_head_kernel[(num_heads, cdiv(num_outer, block_o))](
        *(x, w, out, num_inner, num_outer, rest),
        *x.stride()[:2],
        *w.stride(),
        *out.stride()[:2],
        T=len(x),
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        BLOCK_R=next_power_of_2(rest) if rest else 0,
        num_warps=4,
        **launch_options(x.device),
    )
    return out
