"""int4_w4a16: integers of 4 bits with a scale per group of a row's columns, zero points or none.

    w[n, k] = (data[n, k] - zeros[n, k // group_size]) * scales[n, k // group_size]

Without zero points, zero is 8.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moezoo.errors import QuantizationError
from moezoo.layers.quant.format import Format, by_rows, require_data, require_weights
from moezoo.layers.quant.groups import (
    PER_CHANNEL,
    SCALE_DTYPES,
    default_group_size,
    grouped,
    groups_of,
    in_order,
    num_groups,
    order_on_meta,
    pack,
    scale_dtype,
    unpack,
)
from moezoo.layers.quant.int4_search import asymmetric, symmetric

ZERO = 8
"""What stands for zero where there are no zero points."""


@dataclass(frozen=True, eq=False)
class Int4(Format):
    """data [.., N, K / 2] uint8, the even columns in the low halves; scales [.., N, G] in fp32,
    bf16 or fp16, where K / G is 32, 64, 128 or K; zeros [.., N, G] uint8, a byte each, or None.

    order [.., K] int32, where there is one, says that column j of data is column order[j] of the
    weight: checkpoints that quantise columns in the order of their weight have groups so.
    """

    name: ClassVar[str] = "int4_w4a16"
    bits: ClassVar[int] = 4
    unit: ClassVar[str] = "group"

    zeros: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        require_data(self.data, "[.., N, K / 2]", torch.uint8)
        shape = [*self.shape[:-1], groups_of(self.shape[-1], self.scales)]
        self._require("scales", shape, *SCALE_DTYPES)
        if self.zeros is not None:
            self._require("zeros", shape, torch.uint8)
        if self.order is not None:
            self._require("order", [*self.shape[:-2], self.shape[-1]], torch.int32)

    @classmethod
    def quantize_unchecked(
        cls,
        w: Tensor,
        *,
        group_size: int | None = None,
        zeros: bool = False,
        search: bool = True,
    ) -> "Int4":
        """group_size is 32, 64, 128, or -1 for a scale per row; by default the largest that
        divides K. With `zeros` groups have zero points. Without `search`, scales are those of
        round-to-nearest, for comparison.

        Raises QuantizationError for a group size that does not divide K, and for an odd K.
        """
        require_weights(w)
        k = w.shape[-1]
        if k % 2:
            raise QuantizationError(f"two columns of int4 share a byte, got {k} columns")
        groups = num_groups(k, default_group_size(k) if group_size is None else group_size)

        def quantize(rows: Tensor) -> tuple[Tensor, ...]:
            x = grouped(rows.float(), groups)
            choose = asymmetric if zeros else symmetric
            choice = choose(x, scale_dtype(w), search)
            packed = pack(choice.codes().to(torch.uint8).flatten(-2))
            scales, zero = choice.scales.squeeze(-1), choice.zeros.to(torch.uint8).squeeze(-1)
            return (packed, scales, zero) if zeros else (packed, scales)

        return cls(*by_rows(quantize, w))

    @classmethod
    def on_meta(
        cls,
        *shape: int,
        group_size: int = PER_CHANNEL,
        dtype: torch.dtype = torch.bfloat16,
        zeros: bool = False,
        ordered: bool = False,
    ) -> "Int4":
        """Of this shape [.., N, K], without memory or values; scales are of `dtype`."""
        *rows, k = shape
        groups = num_groups(k, group_size)
        return cls(
            torch.empty(*rows, k // 2, dtype=torch.uint8, device="meta"),
            torch.empty(*rows, groups, dtype=dtype, device="meta"),
            torch.empty(*rows, groups, dtype=torch.uint8, device="meta") if zeros else None,
            order_on_meta(shape) if ordered else None,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = grouped(unpack(self.data).float(), self.scales.shape[-1])
        zeros = ZERO if self.zeros is None else self.zeros.float().unsqueeze(-1)
        x = (codes - zeros) * self.scales.float().unsqueeze(-1)
        return in_order(x.flatten(-2), self.order).to(dtype)

    def check_values(self, name: str = "weights") -> None:
        """Raises QuantizationError for a scale that is NaN, Inf, zero or negative, or a zero point
        above 16: GPTQ's checkpoints store one less."""
        super().check_values(name)
        if self.zeros is not None and (self.zeros > 16).any():
            place = (self.zeros > 16).nonzero()[0].tolist()
            raise QuantizationError(
                f"{name}: the zero point of group {place} is {self.zeros[tuple(place)].item()}, "
                "it must be one of 0 to 16"
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.data.shape[:-1], 2 * self.data.shape[-1]))

    @property
    def group_size(self) -> int:
        return self.shape[-1] // self.scales.shape[-1]
