"""The codes and scales of int4 that are nearest to groups of weights in the sum of squares."""

import torch
from torch import Tensor

from moezoo.layers.quant.format import magnitudes, stored_scales


def symmetric(x: Tensor, dtype: torch.dtype, search: bool) -> tuple[Tensor, Tensor]:
    """Groups x fp32 [.., G, S] -> codes uint8 [.., G, S] of 8 for zero, scales `dtype` [.., G]."""
    scales = stored_scales(magnitudes(x) / 7.5, dtype)
    codes = (x / scales.float()).round_().clamp_(-8, 7) + 8
    return codes.to(torch.uint8), scales.squeeze(-1)


def asymmetric(x: Tensor, dtype: torch.dtype, search: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Groups x fp32 [.., G, S] -> codes uint8 [.., G, S], scales `dtype` and zeros uint8 [.., G]"""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scales = stored_scales((high - low) / 15, dtype)
    zeros = (-low / scales.float()).round_().clamp_(0, 15)
    codes = (x / scales.float()).round_().add_(zeros).clamp_(0, 15)
    return codes.to(torch.uint8), scales.squeeze(-1), zeros.to(torch.uint8).squeeze(-1)
