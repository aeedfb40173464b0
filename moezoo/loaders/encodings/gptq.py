"""quant_method "gptq": integers of 4 or 8 bits, packed along the columns.

    `M.qweight`  int32 [K * bits / 32, N], the lowest bits first
    `M.qzeros`   int32 [K / g, N * bits / 32]: zero points less one, or as they are in "gptq_v2"
    `M.scales`   [K / g, N]
    `M.g_idx`    int32 [K], the group of each column: not in order with `desc_act`

W = (q - zero) * scale. Where `sym` says so, zero is 8 or 128 everywhere and not kept. Weights of 8
bits with other zero points are dequantised.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moezoo.layers.quant.groups import PER_CHANNEL, SCALE_DTYPES
from moezoo.loaders.encodings.integers import (
    NO_ACTIVATIONS,
    OF_THE_RUN,
    all_equal,
    held,
    held_groups,
    in_order_extra,
    integer_kind,
    octets_of,
    order_extra,
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
from moezoo.loaders.kinds import Kind
from moezoo.loaders.mapping import TensorInfo

_WORDS = {(4, 1): 0x77777777, (4, 0): -0x77777778, (8, 1): 0x7F7F7F7F, (8, 0): -0x7F7F7F80}
"""A word of zero points of 8 or 128, by bits and what is subtracted."""


@dataclass(frozen=True)
class Gptq(Scheme):
    bits: int
    group_size: int
    """-1 is all columns."""
    ordered: bool
    """Whether groups are of columns anywhere."""
    symmetric: bool
    subtracted: int
    """How much less than the zero points is stored: 1, in "gptq_v2" 0."""
    converted: tuple[str, ...]
    """Modules that are quantised, all but `not_converted` where none is named. Where there are
    weights, these tell."""
    not_converted: tuple[str, ...]

    @classmethod
    def of(cls, table: Table) -> "Gptq":
        bits = table.one_of("bits", 4, 8)
        table.one_of("pack_dtype", "int32", default="int32")
        table.one_of("data_type", "int", default="int")
        table.one_of("act_bits", *NO_ACTIVATIONS, default=16)
        table.one_of("rotation", None)
        table.one_of("is_marlin_format", False, default=False)
        dynamic = table.get("dynamic") or {}
        if not isinstance(dynamic, Mapping) or not all(str(n).startswith("-:") for n in dynamic):
            table.refuse("dynamic", "rules '-:..' of what is not quantised")
        symmetric = table.one_of("sym", True, False, default=True)
        stored = "gptq"
        for field in ("format", "checkpoint_format"):  # the second, which is older, goes first
            stored = table.one_of(field, "gptq", "gptq_v2", default=stored)
        return cls(
            bits=bits,
            group_size=table.size("group_size"),
            ordered=table.one_of("desc_act", True, False, default=False),
            symmetric=symmetric,
            subtracted=0 if stored == "gptq_v2" else 1,
            converted=tuple(table.names("modules_in_block_to_quantize")),
            not_converted=tuple(table.names("modules_to_not_convert")),
            unknown=table.unknown(*OF_THE_RUN),
        )

    def kind(self, weight: str, columns: int, dtype: torch.dtype) -> Kind | None:
        if entry_within(weight, self.not_converted):
            return None
        if self.converted and not entry_within(weight, self.converted):
            return None
        # No order: only checkpoints have one.
        kind = self._kind(columns, dtype, ordered=False)
        return divided(kind, weight, self.group_size, columns).if_held

    def _kind(self, columns: int, dtype: torch.dtype, *, ordered: bool) -> Kind | None:
        zeros = not self.symmetric
        group = self.group_size
        return integer_kind(self.bits, columns, group, dtype, zeros=zeros, ordered=ordered)

    def encoding(self, tensors: Mapping[str, TensorInfo], name: str) -> Encoding:
        headers = Headers(tensors, name)
        for data in [tensor for tensor in tensors if tensor.endswith(".qweight")]:
            module = data.removesuffix("qweight")
            headers.add(f"{module}weight", self._weight(headers, data, module))
        for end in (".qzeros", ".g_idx"):
            headers.refuse_alone(end, ".qweight", "int32")
        return headers.encoding(self)

    def _weight(self, headers: Headers, data: str, module: str) -> StoredWeight:
        words, n = headers.matrix(data, torch.int32)
        k = words * 32 // self.bits
        group = k if self.group_size == PER_CHANNEL else self.group_size
        each = 32 // self.bits
        if n % each:
            raise headers.unexpected(data, f"[K / {each}, N] with N a multiple of {each}")
        scales, zeros, g_idx = (f"{module}{end}" for end in ("scales", "qzeros", "g_idx"))
        if g_idx in headers.tensors or (self.ordered and group != k):
            headers.beside(g_idx, data, [(k,)], (torch.int32,))
        if k % group:
            raise headers.not_full(data, scales, 0, group, k)
        found = headers.beside(scales, data, [(k // group, n)], SCALE_DTYPES)
        headers.beside(zeros, data, [(k // group, n * self.bits // 32)], (torch.int32,))
        kind = self._kind(k, found.dtype, ordered=self.ordered)
        if kind is None:
            raise headers.indivisible(data, group, k)
        groups = held_groups(kind, k)
        extras = [Extra(scales, "scales", partial(_scales, groups=groups), INTEGER_SCALE)]
        if self.symmetric:
            check = all_equal(
                _WORDS[self.bits, self.subtracted],
                "the zero points at {place} are {value:#x}, though the config says sym",
            )
            extras.append(Extra(zeros, None, _scales, check))
        else:
            read = partial(_zeros, bits=self.bits, added=self.subtracted, groups=groups)
            extras.append(Extra(zeros, "zeros", read))
        if kind.ordered:
            extras.append(order_extra(g_idx, k, group))
        elif g_idx in headers.tensors and group != k:
            extras.append(in_order_extra(g_idx, group))
        elif g_idx in headers.tensors:
            headers.drop(g_idx)
        unit = None if kind.ordered or group == k else group * self.bits // 32
        return StoredWeight(
            (n, k), kind, data, partial(_data, bits=self.bits), tuple(extras), True, unit
        )


def _data(words: Tensor, order: Tensor | None, *, bits: int) -> Tensor:
    octets = octets_of(words).unflatten(1, (-1, 4))
    return held(octets.transpose(0, 1).flatten(1), bits, order)


def _scales(stored: Tensor, groups: int = 1) -> Tensor:
    return repeated(stored.T, groups)


def _zeros(stored: Tensor, *, bits: int, added: int, groups: int) -> Tensor:
    # What is stored for zero less one wraps around.
    return repeated(((unpacked(stored, bits) + added) & (2**bits - 1)).T, groups)
