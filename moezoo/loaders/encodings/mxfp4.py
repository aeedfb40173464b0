"""quant_method "mxfp4", as gpt-oss has it: experts stacked, a power of two for 32 columns.

    `X_blocks`  uint8 [.., N, K / 32, 16], two numbers of E2M1 a byte, the first in the low half
    `X_scales`  uint8 [.., N, K / 32], the exponents plus 127

Where X itself is stored, its last two dimensions are the other way round.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.layers.quant import Mxfp4
from moezoo.layers.quant.kind import Kind
from moezoo.layers.quant.mxfp4 import GROUP, NAN
from moezoo.loaders.encodings.stored import (
    Check,
    Encoding,
    Extra,
    Headers,
    Scheme,
    StoredWeight,
    as_it_is,
    divided,
)
from moezoo.loaders.encodings.tables import Table, entry_within
from moezoo.loaders.mapping import TensorInfo

BLOCKS, SCALES = "_blocks", "_scales"

NOT_NAN = Check(
    lambda scales: scales == NAN,
    "the scale at {place} is {value}, which stands for NaN; expected an exponent from 0 to 254",
)


@dataclass(frozen=True)
class HubMxfp4(Scheme):
    not_converted: tuple[str, ...]

    @classmethod
    def of(cls, table: Table) -> "HubMxfp4":
        table.one_of("dequantize", False, default=False)
        skipped = tuple(table.names("modules_to_not_convert"))
        table.refuse_unknown()
        return cls(skipped)

    def kind(self, weight: str, columns: int, dtype: torch.dtype) -> Kind | None:
        if entry_within(weight, self.not_converted):
            return None
        return divided(None if columns % GROUP else Kind.of(Mxfp4), weight, GROUP, columns)

    def encoding(self, tensors: Mapping[str, TensorInfo], name: str) -> Encoding:
        headers = Headers(tensors, name)
        for data in [tensor for tensor in tensors if tensor.endswith(BLOCKS)]:
            weight = data.removesuffix(BLOCKS)
            info = tensors[data]
            if len(info.shape) < 3 or info.shape[-1] != GROUP // 2 or info.dtype != torch.uint8:
                raise headers.unexpected(data, f"[.., N, K / {GROUP}, {GROUP // 2}] uint8")
            *lead, n, groups, _ = info.shape
            scales = f"{weight}{SCALES}"
            headers.beside(scales, data, [info.shape[:-1]], (torch.uint8, torch.float8_e8m0fnu))
            extra = Extra(scales, "scales", as_it_is, NOT_NAN, torch.uint8)
            shape = (*lead, n, groups * GROUP)
            stored = StoredWeight(shape, Kind.of(Mxfp4), data, _data, (extra,), transposed=True)
            headers.add(weight, stored)
        headers.refuse_alone(SCALES, BLOCKS, "uint8")
        return headers.encoding(self)


def _data(blocks: Tensor, order: Tensor | None) -> Tensor:
    return blocks.flatten(-2)
