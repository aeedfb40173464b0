"""router_logits: the gate's logits in fp32, from numbers of 16 bit or fp32.

    logits = x.float() @ gate.float().T

Nothing is widened in memory. A product of two 16-bit numbers is exact in fp32, so matrix units may
make it; sums are fp32. For few tokens a program makes the products of one of them with a few
experts in registers, and asks for the gate before the kernel that computes x has finished.

Legend: T tokens, H hidden, E experts.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, start_next, wait, wait_for_previous

REGISTER_TOKENS = 16
"""For more tokens the matrix units make the products."""


def router_logits_ref(x: Tensor, gate: Tensor) -> Tensor:
    return F.linear(x.float(), gate.float())


@triton.jit(do_not_specialize=["num_experts"])
def _few_tokens_kernel(
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


@triton.jit(do_not_specialize=["num_tokens", "num_experts"])
def _many_tokens_kernel(
    x_ptr,
    gate_ptr,
    logits_ptr,
    num_tokens,
    num_experts,
    hidden_size,
    stride_xt,
    stride_ge,
    EVEN_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_tokens = tokens < num_tokens
    m_experts = experts < num_experts
    inner = tl.arange(0, BLOCK_H)
    # Tokens and experts past the end read the first one, and are not stored.
    x_rows = tl.where(m_tokens, tokens, 0).to(tl.int64)
    p_x = x_ptr + x_rows[:, None] * stride_xt + inner[None, :]
    p_gate = gate_ptr + tl.where(m_experts, experts, 0)[:, None] * stride_ge + inner[None, :]
    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        if EVEN_H:
            x = tl.load(p_x)
            gate = tl.load(p_gate)
        else:
            m_inner = (start + inner < hidden_size)[None, :]
            x = tl.load(p_x, mask=m_inner, other=0.0)
            gate = tl.load(p_gate, mask=m_inner, other=0.0)
        logits = tl.dot(x, gate.T, logits, input_precision="ieee")
        p_x += BLOCK_H
        p_gate += BLOCK_H
    p_logits = logits_ptr + tokens.to(tl.int64)[:, None] * num_experts + experts[None, :]
    tl.store(p_logits, logits, mask=m_tokens[:, None] & m_experts[None, :])


def router_logits(x: Tensor, gate: Tensor) -> Tensor:
    """x [T, H], gate [E, H] of x's dtype -> logits [T, E] fp32. Last strides are 1.

    The gate must not be written by the kernel launched just before.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    if x.ndim != 2 or gate.ndim != 2 or x.shape[1] != gate.shape[1] or x.dtype != gate.dtype:
        raise ValueError(
            f"x must be [T, H] and gate [E, H] of one dtype, "
            f"got {list(x.shape)} {x.dtype} and {list(gate.shape)} {gate.dtype}"
        )
    for name, tensor in (("x", x), ("gate", gate)):
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"{name}'s last stride must be 1, got strides {tensor.stride()}")
    (num_tokens, hidden_size), num_experts = x.shape, len(gate)
    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
    if logits.numel() == 0:
        return logits
    options = launch_options(x.device)
    if num_tokens <= REGISTER_TOKENS:
        # Programs for a hundred multiprocessors come first, then sharing x.
        block_e = min(4, triton.next_power_of_2(num_tokens))
        block_h = triton.next_power_of_2(hidden_size)
        _few_tokens_kernel[(triton.cdiv(num_experts, block_e), num_tokens)](
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
            **options,
        )
        return logits
    if x.dtype == torch.float32:
        block_t, block_e, block_h, num_warps = 16, 16, 32, 2
    elif num_tokens <= 256:
        block_t, block_e, block_h, num_warps = 16, 16, 128, 2
    else:
        block_t, block_e, block_h, num_warps = 64, 64, 64, 4
    _many_tokens_kernel[(triton.cdiv(num_experts, block_e), triton.cdiv(num_tokens, block_t))](
        x,
        gate,
        logits,
        num_tokens,
        num_experts,
        hidden_size,
        x.stride(0),
        gate.stride(0),
        EVEN_H=hidden_size % block_h == 0,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_H=block_h,
        num_warps=num_warps,
        num_stages=4,
        **options,
    )
    return logits
