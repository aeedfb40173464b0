"""add_rms_norm: a residual added, and RMSNorm of the sum.

    sum    = x + residual
    normed = sum / sqrt(mean(sum^2) + eps) * (offset + weight)

The sum is fp32 and rounded once; the norm is computed in fp32 of the rounded sum, and rounded once.

Legend: N rows, H hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import next_power_of_2

LARGEST_BLOCK = 8192
"""Most numbers of a row that a program keeps in registers. Longer rows are read twice."""


def add_rms_norm_ref(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    normed = F.rms_norm(total.float(), weight.shape, offset + weight.float(), eps)
    return normed.to(x.dtype), total


@triton.jit
def _add(p_x, p_residual, p_sum, cols, m_cols, HAS_RESIDUAL: tl.constexpr, STORE_SUM: tl.constexpr):
    """fp32 numbers of a row of the rounded sum."""
    x = tl.load(p_x + cols, mask=m_cols, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(p_residual + cols, mask=m_cols, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        if STORE_SUM:
            tl.store(p_sum + cols, x, mask=m_cols)
    return x.to(tl.float32)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    sum_ptr,
    hidden_size,
    eps,
    stride_x,
    stride_residual,
    OFFSET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    inner = tl.arange(0, BLOCK_H)
    if ONE_BLOCK:
        m_inner = inner < hidden_size
        weight = tl.load(weight_ptr + inner, mask=m_inner, other=0.0).to(tl.float32) + OFFSET
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    p_x = x_ptr + row * stride_x
    p_residual = residual_ptr
    p_sum = sum_ptr
    if HAS_RESIDUAL:
        p_residual += row * stride_residual
        p_sum += row * hidden_size
    p_normed = normed_ptr + row * hidden_size
    dtype = normed_ptr.dtype.element_ty
    if ONE_BLOCK:
        x = _add(p_x, p_residual, p_sum, inner, m_inner, HAS_RESIDUAL, True)
        scale = tl.rsqrt(tl.sum(x * x, 0) / hidden_size + eps)
        tl.store(p_normed + inner, (x * scale * weight).to(dtype), mask=m_inner)
    else:
        squares = tl.zeros([BLOCK_H], tl.float32)
        for start in range(0, hidden_size, BLOCK_H):
            cols = start + inner
            x = _add(p_x, p_residual, p_sum, cols, cols < hidden_size, HAS_RESIDUAL, True)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, 0) / hidden_size + eps)
        for start in range(0, hidden_size, BLOCK_H):
            cols = start + inner
            m_cols = cols < hidden_size
            x = _add(p_x, p_residual, p_sum, cols, m_cols, HAS_RESIDUAL, False)
            weight = tl.load(weight_ptr + cols, mask=m_cols, other=0.0).to(tl.float32) + OFFSET
            tl.store(p_normed + cols, (x * scale * weight).to(dtype), mask=m_cols)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the norm and the sum: x and residual [N, H], weight [H] -> normed [N, H], sum [N, H].

    x and residual have one dtype, weight may have another.

    Rows of x and residual may lie apart. Without a residual the sum is x itself, not a copy.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    if x.ndim != 2 or x.stride(1) != 1:
        raise ValueError(f"x must be [N, H] of dense rows, got {list(x.shape)}, {x.stride()}")
    num_rows, hidden_size = x.shape
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {list(x.shape)} {x.dtype} as x is, "
            f"got {list(residual.shape)} {residual.dtype}"
        )
    if residual is not None and residual.stride(1) != 1:
        raise ValueError(f"residual must have dense rows, got strides {residual.stride()}")
    if weight.shape != (hidden_size,) or not weight.is_contiguous():
        raise ValueError(
            f"weight must be [{hidden_size}] and contiguous, "
            f"got {list(weight.shape)}, {weight.stride()}"
        )
    normed = torch.empty(num_rows, hidden_size, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    if normed.numel() == 0:
        return normed, total
    block = min(LARGEST_BLOCK, next_power_of_2(hidden_size))
    _add_rms_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        normed,
        None if residual is None else total,
        hidden_size,
        eps,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        OFFSET=offset,
        HAS_RESIDUAL=residual is not None,
        ONE_BLOCK=block >= hidden_size,
        BLOCK_H=block,
        # 16 bytes a thread, of 16-bit numbers.
        num_warps=min(16, max(1, block // 256)),
        **launch_options(x.device),
    )
    return normed, total
