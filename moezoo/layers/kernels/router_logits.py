"""router_logits: the gate's logits in fp32 for few tokens, from numbers of 16 bit or fp32.

    logits = x.float() @ gate.float().T

Nothing is widened in memory. A program makes the products of one token with a few experts in
registers, and asks for the gate before the kernel that computes x has finished. Products of 16-bit
numbers are exact in fp32, and summed in it.

Legend: T tokens, H hidden, E experts.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, start_next, wait_for_previous

FEW_TOKENS = 64
"""The most tokens: each reads the gate again. 64 take as long as a product of torch's (5 us)."""


def router_logits_ref(x: Tensor, gate: Tensor) -> Tensor:
    return F.linear(x.float(), gate.float())


@triton.jit(do_not_specialize=["num_experts"])
def _router_logits_kernel(
    x_ptr,
    gate_ptr,
    logits_ptr,
    num_experts,
    hidden_size,
    stride_xt,
    stride_ge,
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
    wait_for_previous(OVERLAP)
    token = tl.program_id(1)
    x = tl.load(x_ptr + token * stride_xt + inner, mask=m_inner, other=0.0)
    logits = tl.sum(gate.to(tl.float32) * x.to(tl.float32), 1)
    tl.store(logits_ptr + token * num_experts + experts, logits, mask=m_experts)


def router_logits(x: Tensor, gate: Tensor) -> Tensor:
    """x [T, H] with T <= FEW_TOKENS, gate [E, H] of x's dtype -> logits [T, E] fp32.

    Last strides are 1. The gate must not be written by the kernel launched just before.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    if x.ndim != 2 or gate.ndim != 2 or x.shape[1] != gate.shape[1] or len(x) > FEW_TOKENS:
        raise ValueError(
            f"x must be [T, H] with T <= {FEW_TOKENS} and gate [E, H], "
            f"got {list(x.shape)} and {list(gate.shape)}"
        )
    if gate.dtype != x.dtype:
        raise ValueError(f"gate must be {x.dtype} as x is, got {gate.dtype}")
    for name, tensor in (("x", x), ("gate", gate)):
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"{name}'s last stride must be 1, got strides {tensor.stride()}")
    (num_tokens, hidden_size), num_experts = x.shape, len(gate)
    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
    if logits.numel() == 0:
        return logits
    # Programs for a hundred multiprocessors come first, then sharing x.
    block_e = min(4, triton.next_power_of_2(num_tokens))
    block_h = triton.next_power_of_2(hidden_size)
    _router_logits_kernel[(triton.cdiv(num_experts, block_e), num_tokens)](
        x,
        gate,
        logits,
        num_experts,
        hidden_size,
        x.stride(0),
        gate.stride(0),
        BLOCK_E=block_e,
        BLOCK_H=block_h,
        num_warps=8 if block_h > 4096 else 4,
        **launch_options(x.device),
    )
    return logits
