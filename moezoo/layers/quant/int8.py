"""int8_w8a16: symmetric integers of 8 bits with a scale per row, or per group of a row's columns.

    w[n, k] = data[n, k] * scales[n, k // group_size]

Quantising, a scale is the largest magnitude of its group over 127, rounded to the dtype of the
weights; data are the values over it, rounded to nearest even and held within +-127.
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


@dataclass(frozen=True, eq=False)
class Int8(Format):
    """data [.., N, K] int8, scales [.., N, G] in fp32, bf16 or fp16; K / G is 32, 64, 128 or K.

    order [.., K] int32, where there is one, says that column j of data is column order[j] of the
    weight: checkpoints that quantise columns in the order of their weight have groups so.
    """

    name: ClassVar[str] = "int8_w8a16"
    bits: ClassVar[int] = 8
    unit: ClassVar[str] = "group"

    order: Tensor | None = None

    def __post_init__(self) -> None:
        require_data(self.data, "[.., N, K]", torch.int8)
        groups = groups_of(self.shape[-1], self.scales)
        self._require("scales", [*self.shape[:-1], groups], *SCALE_DTYPES)
        if self.order is not None:
            self._require("order", [*self.shape[:-2], self.shape[-1]], torch.int32)

    @classmethod
    def quantize_unchecked(cls, w: Tensor, *, group_size: int = PER_CHANNEL) -> "Int8":
        """group_size is 32, 64, 128, or -1 for a scale per row.

        Raises QuantizationError for one that does not divide K.
        """
        require_weights(w)
        groups = num_groups(w.shape[-1], group_size)

        def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
            x = grouped(rows.float(), groups)
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
        ordered: bool = False,
    ) -> "Int8":
        """Of this shape [.., N, K], without memory or values; scales are of `dtype`."""
        groups = num_groups(shape[-1], group_size)
        return cls(
            torch.empty(shape, dtype=torch.int8, device="meta"),
            torch.empty(*shape[:-1], groups, dtype=dtype, device="meta"),
            order_on_meta(shape) if ordered else None,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        x = grouped(self.data.float(), self.scales.shape[-1]) * self.scales.float().unsqueeze(-1)
        return in_order(x.flatten(-2), self.order).to(dtype)

    @property
    def group_size(self) -> int:
        return self.shape[-1] // self.scales.shape[-1]
