"""int8_w8a16: integers of 8 bits with a scale per row, or per group of a row's columns, zero points
or none.

Quantising, a scale is the largest magnitude of its group over 127, rounded to the dtype of the
weights; data are the values over it, rounded to nearest even and held within +-127. With zero
points it is the distance from the least to the largest value, zero among them, over 255.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moezoo.formats import INT8
from moezoo.layers.quant.format import by_rows, magnitudes, require_weights, stored_scales
from moezoo.layers.quant.groups import PER_CHANNEL, grouped, num_groups, scale_dtype
from moezoo.layers.quant.integers import Integers

MIDDLE = 128
"""Offset from a number in data to its unsigned code."""


@dataclass(frozen=True, eq=False)
class Int8(Integers):
    """`Integers` with data [.., N, K] int8: codes less 128, so that without zero points a weight is
    data * scales."""

    name: ClassVar[str] = INT8
    bits: ClassVar[int] = 8
    data_dtype: ClassVar[torch.dtype] = torch.int8

    @classmethod
    def quantize_unchecked(
        cls, w: Tensor, *, group_size: int = PER_CHANNEL, zeros: bool = False
    ) -> "Int8":
        """Quantise w in groups of 32, 64 or 128 columns, or -1 for a scale per row. `zeros` adds
        zero points.

        Raises QuantizationError for a group size that does not divide K.
        """
        require_weights(w)
        groups = num_groups(w.shape[-1], group_size)

        def quantize(rows: Tensor) -> tuple[Tensor, ...]:
            x = grouped(rows.float(), groups)
            if zeros:
                return _asymmetric(x, scale_dtype(w))
            scales = stored_scales(magnitudes(x) / 127, scale_dtype(w))
            data = (x / scales.float()).round_().clamp_(-127, 127)
            return data.to(torch.int8).flatten(-2), scales.squeeze(-1)

        return cls(*by_rows(quantize, w))

    def codes(self) -> Tensor:
        return self.data.view(torch.uint8) ^ MIDDLE


def _asymmetric(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise groups x fp32 [.., G, S] to data [.., G * S], scales and zeros [.., G]."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scales = stored_scales((high - low) / 255, dtype)
    zeros = (-low / scales.float()).round_().clamp_(0, 255)
    codes = (x / scales.float()).round_().add_(zeros).clamp_(0, 255)
    data = codes.sub_(MIDDLE).to(torch.int8).flatten(-2)
    return data, scales.squeeze(-1), zeros.to(torch.uint8).squeeze(-1)
