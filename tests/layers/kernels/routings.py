"""Choices of experts that have to work: the even, the empty and the absent."""

import torch
from torch import Tensor

ROUTINGS: dict[str, tuple[int, int, int]] = {
    "one-token": (1, 2, 4),
    "one-of-one": (1, 1, 1),
    "odd": (63, 3, 7),
    "every-expert": (9, 5, 5),
    "few-of-many": (5, 4, 64),
    "no-tokens": (0, 2, 4),
    "all-on-one": (70, 1, 3),
    "absent": (40, 3, 6),
}
"""Name -> (T, K, E)."""


def topk_ids(name: str) -> Tensor:
    """[T, K] int32."""
    num_tokens, k, num_experts = ROUTINGS[name]
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :k].int()
    if name == "all-on-one":
        ids.fill_(1)
    if name == "absent":
        ids[::3, 1] = -1
        ids[5] = -1
    return ids
