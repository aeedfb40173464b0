"""Experts with weight-only quantisation on CUDA: the kernels dequantise the weights they read.

Legend: S chosen rows; otherwise as in `experts`.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moezoo.layers.kernels.activations import Gating
from moezoo.layers.moe.ranges import profiler_range
from moezoo.layers.quant import Mxfp4, WeightOnly

ORDERED_TOKENS = 2048
"""Number of tokens worked on at a time where columns have an order of their own: gathering takes
8 bytes for each number."""


def weight_only_cuda(
    x: Tensor,
    w13: WeightOnly,
    w2: WeightOnly,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    gating: Gating,
    bias13: Tensor | None,
    bias2: Tensor | None,
    num_experts: int,
) -> Tensor:
    """Compute `fused_experts` with w13 [E, 2 or 1, I, H].

    topk_ids [T, K] are rows of w13, or negative. Tokens choose from num_experts experts, those of
    other ranks included.
    """
    from moezoo.layers.kernels.combine import combine
    from moezoo.layers.kernels.down_weight_only import down_weight_only
    from moezoo.layers.kernels.few_tokens_weight_only import few_tokens_weight_only, is_faster
    from moezoo.layers.kernels.gated_up_weight_only import gated_up_weight_only
    from moezoo.layers.kernels.interleave import permute_and_interleave
    from moezoo.layers.kernels.packed_operand import ways
    from moezoo.layers.kernels.weight_only_tiles import plan_weight_only

    if x.dtype.itemsize == 2 and is_faster(w13, w2, *topk_ids.shape):
        return few_tokens_weight_only(
            *(x, w13, w2),
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=gating,
            bias13=bias13,
            bias2=bias2,
        )
    if w13.order is not None or w2.order is not None:
        parts = (tensor.split(ORDERED_TOKENS) for tensor in (x, topk_weights, topk_ids))
        settings: Any = {"gating": gating, "bias13": bias13, "bias2": bias2}
        return torch.cat(
            [
                _in_order(some, w13, w2, weights, ids, **settings, num_experts=num_experts)
                for some, weights, ids in zip(*parts, strict=True)
            ]
        )
    tiles = plan_weight_only(x, w13, w2, num_rows=topk_ids.numel(), num_experts=num_experts)
    with profiler_range("permute"):
        rows, x = permute_and_interleave(
            *(x, topk_ids, w13.shape[0], tiles.gated_up.m), ways=ways(type(w13), x.shape[1])
        )
    h = gated_up_weight_only(
        *(x, w13, rows),
        k=topk_ids.shape[1],
        tile=tiles.gated_up,
        activation=gating,
        bias13=bias13,
    )
    y = down_weight_only(h, w2, rows, tile=tiles.down, bias2=bias2)
    with profiler_range("combine"):
        return combine(y, topk_weights, rows.positions)


def _in_order(
    x: Tensor,
    w13: WeightOnly,
    w2: WeightOnly,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    gating: Gating,
    bias13: Tensor | None,
    bias2: Tensor | None,
    num_experts: int,
) -> Tensor:
    """Compute `weight_only_cuda` where columns have an order of their own (`Int4.order`).

    The numbers of each chosen row are gathered in that order before it is multiplied. Gate and up
    are separate products, rounded before the activation.
    """
    from moezoo.layers.kernels.combine import combine
    from moezoo.layers.kernels.down_weight_only import down_weight_only
    from moezoo.layers.kernels.interleave import interleave
    from moezoo.layers.kernels.packed_operand import ways
    from moezoo.layers.kernels.permute import permute
    from moezoo.layers.kernels.weight_only_tiles import plan_weight_only

    tile = plan_weight_only(x, w13, w2, num_rows=topk_ids.numel(), num_experts=num_experts).down
    with profiler_range("permute"):
        rows = permute(topk_ids, w13.shape[0], tile.m)
    last_row, last_expert = topk_ids.numel() - 1, w13.shape[0] - 1
    # The order of rows without an expert is not initialised, and their results are not read.
    tokens = rows.order.clamp(0, last_row) // topk_ids.shape[1]
    positions = torch.arange(last_row + 1, dtype=torch.int32, device=x.device)
    experts = torch.searchsorted(rows.offsets[1:], positions, right=True).clamp(max=last_expert)

    def product(x: Tensor, w: WeightOnly, bias: Tensor | None) -> Tensor:
        """Multiply x [S, K], in expert order, by w [E, N, K]; return [S, N]."""
        if not isinstance(w, Mxfp4) and w.order is not None:
            x = x.gather(1, w.order[experts].long())
            w = replace(w, order=None)
        x = interleave(x, ways(type(w), w.shape[-1]))
        return down_weight_only(x, w, rows, tile=tile, bias2=bias)

    chosen = x[tokens]
    h = gating(
        *(
            product(chosen, _part(w13, p), None if bias13 is None else bias13[:, p]).float()
            for p in range(w13.shape[1])
        )
    )
    y = product(h.to(x.dtype), w2, bias2)
    with profiler_range("combine"):
        return combine(y, topk_weights, rows.positions)


def _part(w13: WeightOnly, part: int) -> WeightOnly:
    """Return gate or up weights [E, I, H] of w13 [E, P, I, H]."""
    return w13.map(lambda tensor: tensor.select(1, part))
