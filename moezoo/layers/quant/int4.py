"""int4_w4a16: integers of 4 bits, two columns in a byte, with a scale per group of a row's columns,
zero points or none.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moezoo.errors import QuantizationError
from moezoo.formats import INT4
from moezoo.layers.quant.format import by_rows, require_weights
from moezoo.layers.quant.groups import (
    default_group_size,
    grouped,
    num_groups,
    pack,
    scale_dtype,
    unpack,
)
from moezoo.layers.quant.int4_search import asymmetric, symmetric
from moezoo.layers.quant.integers import Integers


@dataclass(frozen=True, eq=False)
class Int4(Integers):
    """`Integers` with data [.., N, K / 2] uint8, the even columns in the low halves."""

    name: ClassVar[str] = INT4
    bits: ClassVar[int] = 4
    columns_per_element: ClassVar[int] = 2
    data_dtype: ClassVar[torch.dtype] = torch.uint8

    @classmethod
    def quantize_unchecked(
        cls,
        w: Tensor,
        *,
        group_size: int | None = None,
        zeros: bool = False,
        search: bool = True,
    ) -> "Int4":
        """Quantise w in groups of 32, 64 or 128 columns, or -1 for a scale per row; by default the
        largest that divides K. `zeros` adds zero points. Without `search`, scales are those of
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

    def codes(self) -> Tensor:
        return unpack(self.data)
