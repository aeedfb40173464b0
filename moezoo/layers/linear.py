"""Linear layers that share an input."""

import torch
from torch import nn


class FusedLinear(nn.Linear):
    """Several projections of one input, stacked by rows: one matrix product instead of several.

    `weight` is [sum(part_sizes), in_features], `bias` [sum(part_sizes)] where there is one.
    `part_sizes` says where saving cuts the rows again.
    """

    def __init__(self, in_features: int, part_sizes: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(part_sizes), bias=bias)
        self.part_sizes = part_sizes

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[.., in_features] -> one [.., size] a part, views of one product."""
        return self(x).split_with_sizes(self.part_sizes, -1)
