"""Quantised experts: a loop in torch on CPU, kernels on CUDA, and an operator for each format."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moezoo.layers.kernels.activations import Gating
from moezoo.layers.moe.chunks import in_chunks, local_ids, operator
from moezoo.layers.moe.dequantized import dequantized_experts
from moezoo.layers.moe.experts_fp8 import fp8_cuda
from moezoo.layers.moe.experts_weight_only import weight_only_cuda
from moezoo.layers.quant import FORMATS, Format


def quantized_experts(
    x: Tensor,
    w13: Format,
    w2: Format,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    gating: Gating,
    bias13: Tensor | None,
    bias2: Tensor | None,
    expert_map: Tensor | None,
) -> Tensor:
    """Compute `fused_experts` with quantised weights, w13 being [E, 2 or 1, I, H]."""
    settings: Any = {"gating": gating, "bias13": bias13, "bias2": bias2}
    num_experts = w13.shape[0] if expert_map is None else len(expert_map)

    def chunk(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        if topk_ids.numel() == 0 or w13.shape[0] == 0:
            return torch.zeros_like(x)
        arguments: Any = (x, w13, w2, topk_weights, topk_ids)
        if not x.is_cuda:
            return dequantized_experts(*arguments, **settings)
        on_cuda = fp8_cuda if w13.quantizes_activations else weight_only_cuda
        with torch.cuda.device_of(x):
            return on_cuda(*arguments, **settings, num_experts=num_experts)

    return in_chunks(chunk, x, topk_weights, local_ids(topk_ids, expert_map))


def _operator(name: str, from_tensors: Any) -> Any:
    """Return the operator of a format; `from_tensors` is the format, called with its tensors."""

    def fused_experts(
        x: Tensor,
        w13: Sequence[Tensor | None],
        w2: Sequence[Tensor | None],
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: str,
        bias13: Tensor | None,
        bias2: Tensor | None,
        expert_map: Tensor | None,
        limit: float | None = None,
        up_offset: float = 0.0,
    ) -> Tensor:
        return quantized_experts(
            *(x, from_tensors(*w13), from_tensors(*w2), topk_weights, topk_ids),
            gating=Gating(activation, limit, up_offset),
            bias13=bias13,
            bias2=bias2,
            expert_map=expert_map,
        )

    return operator(f"moezoo::fused_experts_{name}", fused_experts, fused_experts)


OPERATORS = {format_: _operator(name, format_) for name, format_ in FORMATS.items()}
"""Operators by format; they take the tensors of w13 and w2 in the order of their fields."""
