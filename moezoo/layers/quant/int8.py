"""int8_w8a16: integers of 8 bits with a scale per row, or per group of a row's columns, zero points
or none.

    w[n, k] = (data[n, k] + 128 - zeros[n, k // group_size]) * scales[n, k // group_size]

Without zero points, zero is 128: data are signed.

Quantising, a scale is the largest magnitude of its group over 127, rounded to the dtype of the
weights; data are the values over it, rounded to nearest even and held within +-127. With zero
points it is the distance from the least to the largest value, zero among them, over 255.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moezoo.layers.quant.format import (
    Format,
    by_rows,
    magnitudes,
    require_data,
    require_weights,
    stored_scales,
)
from moezoo.layers.quant.groups import (
    PER_CHANNEL,
    SCALE_DTYPES,
    grouped,
    groups_of,
    in_order,
    num_groups,
    order_on_meta,
    scale_dtype,
)

ZERO = 128
"""What stands for zero where there are no zero points."""


@dataclass(frozen=True, eq=False)
class Int8(Format):
    """data [.., N, K] int8; scales [.., N, G] in fp32, bf16 or fp16, where K / G is 32, 64, 128 or
    K; zeros [.., N, G] uint8, or None.

    order [.., K] int32, where there is one, says that column j of data is column order[j] of the
    weight: checkpoints that quantise columns in the order of their weight have groups so.
    """

    name: ClassVar[str] = "int8_w8a16"
    bits: ClassVar[int] = 8
    unit: ClassVar[str] = "group"

    zeros: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        require_data(self.data, "[.., N, K]", torch.int8)
        shape = [*self.shape[:-1], groups_of(self.shape[-1], self.scales)]
        self._require("scales", shape, *SCALE_DTYPES)
        if self.zeros is not None:
            self._require("zeros", shape, torch.uint8)
        if self.order is not None:
            self._require("order", [*self.shape[:-2], self.shape[-1]], torch.int32)

    @classmethod
    def quantize_unchecked(
        cls, w: Tensor, *, group_size: int = PER_CHANNEL, zeros: bool = False
    ) -> "Int8":
        """group_size is 32, 64, 128, or -1 for a scale per row. With `zeros` groups have zero
        points.

        Raises QuantizationError for a group size that does not divide K.
        """
        require_weights(w)
        groups = num_groups(w.shape[-1], group_size)

        def quantize(rows: Tensor) -> tuple[Tensor, ...]:
            x = grouped(rows.float(), groups)
            if zeros:
                return _asymmetric(x, scale_dtype(w))
            scales = stored_scales(magnitudes(x) / 127, scale_dtype(w))
            codes = (x / scales.float()).round_().clamp_(-127, 127)
            return codes.to(torch.int8).flatten(-2), scales.squeeze(-1)

        return cls(*by_rows(quantize, w))

    @classmethod
    def on_meta(
        cls,
        *shape: int,
        group_size: int = PER_CHANNEL,
        dtype: torch.dtype = torch.bfloat16,
        zeros: bool = False,
        ordered: bool = False,
    ) -> "Int8":
        """Of this shape [.., N, K], without memory or values; scales are of `dtype`."""
        *rows, k = shape
        groups = num_groups(k, group_size)
        return cls(
            torch.empty(shape, dtype=torch.int8, device="meta"),
            torch.empty(*rows, groups, dtype=dtype, device="meta"),
            torch.empty(*rows, groups, dtype=torch.uint8, device="meta") if zeros else None,
            order_on_meta(shape) if ordered else None,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = grouped(self.data.float(), self.scales.shape[-1])
        if self.zeros is not None:
            codes = codes + (ZERO - self.zeros.float()).unsqueeze(-1)
        x = codes * self.scales.float().unsqueeze(-1)
        return in_order(x.flatten(-2), self.order).to(dtype)

    @property
    def group_size(self) -> int:
        return self.shape[-1] // self.scales.shape[-1]


def _asymmetric(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Groups x fp32 [.., G, S] -> data [.., G * S], scales and zeros [.., G]"""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scales = stored_scales((high - low) / 255, dtype)
    zeros = (-low / scales.float()).round_().clamp_(0, 255)
    codes = (x / scales.float()).round_().add_(zeros).clamp_(0, 255)
    data = codes.sub_(ZERO).to(torch.int8).flatten(-2)
    return data, scales.squeeze(-1), zeros.to(torch.uint8).squeeze(-1)
