"""quant_method "gptq": integers of 4 or 8 bits, packed along the columns.

    `M.qweight`  int32 [K * bits / 32, N], the lowest bits first
    `M.qzeros`   int32 [K / g, N * bits / 32]: zero points, in words from which a word of ones was
                 subtracted, unless in "gptq_v2"
    `M.scales`   [K / g, N]
    `M.g_idx`    int32 [K], the group of each column: not in order with `desc_act`

W = (q - zero) * scale. Where `sym` says so, zero is 8 or 128 everywhere and not kept. The first
rule of `dynamic` whose pattern matches the beginning of a module's name says how it is quantised
instead, or after "-:" that it is not.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from moezoo.layers.quant.groups import PER_CHANNEL, SCALE_DTYPES
from moezoo.layers.quant.kind import Kind
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
from moezoo.loaders.mapping import TensorInfo

_MIDDLES = {
    (4, True): 0x77777777,
    (4, False): -0x77777778,
    (8, True): 0x7F7F7F7F,
    (8, False): -0x7F7F7F80,
}
"""Words of zero points that are all the middle code, by bits and whether they are less one."""

_ONES = {4: 0x11111111, 8: 0x01010101}
"""Words of zero points that are all 1, by bits."""


@dataclass(frozen=True)
class Gptq(Scheme):
    bits: int
    group_size: int
    """Columns per group, -1 for all columns."""
    ordered: bool
    """Whether groups may consist of any columns (act-order)."""
    symmetric: bool
    less_one: bool
    """Whether one was subtracted from zero points before they were stored: not in "gptq_v2"."""
    converted: tuple[str, ...]
    """Modules that are quantised, all but `not_converted` if empty. Where weights are known, they
    decide."""
    not_converted: tuple[str, ...]
    rules: "tuple[tuple[re.Pattern[str], Gptq | None], ...]" = ()
    """Rules of the field `dynamic`."""

    @classmethod
    def of(cls, table: Table) -> "Gptq":
        bits = table.one_of("bits", 4, 8)
        table.one_of("pack_dtype", "int32", default="int32")
        table.one_of("data_type", "int", default="int")
        table.one_of("act_bits", *NO_ACTIVATIONS, default=16)
        table.one_of("rotation", None)
        table.one_of("is_marlin_format", False, default=False)
        symmetric = table.one_of("sym", True, False, default=True)
        stored = "gptq"
        for field in ("format", "checkpoint_format"):  # the second, which is older, goes first
            stored = table.one_of(field, "gptq", "gptq_v2", default=stored)
        scheme = cls(
            bits=bits,
            group_size=table.size("group_size"),
            ordered=table.one_of("desc_act", True, False, default=False),
            symmetric=symmetric,
            less_one=stored == "gptq",
            converted=tuple(table.names("modules_in_block_to_quantize")),
            not_converted=tuple(table.names("modules_to_not_convert")),
        )
        dynamic = table.table("dynamic") if table.get("dynamic") else None
        rules = [] if dynamic is None else [scheme._rule(dynamic, rule) for rule in dynamic.given]
        return replace(scheme, rules=tuple(rules), unknown=table.unknown(*OF_THE_RUN))

    def _rule(self, dynamic: Table, rule: str) -> "tuple[re.Pattern[str], Gptq | None]":
        try:
            pattern = re.compile(re.sub(r"^[-+]:", "", rule))
        except re.error as error:
            dynamic.refuse(rule, f"patterns, and this is none ({error})")
        if rule.startswith("-:"):
            dynamic.get(rule)  # it is known
            return pattern, None
        table = dynamic.table(rule)
        size = self.group_size if table.get("group_size") is None else table.size("group_size")
        how = replace(
            self,
            bits=table.one_of("bits", 4, 8, default=self.bits),
            group_size=size,
            ordered=table.one_of("desc_act", True, False, default=self.ordered),
            symmetric=table.one_of("sym", True, False, default=self.symmetric),
        )
        table.refuse_unknown(*OF_THE_RUN)
        return pattern, how

    def _of(self, module: str) -> "Gptq | None":
        return next((how for pattern, how in self.rules if pattern.match(module)), self)

    def kind(self, weight: str, columns: int, dtype: torch.dtype) -> Kind | None:
        if entry_within(weight, self.not_converted):
            return None
        if self.converted and not entry_within(weight, self.converted):
            return None
        how = self._of(weight.removesuffix(".weight"))
        if how is None:
            return None
        # No order: only checkpoints have one.
        kind = how._kind(columns, dtype, ordered=False)
        return divided(kind, weight, how.group_size, columns)

    def _kind(self, columns: int, dtype: torch.dtype, *, ordered: bool) -> Kind | None:
        zeros = not self.symmetric
        group = self.group_size
        return integer_kind(self.bits, columns, group, dtype, zeros=zeros, ordered=ordered)

    def encoding(self, tensors: Mapping[str, TensorInfo], name: str) -> Encoding:
        headers = Headers(tensors, name)
        for data in [tensor for tensor in tensors if tensor.endswith(".qweight")]:
            module = data.removesuffix("qweight")
            owner = module.removesuffix(".")
            how = self._of(owner)
            headers.refuse_kept(data, owner if how is None else None)
            assert how is not None
            headers.add(f"{module}weight", how._weight(headers, data, module))
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
                _MIDDLES[self.bits, self.less_one],
                "the zero points at {place} are {value:#x}, though the config says sym",
            )
            extras.append(Extra(zeros, check=check))
        else:
            added = _ONES[self.bits] if self.less_one else 0
            read = partial(_zeros, bits=self.bits, added=added, groups=groups)
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
    # It was subtracted from the whole word, where a zero point of 0 borrows from the next one.
    return repeated(unpacked(stored + added, bits).T, groups)
