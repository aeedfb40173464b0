"""quant_method "awq", version "gemm": integers of 4 bits with zero points, packed along the rows.

    `M.qweight`  int32 [K, N / 8], whose eight halves of bytes, the lowest first, are the columns
                 0, 2, 4, 6, 1, 3, 5, 7 of eight
    `M.qzeros`   int32 [K / g, N / 8], in the same order
    `M.scales`   [K / g, N]

W = (q - zero) * scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.layers.quant.groups import PER_CHANNEL, SCALE_DTYPES, pack
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.encodings.integers import (
    NO_ACTIVATIONS,
    OF_THE_RUN,
    held_groups,
    integer_kind,
    repeated,
    unpacked,
)
from moezoo.loaders.encodings.stored import (
    INTEGER_SCALE,
    Encoding,
    Extra,
    Headers,
    Scheme,
    StoredWeight,
    divided,
)
from moezoo.loaders.encodings.tables import Table, entry_within
from moezoo.loaders.mapping import TensorInfo


@dataclass(frozen=True)
class Awq(Scheme):
    group_size: int
    """Columns per group, -1 for all columns."""
    not_converted: tuple[str, ...]

    @classmethod
    def of(cls, table: Table) -> "Awq":
        table.one_of("bits", 4, default=4)
        table.one_of("zero_point", True, default=True)
        for field in ("version", "format", "checkpoint_format"):
            table.one_of(field, "gemm", "GEMM", default="gemm")
        table.one_of("pack_dtype", "int32", default="int32")
        table.one_of("data_type", "int", default="int")
        table.one_of("desc_act", False, default=False)
        table.one_of("act_bits", *NO_ACTIVATIONS, default=16)
        skipped = table.names("modules_to_not_convert")
        size = table.size("group_size")
        return cls(size, tuple(skipped), unknown=table.unknown(*OF_THE_RUN))

    def kind(self, weight: str, columns: int, dtype: torch.dtype) -> Kind | None:
        if entry_within(weight, self.not_converted):
            return None
        return divided(self._kind(columns, dtype), weight, self.group_size, columns)

    def _kind(self, columns: int, dtype: torch.dtype) -> Kind | None:
        return integer_kind(4, columns, self.group_size, dtype, zeros=True, ordered=False)

    def encoding(self, tensors: Mapping[str, TensorInfo], name: str) -> Encoding:
        headers = Headers(tensors, name)
        for data in [tensor for tensor in tensors if tensor.endswith(".qweight")]:
            module = data.removesuffix("qweight")
            headers.add(f"{module}weight", self._weight(headers, data, module))
        headers.refuse_alone(".qzeros", ".qweight", "int32")
        return headers.encoding(self)

    def _weight(self, headers: Headers, data: str, module: str) -> StoredWeight:
        k, words = headers.matrix(data, torch.int32)
        n = 8 * words
        group = k if self.group_size == PER_CHANNEL else self.group_size
        scales, zeros = f"{module}scales", f"{module}qzeros"
        g_idx = f"{module}g_idx"
        if g_idx in headers.tensors:
            raise headers.error(
                f"{g_idx}{headers.tensors[g_idx].where} is beside {data}, as quant_method 'gptq' "
                "has them, but the quantization_config says 'awq'; get the config.json that "
                "belongs to these weights"
            )
        if k % group:
            raise headers.not_full(data, scales, 0, group, k)
        found = headers.beside(scales, data, [(k // group, n)], SCALE_DTYPES)
        headers.beside(zeros, data, [(k // group, words)], (torch.int32,))
        kind = self._kind(k, found.dtype)
        if kind is None:
            raise headers.indivisible(data, group, k)
        groups = held_groups(kind, k)
        extras = (
            Extra(scales, "scales", lambda stored: repeated(stored.T, groups), INTEGER_SCALE),
            Extra(zeros, "zeros", lambda stored: repeated(_in_columns(stored).T, groups)),
        )
        unit = None if group == k else group
        return StoredWeight((n, k), kind, data, _data, extras, True, unit)


def _in_columns(words: Tensor) -> Tensor:
    """Unpack int32 [R, N / 8] into uint8 [R, N]."""
    # Of eight columns the even ones come first, then the odd ones.
    return unpacked(words, 4).unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1)


def _data(words: Tensor, order: Tensor | None) -> Tensor:
    return pack(_in_columns(words).T.contiguous())
