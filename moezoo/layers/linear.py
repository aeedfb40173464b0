"""Linear layers that share an input, and which routine multiplies on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import nn


class _Switch:
    """torch's process-wide switch of oneDNN, and how many hold it off."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.holders = 0
        self.before = True

    def hold(self) -> None:
        onednn: Any = torch.backends.mkldnn
        with self.lock:
            if self.holders == 0:
                self.before = onednn.enabled
                onednn.enabled = False
            self.holders += 1

    def release(self) -> None:
        onednn: Any = torch.backends.mkldnn
        with self.lock:
            self.holders -= 1
            if self.holders == 0:
                onednn.enabled = self.before


_switch = _Switch()


@contextmanager
def without_onednn() -> Iterator[None]:
    """Run torch's own 16-bit products on the CPU.

    For a product with a single row they read the weights 1.6 times as fast as oneDNN, 3.5 times
    where the weights are small (AMD EPYC, torch 2.13). With more rows oneDNN is the faster one.
    torch's switch is one for the process: it stays off until the last thread that asked has left.
    """
    _switch.hold()
    try:
        yield
    finally:
        _switch.release()


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
