"""Quantised experts of any format on the CPU.

Experts are dequantised one at a time, so beside the rows one expert's matrices are in memory, in
fp32.
"""

import torch
from torch import Tensor

from moezoo.layers.kernels.activations import Gating
from moezoo.layers.moe.permute import check_ids, permute
from moezoo.layers.moe.ranges import profiler_range
from moezoo.layers.quant import Format
from moezoo.layers.quant.fp8 import quantize_rows


def dequantized_experts(
    x: Tensor,
    w13: Format,
    w2: Format,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    gating: Gating,
    bias13: Tensor | None,
    bias2: Tensor | None,
) -> Tensor:
    """Compute `fused_experts` with w13 [E, 2 or 1, I, H]; topk_ids are rows of w13, or negative."""
    num_experts = w13.shape[0]

    def rounded(rows: Tensor) -> Tensor:
        """Round fp32 rows to what the products take."""
        if w13.quantizes_activations:
            return quantize_rows(rows).dequantize()[:, : rows.shape[1]]
        return rows.to(x.dtype).float()

    def of_expert(e: int, rows: Tensor) -> Tensor:
        parts = rows @ w13[e].dequantize().mT  # [2 or 1, S, I]
        if bias13 is not None:
            parts += bias13[e].float().unsqueeze(1)
        y = rounded(gating(*parts)) @ w2[e].dequantize().mT
        if bias2 is not None:
            y += bias2[e].float()
        return y.to(x.dtype).float()

    tokens = rounded(x.float())
    out = torch.zeros_like(tokens)
    with profiler_range("permute"):
        order, offsets = permute(topk_ids, num_experts)
    token_ids = order // topk_ids.shape[1]
    weights = topk_weights.flatten().index_select(0, order).unsqueeze(1)
    bounds = offsets.tolist()
    if bounds[-1] < len(order):
        check_ids(topk_ids, num_experts)
    for e in range(num_experts):
        rows = slice(bounds[e], bounds[e + 1])
        if rows.start < rows.stop:
            y = of_expert(e, tokens[token_ids[rows]])
            out.index_add_(0, token_ids[rows], y * weights[rows])
    return out.to(x.dtype)
