"""combine: the weighted sum of each token's K rows.

    out[t] = sum over k with topk_ids[t, k] >= 0 of topk_weights[t, k] * y[t, k]

Products and sum are fp32, in rising order of k, and rounded once.

Legend: T tokens, K experts per token, H hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def combine_ref(y: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    present = (topk_ids >= 0).unsqueeze(-1)
    weighted = (y.float() * topk_weights.unsqueeze(-1)).masked_fill(~present, 0.0)
    return weighted.sum(1).to(y.dtype)


@triton.jit
def _combine_kernel(
    y_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    hidden_size,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_cols = cols < hidden_size
    out = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(K):
        row = token * K + k
        y = tl.load(y_ptr + row * hidden_size + cols, mask=m_cols, other=0.0).to(tl.float32)
        weighted = tl.load(weights_ptr + row) * y
        # Nobody wrote the row of an absent expert.
        out += tl.where(tl.load(ids_ptr + row) >= 0, weighted, 0.0)
    tl.store(out_ptr + token * hidden_size + cols, out.to(out_ptr.dtype.element_ty), mask=m_cols)


def combine(y: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """y [T, K, H] contiguous, topk_weights [T, K] fp32, topk_ids [T, K] -> [T, H] in y's dtype.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    if y.ndim != 3 or not y.is_contiguous():
        raise ValueError(f"y must be [T, K, H] and contiguous, got {list(y.shape)}, {y.stride()}")
    num_tokens, k, hidden_size = y.shape
    for name, tensor in (("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        if tensor.shape != (num_tokens, k):
            raise ValueError(f"{name} must be [{num_tokens}, {k}], got {list(tensor.shape)}")
    if topk_weights.dtype != torch.float32:
        raise ValueError(f"topk_weights must be float32, got {topk_weights.dtype}")
    out = torch.empty(num_tokens, hidden_size, dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    block = min(1024, triton.next_power_of_2(hidden_size))
    _combine_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        y,
        topk_weights.contiguous(),
        topk_ids.contiguous(),
        out,
        hidden_size,
        K=k,
        BLOCK_H=block,
    )
    return out
