"""gate: the gated activation of a dense layer, between its two products.

    out = activation(gate) * up

and with `Gating`'s bounds where there are some. In fp32, rounded once.

Legend: N rows, I intermediate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.kernels.gated_up import activate_gated
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2


def gate_ref(gate_up: Tensor, activation: str | Gating = "silu") -> Tensor:
    return Gating.of(activation)(*gate_up.float().chunk(2, -1)).to(gate_up.dtype)


@triton.jit
def _gate_kernel(
    gate_up_ptr,
    out_ptr,
    intermediate_size,
    stride_n,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BLOCK_I: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_cols = cols < intermediate_size
    p_gate = gate_up_ptr + row * stride_n + cols
    gate = tl.load(p_gate, mask=m_cols, other=0.0).to(tl.float32)
    up = tl.load(p_gate + intermediate_size, mask=m_cols, other=0.0).to(tl.float32)
    out = activate_gated(gate, up, ACTIVATION, LIMIT, UP_OFFSET)
    p_out = out_ptr + row * intermediate_size + cols
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=m_cols)


def gate(gate_up: Tensor, activation: str | Gating = "silu") -> Tensor:
    """Return the gated activation [N, I] of gate_up [N, 2I], each row gate before up.

    Rows may lie apart.

    Raises ValueError for a shape or strides that do not fit, and for an unknown activation.
    """
    gating = Gating.of(activation)
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"gate_up must be [N, 2I] of dense rows, got {list(gate_up.shape)}, {gate_up.stride()}"
        )
    num_rows, intermediate_size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, intermediate_size, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    block = min(1024, next_power_of_2(intermediate_size))
    _gate_kernel[(num_rows, cdiv(intermediate_size, block))](
        gate_up,
        out,
        intermediate_size,
        gate_up.stride(0),
        ACTIVATION=ACTIVATIONS[gating.activation].__name__,
        LIMIT=gating.limit,
        UP_OFFSET=gating.up_offset,
        BLOCK_I=block,
        **launch_options(gate_up.device),
    )
    return out
