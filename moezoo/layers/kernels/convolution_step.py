"""convolution_step: one more input of a causal convolution, each channel for itself.

    window = window without its oldest input, and x     where the row is used
    y      = activation(sum_w weight[w] * window[w] + bias)

The sum is fp32, and y rounded once.

Legend: N rows, C channels, W width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS
from moezoo.layers.kernels.gated_up import activate
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2

BLOCK_C = 256


def convolution_step_ref(
    x: Tensor,
    window: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    used: Tensor | None = None,
) -> Tensor:
    new = torch.cat((window[..., 1:], x[..., None]), -1)
    y = (new.float() * weight.float()).sum(-1)
    if bias is not None:
        y = y + bias.float()
    window.copy_(new if used is None else torch.where(used[:, None, None], new, window))
    return (y if activation is None else ACTIVATIONS[activation](y)).to(x.dtype)


@triton.jit
def _convolution_step_kernel(
    x_ptr,
    window_ptr,
    weight_ptr,
    bias_ptr,
    used_ptr,
    y_ptr,
    num_channels,
    stride_x,
    stride_wn,
    stride_wc,
    stride_ww,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_USED: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    taps = tl.arange(0, BLOCK_W)[None, :]
    m_channels = channels < num_channels
    m_taps = m_channels[:, None] & (taps < WIDTH)
    o_weight = channels[:, None] * WIDTH + taps
    weight = tl.load(weight_ptr + o_weight, mask=m_taps, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=m_channels, other=0.0).to(tl.float32)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    p_window = window_ptr + row * stride_wn + channels[:, None] * stride_wc + taps * stride_ww
    x = tl.load(x_ptr + row * stride_x + channels, mask=m_channels, other=0.0)
    older = tl.load(p_window + stride_ww, mask=m_taps & (taps < WIDTH - 1), other=0.0)
    window = tl.where(taps == WIDTH - 1, x[:, None], older)
    y = tl.sum(window.to(tl.float32) * weight, 1) + bias
    if ACTIVATION is not None:
        y = activate(y, ACTIVATION)
    tl.store(y_ptr + row * num_channels + channels, y.to(y_ptr.dtype.element_ty), mask=m_channels)
    if HAS_USED:
        m_taps = m_taps & (tl.load(used_ptr + row) != 0)
    # Another thread may have yet to read what this one writes.
    tl.debug_barrier()
    tl.store(p_window, window, mask=m_taps)


def convolution_step(
    x: Tensor,
    window: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    used: Tensor | None = None,
) -> Tensor:
    """Return y [N, C] for the next inputs x [N, C], and change window [N, C, W] in place.

    x and window have one dtype; weight is [C, W], bias [C].

    `used` bool [N] says which rows' windows change. Rows of x, and all of window, may lie apart;
    weight, bias and `used` are contiguous.

    Raises ValueError for shapes, dtypes or strides that do not fit, and an unknown activation.
    """
    num_rows, num_channels = x.shape
    width = weight.shape[-1]
    if window.shape != (num_rows, num_channels, width) or window.dtype != x.dtype:
        raise ValueError(
            f"window must be {[num_rows, num_channels, width]} {x.dtype}, "
            f"got {list(window.shape)} {window.dtype}"
        )
    if weight.shape != (num_channels, width) or not weight.is_contiguous():
        raise ValueError(
            f"weight must be [{num_channels}, W] and contiguous, "
            f"got {list(weight.shape)}, {weight.stride()}"
        )
    if bias is not None and (bias.shape != (num_channels,) or not bias.is_contiguous()):
        raise ValueError(f"bias must be [{num_channels}] and contiguous, got {list(bias.shape)}")
    if x.stride(1) != 1:
        raise ValueError(f"x must have dense rows, got strides {x.stride()}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    used = as_bytes(used, num_rows)
    y = torch.empty(num_rows, num_channels, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    _convolution_step_kernel[(num_rows, cdiv(num_channels, BLOCK_C))](
        x,
        window,
        weight,
        bias,
        used,
        y,
        num_channels,
        x.stride(0),
        *window.stride(),
        WIDTH=width,
        HAS_BIAS=bias is not None,
        ACTIVATION=None if activation is None else ACTIVATIONS[activation].__name__,
        HAS_USED=used is not None,
        BLOCK_W=next_power_of_2(width),
        BLOCK_C=BLOCK_C,
        **launch_options(x.device),
    )
    return y


def as_bytes(used: Tensor | None, num_rows: int) -> Tensor | None:
    """Return `used` as bytes for the kernels of steps; raise ValueError unless bool [num_rows]."""
    if used is None:
        return None
    if used.shape != (num_rows,) or used.dtype != torch.bool or not used.is_contiguous():
        raise ValueError(
            f"used must be [{num_rows}] bool and contiguous, got {list(used.shape)} {used.dtype}"
        )
    return used.view(torch.uint8)
