"""The search for the int4 scales and zero points with the least error for groups of weights.

Round-to-nearest takes the scale at which the largest weight just fits. A smaller one clips that and
is finer for all others: of several the one is taken that leaves the least sum of squared errors,
then the one that fits the codes so found in the sense of least squares, if it is better. With zero
points the same is done about the middle between the least and the largest weight.
"""

import torch
from torch import Tensor

from moezoo.layers.quant.format import magnitudes, stored_scales

FACTORS = torch.linspace(1.05, 0.5, 12).tolist()
"""Factors of round-to-nearest's scale that are tried; twice as many gain a thousandth."""


class Choice:
    """The best scales and zero points [.., G, 1] so far for groups x fp32 [.., G, S]."""

    def __init__(self, x: Tensor, dtype: torch.dtype, scales: Tensor, zeros: Tensor) -> None:
        self.x, self.dtype = x, dtype
        self.scales, self.zeros = stored_scales(scales, dtype), zeros
        self.error = torch.full_like(zeros, torch.inf)
        self.attempt(scales, zeros)

    def attempt(self, scales: Tensor, zeros: Tensor) -> None:
        """Take these scales and zero points where their error is less. NaN is never less, so a
        group with a NaN keeps its first scale, which is NaN too."""
        scales = stored_scales(scales, self.dtype)
        t = self.x / scales.float()
        error = torch.clamp(t.round(), -zeros, 15 - zeros).sub_(t).square_().sum(-1, keepdim=True)
        error *= scales.float().square()
        better = error < self.error
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)
        self.error = torch.where(better, error, self.error)

    def codes(self) -> Tensor:
        """Return the codes fp32 [.., G, S], 0 to 15."""
        return (self.x / self.scales.float()).round_().add_(self.zeros).clamp_(0, 15)


def symmetric(x: Tensor, dtype: torch.dtype, search: bool) -> Choice:
    """Choose scales with 8 as the zero point."""
    largest, zeros = magnitudes(x) / 7.5, torch.full_like(x[..., :1], 8)
    choice = Choice(x, dtype, largest, zeros)
    if search:
        for factor in FACTORS:
            choice.attempt(largest * factor, zeros)
        q = choice.codes() - 8
        choice.attempt((x * q).sum(-1, keepdim=True) / q.square_().sum(-1, keepdim=True), zeros)
    return choice


def asymmetric(x: Tensor, dtype: torch.dtype, search: bool) -> Choice:
    """Choose scales and zero points with which zero is always a value of a code."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step, middle = (high - low) / 15, (low + high) / 2

    def zeros_of(scales: Tensor) -> Tensor:
        return (7.5 - middle / stored_scales(scales, dtype).float()).round_().clamp_(0, 15)

    choice = Choice(x, dtype, step, zeros_of(step))
    if search:
        for factor in FACTORS:
            choice.attempt(step * factor, zeros_of(step * factor))
        q, mean = choice.codes(), x.mean(-1, keepdim=True)
        offsets = q - q.mean(-1, keepdim=True)
        scales = ((x - mean) * offsets).sum(-1, keepdim=True) / offsets.square().sum(
            -1, keepdim=True
        )
        zeros = q.mean(-1, keepdim=True) - mean / stored_scales(scales, dtype).float()
        choice.attempt(scales, zeros.round_().clamp_(0, 15))
        q = choice.codes() - choice.zeros
        scales = (x * q).sum(-1, keepdim=True) / q.square_().sum(-1, keepdim=True)
        choice.attempt(scales, choice.zeros)
    return choice
