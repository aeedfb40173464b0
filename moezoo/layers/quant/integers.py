"""Integers with a scale per group of a row's columns, or per row, with zero points or none: what
int4_w4a16 and int8_w8a16 share.

    w[n, k] = (code[n, k] - zeros[n, k // group_size]) * scales[n, k // group_size]

Codes are unsigned; without zero points, zero is the middle of them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from moezoo.layers.quant.format import Format, require_data
from moezoo.layers.quant.groups import PER_CHANNEL, SCALE_DTYPES, grouped, groups_of, num_groups


@dataclass(frozen=True, eq=False)
class Integers(Format):
    """data [.., N, K * bits / 8]; scales [.., N, G] in fp32, bf16 or fp16, where K / G is 32, 64,
    128 or K; zeros [.., N, G] uint8, a byte each, or None.

    order [.., K] int32, where there is one, says that column j of data is column order[j] of the
    weight: checkpoints that quantise columns in the order of their weight have groups so.
    """

    unit: ClassVar[str] = "group"
    bits: ClassVar[int]
    data_dtype: ClassVar[torch.dtype]

    zeros: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        columns = "K" if self.bits == 8 else f"K / {8 // self.bits}"
        require_data(self.data, f"[.., N, {columns}]", self.data_dtype)
        shape = [*self.shape[:-1], groups_of(self.shape[-1], self.scales)]
        self._require("scales", shape, *SCALE_DTYPES)
        if self.zeros is not None:
            self._require("zeros", shape, torch.uint8)
        if self.order is not None:
            self._require("order", [*self.shape[:-2], self.shape[-1]], torch.int32)

    @classmethod
    def on_meta(
        cls,
        *shape: int,
        group_size: int = PER_CHANNEL,
        dtype: torch.dtype = torch.bfloat16,
        zeros: bool = False,
        ordered: bool = False,
    ) -> Self:
        """Return weights of this shape [.., N, K] on the meta device, with scales of `dtype`."""
        *rows, k = shape
        groups = num_groups(k, group_size)
        return cls(
            torch.empty(*rows, k * cls.bits // 8, dtype=cls.data_dtype, device="meta"),
            torch.empty(*rows, groups, dtype=dtype, device="meta"),
            torch.empty(*rows, groups, dtype=torch.uint8, device="meta") if zeros else None,
            torch.empty(*rows[:-1], k, dtype=torch.int32, device="meta") if ordered else None,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        middle = 2 ** (self.bits - 1)
        zeros = middle if self.zeros is None else self.zeros.float().unsqueeze(-1)
        x = grouped(self.codes().float(), self.scales.shape[-1])
        x.sub_(zeros).mul_(self.scales.float().unsqueeze(-1))
        return _in_order(x.flatten(-2), self.order).to(dtype)

    def codes(self) -> Tensor:
        """Return the unsigned codes, uint8 [.., N, K], in the order of data's columns."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Self:
        if self.order is None:
            return super().rows(start, stop)
        return replace(replace(self, order=None).rows(start, stop), order=self.order)

    def in_parts(self, parts: int) -> Self:
        if self.order is None:
            return super().in_parts(parts)
        order = self.order.unsqueeze(-2).repeat_interleave(parts, -2)
        return replace(replace(self, order=None).in_parts(parts), order=order)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.data.shape[:-1], self.data.shape[-1] * 8 // self.bits))

    @property
    def group_size(self) -> int:
        return self.shape[-1] // self.scales.shape[-1]


def _in_order(w: Tensor, order: Tensor | None) -> Tensor:
    """Move the columns of w [.., N, K], sorted by group, to where they belong.

    order [.., K]: column j of w is column order[j] of the result.
    """
    if order is None:
        return w
    index = order.long().unsqueeze(-2).expand(w.shape)
    return torch.empty_like(w).scatter_(-1, index, w)
