"""The row of bytes in which a token and its choices travel between ranks, and its packing in torch.

    row[t] = x[t] | topk_weights[t] fp32 | slots[t] int32

or, in fp8, x8[t] and its scales as `quantize_rows` makes them in the place of x[t]. Rows beyond the
tokens have slots of -1 and undefined x.

Legend: T tokens, H hidden, K experts per token, N rows, W bytes of a row.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moezoo.layers.kernels.sizes import cdiv
from moezoo.layers.quant.fp8 import BLOCK, Fp8Rows, blocks, quantize_rows


@dataclass(frozen=True)
class RowFormat:
    """Layout of a row."""

    hidden_size: int
    k: int
    dtype: torch.dtype
    """Dtype of x before and after it travels."""
    fp8: bool = False

    @cached_property
    def scales(self) -> int:
        return blocks(self.hidden_size) * BLOCK

    @cached_property
    def choices(self) -> int:
        size = self.hidden_size * self.dtype.itemsize
        if self.fp8:
            size = self.scales + blocks(self.hidden_size) * 4
        return cdiv(size, 16) * 16

    @cached_property
    def width(self) -> int:
        # Whole sectors of memory.
        return cdiv(self.choices + 8 * self.k, 128) * 128

    def numbers(self, rows: Tensor) -> Tensor:
        """View the numbers of x in rows uint8 [N, W]: [N, H] in x's dtype."""
        return rows[:, : self.hidden_size * self.dtype.itemsize].view(self.dtype)

    def octets(self, rows: Tensor) -> Fp8Rows:
        """View the quantised numbers of x in rows uint8 [N, W]."""
        scales = rows[:, self.scales : self.scales + blocks(self.hidden_size) * 4]
        return Fp8Rows(rows[:, : self.scales].view(torch.float8_e4m3fn), scales.view(torch.float32))

    def weights(self, rows: Tensor) -> Tensor:
        """View the routing weights in rows uint8 [N, W]: fp32 [N, K]."""
        return rows[:, self.choices : self.choices + 4 * self.k].view(torch.float32)

    def slots(self, rows: Tensor) -> Tensor:
        """View the slots of the choices in rows uint8 [N, W]: int32 [N, K]."""
        start = self.choices + 4 * self.k
        return rows[:, start : start + 4 * self.k].view(torch.int32)


def pack_rows_ref(
    form: RowFormat, x: Tensor, topk_weights: Tensor, slots: Tensor, num_rows: int
) -> Tensor:
    rows = torch.zeros(num_rows, form.width, dtype=torch.uint8, device=x.device)
    if form.fp8:
        into = form.octets(rows[: len(x)])
        for part, whole in zip(into, quantize_rows(x), strict=True):
            part.copy_(whole)
    else:
        form.numbers(rows)[: len(x)] = x
    form.weights(rows)[: len(x)] = topk_weights
    form.slots(rows).fill_(-1)[: len(x)] = slots
    return rows


def unpack_rows_ref(
    form: RowFormat, rows: Tensor, first: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    x = form.numbers(rows)
    if form.fp8:
        x = form.octets(rows).dequantize()[:, : form.hidden_size].to(form.dtype)
    local = local_rows_ref(form.slots(rows), first, stop)
    return x, form.weights(rows).contiguous(), local


def local_rows_ref(slots: Tensor, first: int, stop: int) -> Tensor:
    here = (slots >= first) & (slots < stop)
    return torch.where(here, slots - first, -1).int()
