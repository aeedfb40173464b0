"""mxfp4: 4-bit floating-point numbers with a power-of-two scale per 32 columns of a row (OCP
Microscaling).

    w[n, k] = e2m1(data[n, k]) * 2^(scales[n, k // 32] - 127)

E2M1 has a bit of sign, two of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
negatives. Quantising, the standard's exponent makes the largest magnitude of the 32 lie between 4
and 8, and what lies above 6 becomes 6; of it, the one below and the one above, that with the least
squared error is taken. Values are rounded to nearest, ties to an even code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moezoo.errors import QuantizationError
from moezoo.formats import MXFP4
from moezoo.layers.quant.format import (
    TINY,
    Format,
    by_rows,
    magnitudes,
    require_data,
    require_weights,
)
from moezoo.layers.quant.groups import grouped, pack, unpack

GROUP = 32
"""Columns that share a scale."""

NAN = 255
"""The one scale that stands for NaN."""


@dataclass(frozen=True, eq=False)
class Mxfp4(Format):
    """data [.., N, K / 2] uint8, the even columns in the low halves; scales [.., N, K / 32] uint8,
    the exponents plus 127."""

    name: ClassVar[str] = MXFP4
    bits: ClassVar[int] = 4
    unit: ClassVar[str] = "group"
    scale_layout: ClassVar[str] = f"in groups of {GROUP}"
    columns_per_element: ClassVar[int] = 2

    def __post_init__(self) -> None:
        require_data(self.data, "[.., N, K / 2]", torch.uint8)
        self._require("scales", [*self.shape[:-1], _groups(self.shape[-1])], torch.uint8)

    @classmethod
    def quantize_unchecked(cls, w: Tensor) -> "Mxfp4":
        """Quantise w. Raises QuantizationError where 32 does not divide K."""
        require_weights(w)
        groups = _groups(w.shape[-1])

        def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
            x = grouped(rows.float(), groups)
            scales = _nearest_scales(x)
            codes = _codes(x / _powers(scales).unsqueeze(-1))
            return pack(codes.flatten(-2)), scales

        return cls(*by_rows(quantize, w))

    @classmethod
    def on_meta(cls, *shape: int) -> "Mxfp4":
        *rows, k = shape
        return cls(
            torch.empty(*rows, k // 2, dtype=torch.uint8, device="meta"),
            torch.empty(*rows, _groups(k), dtype=torch.uint8, device="meta"),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = _values(unpack(self.data))
        x = grouped(values, self.scales.shape[-1]) * _powers(self.scales).unsqueeze(-1)
        return x.flatten(-2).to(dtype)

    def check_values(self, name: str = "weights") -> None:
        wrong = self.wrong_scales(self.scales)
        if wrong.any():
            raise QuantizationError(
                f"{name}: the scale of group {wrong.nonzero()[0].tolist()} is {NAN}, which stands "
                "for NaN; expected an exponent from 0 to 254"
            )

    @staticmethod
    def wrong_scales(scales: Tensor) -> Tensor:
        """Return a mask of the scales that stand for NaN."""
        return scales == NAN

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.data.shape[:-1], 2 * self.data.shape[-1]))


def _groups(k: int) -> int:
    if k % GROUP:
        raise QuantizationError(
            f"mxfp4 has a scale for {GROUP} columns, which does not divide {k}; hold these weights "
            "in another format"
        )
    return k // GROUP


def _powers(scales: Tensor) -> Tensor:
    """Return 2^(scales - 127) in fp32, exactly."""
    return scales.view(torch.float8_e8m0fnu).float()


def _nearest_scales(x: Tensor) -> Tensor:
    """Return the scales uint8 [.., G] of groups x [.., G, 32], NaN where a value is NaN or Inf."""
    largest = magnitudes(x).squeeze(-1)
    _, exponent = torch.frexp(largest.clamp(min=TINY))
    # The largest is below 2^exponent and at least half of it; 2^2 is the largest code's.
    standard = exponent - 3 + 127
    best = standard.clamp(0, NAN - 1).to(torch.uint8)
    least = torch.full_like(largest, torch.inf)
    for shift in (0, 1, -1):
        scales = (standard + shift).clamp(0, NAN - 1).to(torch.uint8)
        power = _powers(scales).unsqueeze(-1)
        t = x / power
        error = ((_rounded(t) - t.abs()) * power).square_().sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best.masked_fill_(~largest.isfinite(), NAN)


def _rounded(t: Tensor) -> Tensor:
    """Round the magnitudes of t to the nearest of E2M1."""
    t = t.abs().clamp_(max=6.0)
    step = 0.5 + 0.5 * (t >= 2) + (t >= 4)
    return t.div_(step).round_().mul_(step)


def _values(codes: Tensor) -> Tensor:
    """Return the values of codes uint8 in fp32: their bits are the top ones of fp16 with another
    exponent bias."""
    bits = codes.to(torch.int16)
    half = ((bits & 8) << 12 | (bits & 7) << 9).view(torch.float16)
    return half.float().mul_(2.0**14)


def _codes(t: Tensor) -> Tensor:
    """Return the E2M1 codes of t, uint8: 0 to 7, and 8 more for negative values."""
    rounded = _rounded(t)
    codes = 2 * rounded.clamp(max=2) + (rounded.clamp(2, 4) - 2) + 0.5 * (rounded.clamp(min=4) - 4)
    return codes.to(torch.uint8) + 8 * t.signbit().to(torch.uint8)
