"""Grouping the T*K chosen rows by expert, and summing the experts' outputs per token."""

import torch
from torch import Tensor


def permute(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort topk_ids [T, K] by expert; return order [T*K] int32 and offsets [E+1] int32.

    order[offsets[e]:offsets[e+1]] are the flat positions t*K + k at which expert e was chosen, in
    ascending order. Positions with an id outside 0 to E-1 come last, from offsets[E] on: experts
    skip them.
    """
    ids = topk_ids.flatten()
    ids = ids.where(ids >= 0, num_experts)
    sorted_ids, order = ids.sort(stable=True)
    experts = torch.arange(num_experts + 1, device=ids.device, dtype=ids.dtype)
    return order.int(), torch.searchsorted(sorted_ids, experts, out_int32=True)


def check_ids(topk_ids: Tensor, num_experts: int) -> None:
    """Raise ValueError for an id outside 0 to E-1 that is not -1; waits for a GPU."""
    for id_ in (int(bound) for bound in topk_ids.aminmax()):
        if not -1 <= id_ < num_experts:
            raise ValueError(
                f"topk_ids has {id_}, expected 0 to {num_experts - 1}, or -1 for no expert"
            )


def combine(y: Tensor, topk_weights: Tensor) -> Tensor:
    """Sum the rows y [T, K, H] over K, weighted by topk_weights [T, K] fp32.

    Products and sum are fp32; the result [T, H] is rounded once, to y's dtype.
    """
    return torch.bmm(topk_weights.unsqueeze(1), y.float()).squeeze(1).to(y.dtype)
