"""router_logits: the gate's logits in fp32 for few tokens, from numbers of 16 bit or fp32.

    router_logits             logits = x.float() @ gate.float().T
    add_norm_router_logits    sum = x + update, normed = rmsnorm(sum), logits of normed

Nothing is widened in memory. A program makes the products of one token with a few experts in
registers, and asks for the gate before the kernel that computes x has finished. Each computes sum
and norm again, which costs less than a launch. Products of 16-bit numbers are exact in fp32, and
summed in it. Sum and normed x are rounded one after the other, as separate operations round them.

Legend: T tokens, H hidden, E experts.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.add_norm import add_rms_norm_ref
from moezoo.layers.kernels.overlap import launch_options, start_next, wait_for_previous
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2

FEW_TOKENS = 64
"""Most tokens: each reads the gate again. 64 take as long as torch's product (5 us)."""


def router_logits_ref(x: Tensor, gate: Tensor) -> Tensor:
    return F.linear(x.float(), gate.float())


def add_norm_router_logits_ref(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor,
    *,
    norm_weight: Tensor,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    normed, total = add_rms_norm_ref(x, update, norm_weight, eps, offset=offset)
    return router_logits_ref(normed, gate), normed, total


@triton.jit(do_not_specialize=["num_experts"])
def _router_logits_kernel(
    x_ptr,
    update_ptr,
    norm_ptr,
    gate_ptr,
    logits_ptr,
    normed_ptr,
    sum_ptr,
    num_experts,
    hidden_size,
    eps,
    stride_xt,
    stride_ut,
    stride_ge,
    HAS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_experts = experts < num_experts
    inner = tl.arange(0, BLOCK_H)[None, :]
    m_inner = inner < hidden_size
    p_gate = gate_ptr + experts[:, None] * stride_ge + inner
    gate = tl.load(p_gate, mask=m_experts[:, None] & m_inner, other=0.0)
    if HAS_NORM:
        norm = tl.load(norm_ptr + inner, mask=m_inner, other=0.0).to(tl.float32) + OFFSET
    wait_for_previous(OVERLAP)
    token = tl.program_id(1)
    # One program of each token stores sum and normed x.
    m_store = m_inner & (tl.program_id(0) == 0)
    x = tl.load(x_ptr + token * stride_xt + inner, mask=m_inner, other=0.0)
    if HAS_UPDATE:
        update = tl.load(update_ptr + token * stride_ut + inner, mask=m_inner, other=0.0)
        x = (x.to(tl.float32) + update.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + token * hidden_size + inner, x, mask=m_store)
    if HAS_NORM:
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 1) / hidden_size + eps)
        x = (wide * scale[:, None] * norm).to(x.dtype)
        tl.store(normed_ptr + token * hidden_size + inner, x, mask=m_store)
    logits = tl.sum(gate.to(tl.float32) * x.to(tl.float32), 1)
    tl.store(logits_ptr + token * num_experts + experts, logits, mask=m_experts)


def router_logits(x: Tensor, gate: Tensor) -> Tensor:
    """Return logits [T, E] fp32 of x [T, H], T <= FEW_TOKENS, and gate [E, H] of x's dtype.

    Last strides are 1. The gate must not be written by the kernel launched just before.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    return _launch(x, None, gate, norm_weight=None, eps=0.0)[0]


def add_norm_router_logits(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor,
    *,
    norm_weight: Tensor,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [T, E] fp32 of the normed sum, the normed sum and the sum, both [T, H].

    x and update [T, H] and gate [E, H] have one dtype, norm_weight [H] may have another. Strides
    and errors are those of `router_logits`. Without an update the sum is x itself, not a copy.
    `offset` is added to norm_weight.
    """
    return _launch(x, update, gate, norm_weight=norm_weight, eps=eps, offset=offset)


def _launch(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor,
    *,
    norm_weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.ndim != 2 or gate.ndim != 2 or x.shape[1] != gate.shape[1] or len(x) > FEW_TOKENS:
        raise ValueError(
            f"x must be [T, H] with T <= {FEW_TOKENS} and gate [E, H], "
            f"got {list(x.shape)} and {list(gate.shape)}"
        )
    (num_tokens, hidden_size), num_experts = x.shape, len(gate)
    if gate.dtype != x.dtype:
        raise ValueError(f"gate must be {x.dtype} as x is, got {gate.dtype}")
    if update is not None and (update.shape != x.shape or update.dtype != x.dtype):
        raise ValueError(
            f"update must be {list(x.shape)} {x.dtype} as x is, "
            f"got {list(update.shape)} {update.dtype}"
        )
    if norm_weight is not None and norm_weight.shape != (hidden_size,):
        raise ValueError(f"norm_weight must be [{hidden_size}], got {list(norm_weight.shape)}")
    operands = {"x": x, "update": update, "gate": gate, "norm_weight": norm_weight}
    for name, tensor in operands.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}'s last stride must be 1, got strides {tensor.stride()}")

    def rows() -> Tensor:
        return torch.empty(num_tokens, hidden_size, dtype=x.dtype, device=x.device)

    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
    normed = x if norm_weight is None else rows()
    total = x if update is None else rows()
    if num_tokens == 0:
        return logits, normed, total
    # Programs for a hundred multiprocessors come first, then sharing x.
    block_e = min(4, next_power_of_2(num_tokens))
    block_h = next_power_of_2(hidden_size)
    _router_logits_kernel[(max(1, cdiv(num_experts, block_e)), num_tokens)](
        x,
        update,
        norm_weight,
        gate,
        logits,
        normed,
        total,
        num_experts,
        hidden_size,
        eps,
        x.stride(0),
        0 if update is None else update.stride(0),
        gate.stride(0),
        HAS_NORM=norm_weight is not None,
        OFFSET=offset,
        HAS_UPDATE=update is not None,
        BLOCK_E=block_e,
        BLOCK_H=block_h,
        num_warps=8 if block_h > 4096 else 4,
        **launch_options(x.device),
    )
    return logits, normed, total
