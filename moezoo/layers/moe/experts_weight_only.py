"""Experts whose weights alone are quantised, on CUDA: the kernels dequantise what they read."""

from torch import Tensor

from moezoo.layers.kernels.activations import Gating
from moezoo.layers.moe.dequantized import dequantized_experts
from moezoo.layers.quant import Format


def weight_only_cuda(
    x: Tensor,
    w13: Format,
    w2: Format,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    gating: Gating,
    bias13: Tensor | None,
    bias2: Tensor | None,
    num_experts: int,
) -> Tensor:
    """w13 [E, 2 or 1, I, H]; topk_ids [T, K] are rows of w13, or negative, and spread over
    num_experts, those of other ranks included."""
    return dequantized_experts(
        x, w13, w2, topk_weights, topk_ids, gating=gating, bias13=bias13, bias2=bias2
    )
