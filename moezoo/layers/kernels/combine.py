"""combine: the weighted sum of each token's K rows.

    out[t] = sum over k with positions[t, k] >= 0 of topk_weights[t, k] * y[positions[t, k]]

Products and sum are fp32, in rising order of k, and rounded once.

Legend: T tokens, K experts per token, S = T*K rows, H hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2


def combine_ref(y: Tensor, topk_weights: Tensor, positions: Tensor) -> Tensor:
    present = (positions >= 0).unsqueeze(-1)
    rows = y[positions.clamp(min=0).long()].float()
    weighted = (rows * topk_weights.unsqueeze(-1)).masked_fill(~present, 0.0)
    return weighted.sum(1).to(y.dtype)


@triton.jit
def _combine_kernel(
    y_ptr,
    weights_ptr,
    positions_ptr,
    out_ptr,
    hidden_size,
    stride_wt,
    stride_wk,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_cols = cols < hidden_size
    # Router and `permute` had finished before the first product let the second one start.
    positions = ()
    weights = ()
    for k in tl.static_range(K):
        positions += (tl.load(positions_ptr + token * K + k).to(tl.int64),)
        weights += (tl.load(weights_ptr + token * stride_wt + k * stride_wk),)
    wait(OVERLAP)
    out = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(K):
        # Nobody wrote a row for an absent expert.
        present = positions[k] >= 0
        p_y = y_ptr + positions[k] * hidden_size + cols
        y = tl.load(p_y, mask=m_cols & present, other=0.0).to(tl.float32)
        out += tl.where(present, weights[k] * y, 0.0)
    tl.store(out_ptr + token * hidden_size + cols, out.to(out_ptr.dtype.element_ty), mask=m_cols)


def combine(y: Tensor, topk_weights: Tensor, positions: Tensor) -> Tensor:
    """Return each token's weighted sum of rows, [T, H] in y's dtype.

    y [S, H] and positions [T, K] int32 are contiguous, topk_weights [T, K] fp32 has any strides.

    The kernel launched just before may write y, but neither weights nor positions.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    if y.ndim != 2 or not y.is_contiguous():
        raise ValueError(f"y must be [S, H] and contiguous, got {list(y.shape)}, {y.stride()}")
    if not positions.is_contiguous():
        raise ValueError(f"positions must be contiguous, got strides {positions.stride()}")
    num_tokens, k = positions.shape
    if topk_weights.shape != positions.shape or y.shape[0] != positions.numel():
        raise ValueError(
            f"topk_weights must be {list(positions.shape)} and y [{positions.numel()}, H] as "
            f"positions are, got {list(topk_weights.shape)} and {list(y.shape)}"
        )
    if topk_weights.dtype != torch.float32:
        raise ValueError(f"topk_weights must be float32, got {topk_weights.dtype}")
    hidden_size = y.shape[1]
    out = torch.empty(num_tokens, hidden_size, dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    block = min(1024, next_power_of_2(hidden_size))
    _combine_kernel[(num_tokens, cdiv(hidden_size, block))](
        y,
        topk_weights,
        positions,
        out,
        hidden_size,
        *topk_weights.stride(),
        K=k,
        BLOCK_H=block,
        **launch_options(y.device),
    )
    return out
