"""quant_method "compressed-tensors": each group of modules has a scheme of its own.

    pack-quantized         `M.weight_packed` int32 [N, K * bits / 32], the lowest bits first, codes
                           with 8 or 128 added; `M.weight_scale` [N, G]; `M.weight_shape` int64 [2];
                           `M.weight_zero_point` int32 [N * bits / 32, G], packed along the rows;
                           `M.weight_g_idx` int32 [K], the group of each column
    float-quantized        `M.weight` float8_e4m3fn; `M.weight_scale` [N, 1], [1], or of blocks
    int-quantized          `M.weight` int8; `M.weight_scale` [N, G] or [1]; `M.weight_zero_point`
                           int8 like the scales, 128 less
    mxfp4-pack-quantized   `M.weight_packed` uint8 [N, K / 2]; `M.weight_scale` uint8 [N, K / 32]

Activations are quantised dynamically to 8 bits where the weights are fp8, whether the scheme says
so, says static or has none, and not at all with other weights. That is at least as exact as what a
scheme with activations of 8 bits asks for, and less so than one of fp8 weights alone.
`M.input_scale`, of static ones, must be there and is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from moezoo.layers.quant import BlockFp8, ChannelFp8, Mxfp4
from moezoo.layers.quant.fp8 import BLOCK
from moezoo.layers.quant.groups import PER_CHANNEL, SCALE_DTYPES
from moezoo.layers.quant.kind import Kind
from moezoo.layers.quant.mxfp4 import GROUP
from moezoo.loaders.encodings.fp8 import fp8_weight
from moezoo.loaders.encodings.integers import (
    held,
    held_groups,
    integer_kind,
    octets_of,
    order_extra,
    repeated,
    unpacked,
)
from moezoo.loaders.encodings.mxfp4 import NOT_NAN
from moezoo.loaders.encodings.stored import (
    AGAIN,
    INTEGER_SCALE,
    Check,
    Encoding,
    Extra,
    Headers,
    Scheme,
    StoredWeight,
    as_it_is,
    divided,
    dtype_of,
)
from moezoo.loaders.encodings.tables import Table
from moezoo.loaders.mapping import TensorInfo

_FORMATS = (
    "pack-quantized",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
)
_ENDS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_HARMLESS = (
    *("quantization_status", "global_compression_ratio", "version", "run_compressed"),
    *("use_optimized_inference", "observer", "observer_kwargs", "scale_dtype", "zp_dtype", "is_mx"),
    *("strategy", "symmetric", "group_size", "block_structure", "actorder"),  # of activations
)
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale")


@dataclass(frozen=True)
class Group:
    """The scheme of the modules that `targets` name: "Linear", a name, or "re:" and a pattern."""

    targets: tuple[str, ...]
    weights: Literal["int", "fp8", "mxfp4"]
    packed: bool
    bits: int
    strategy: str
    group_size: int
    """Columns per group, -1 for all columns."""
    symmetric: bool
    ordered: bool
    weight_only: bool
    """Whether activations stay unquantised."""
    static: bool
    """Whether activations are quantised with scales that the checkpoint has."""

    @classmethod
    def of(cls, table: Table, format_of_all: str) -> "Group":
        stored = table.one_of("format", *_FORMATS, default=format_of_all)
        weights = table.table("weights")
        weights.one_of("dynamic", False, default=False)
        table.one_of("output_activations", None)
        static = False
        if table.get("input_activations") is not None:
            activations = table.table("input_activations")
            activations.one_of("num_bits", 8, default=8)
            activations.one_of("type", "int", "float", default="int")
            static = not activations.one_of("dynamic", True, False, default=False)
        bits = weights.one_of("num_bits", 4, 8)
        integers = weights.one_of("type", "int", "float", default="int") == "int"
        symmetric = weights.one_of("symmetric", True, False, default=True)
        orders = (False, "weight", "static", "group", "dynamic")
        actorder = weights.one_of("actorder", *orders, default=False)
        size = weights.get("group_size")
        inferred = "tensor" if size is None else "channel" if size == PER_CHANNEL else "group"
        strategies = ("tensor", "channel", "group", "block")
        strategy = weights.one_of("strategy", *strategies, default=inferred)
        block = weights.get("block_structure")
        group_size = weights.size("group_size") if strategy == "group" else PER_CHANNEL
        if strategy != "group" and size not in (None, 0, PER_CHANNEL):
            weights.refuse("group_size", f"none with strategy {strategy!r}")
        kind: Literal["int", "fp8", "mxfp4"] = "int"
        if integers:
            if strategy == "block":
                weights.refuse("strategy", "a scale a tensor, channel or group of integers")
            if stored not in ("pack-quantized", "int-quantized", "naive-quantized"):
                weights.refuse("type", f"'float' as {stored!r}")
            if stored != "pack-quantized" and bits != 8:
                weights.refuse("num_bits", "8 bits where they are not packed")
        elif bits == 8:
            kind = "fp8"
            if stored not in ("float-quantized", "naive-quantized"):
                weights.refuse("type", f"'int' as {stored!r}")
            if strategy == "group":
                weights.refuse("strategy", "a scale a tensor, channel or block of fp8")
            if strategy == "block" and block not in ([BLOCK, BLOCK], (BLOCK, BLOCK)):
                weights.refuse("block_structure", f"[{BLOCK}, {BLOCK}]")
        else:
            kind = "mxfp4"
            if stored != "mxfp4-pack-quantized":
                weights.refuse("type", f"'int' of 4 bits as {stored!r}")
            if group_size != GROUP:
                weights.refuse("group_size", f"{GROUP} for mxfp4")
        return cls(
            targets=tuple(table.patterns("targets")),
            weights=kind,
            packed=stored.endswith("pack-quantized"),
            bits=bits,
            strategy=strategy,
            group_size=group_size,
            symmetric=symmetric,
            ordered=actorder in ("group", "dynamic"),
            weight_only=table.get("input_activations") is None,
            static=static,
        )

    def kind(self, columns: int, dtype: torch.dtype) -> Kind | None:
        """Return the kind of weights with so many columns, None where the group size does not fit
        them."""
        if self.weights == "fp8":
            return Kind.of(BlockFp8 if self.strategy == "block" else ChannelFp8)
        if self.weights == "mxfp4":
            return None if columns % GROUP else Kind.of(Mxfp4)
        group, zeros = self.group_size, not self.symmetric
        return integer_kind(self.bits, columns, group, dtype, zeros=zeros, ordered=self.ordered)


@dataclass(frozen=True)
class CompressedTensors(Scheme):
    groups: tuple[Group, ...]
    ignored: tuple[str, ...]

    @classmethod
    def of(cls, table: Table) -> "CompressedTensors":
        stored = table.one_of("format", "mixed-precision", *_FORMATS)
        table.one_of("dequantize", False, default=False)
        table.nothing("kv_cache_scheme", "transform_config", "moe_sparsity_config")
        sparsity = table.get("sparsity_config") or {}
        if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
            table.refuse("sparsity_config", "none, or format 'dense'")
        groups = table.table("config_groups")
        found = [Group.of(groups.table(name), stored) for name in groups.given]
        if not found:
            table.refuse("config_groups", "at least one group")
        ignored = tuple(table.patterns("ignore"))
        return cls(tuple(found), ignored, unknown=table.unknown(*_HARMLESS))

    @property
    def notes(self) -> tuple[str, ...]:
        found = list(super().notes)
        if any(group.weights == "fp8" and group.weight_only for group in self.groups):
            found.append(
                "fp8 weights beside which the config quantises no activations run as fp8_w8a8: "
                "activations are rounded to fp8 too"
            )
        if any(group.weights != "fp8" and not group.weight_only for group in self.groups):
            found.append(
                "the config quantises activations beside integer or mxfp4 weights; here these are "
                "multiplied by activations as they are, which is more exact"
            )
        return tuple(found)

    def ignores(self, module: str) -> str | None:
        return next((entry for entry in self.ignored if _names(entry, module)), None)

    def group(self, module: str) -> Group | None:
        """Return the group of a module: by an exact name before a pattern before a class."""
        for exact in (True, False):
            for group in self.groups:
                targets = [t for t in group.targets if t.startswith("re:") != exact]
                if any(_names(target, module) for target in targets):
                    return group
        return next((group for group in self.groups if "Linear" in group.targets), None)

    def kind(self, weight: str, columns: int, dtype: torch.dtype) -> Kind | None:
        module = weight.removesuffix(".weight")
        if self.ignores(module) is not None:
            return None
        group = self.group(module)
        if group is None:
            return None
        kind = replace(group, ordered=False).kind(columns, dtype)
        return divided(kind, weight, group.group_size, columns)

    def encoding(self, tensors: Mapping[str, TensorInfo], name: str) -> Encoding:
        headers = Headers(tensors, name)
        for data, info in tensors.items():
            packed = data.endswith(".weight_packed")
            if not packed and not (
                data.endswith(".weight") and info.dtype in (torch.float8_e4m3fn, torch.int8)
            ):
                continue
            module = data.rpartition(".")[0]
            headers.refuse_kept(data, self.ignores(module))
            group = self.group(module)
            if group is None or group.packed != packed:
                raise headers.error(
                    f"{data} is {dtype_of(info)}{info.where}, but no group of "
                    f"quantization_config.config_groups says that {module} is stored so; {AGAIN}"
                )
            stored = _weight(headers, module, data, group)
            headers.add(f"{module}.weight", stored)
            _refuse_unsaid(headers, module, group)
            if group.static and f"{module}.input_scale" not in tensors:
                raise headers.error(
                    f"{data} is {dtype_of(info)}{info.where} and there is no {module}.input_scale, "
                    "which its scheme in quantization_config.config_groups expects, as its "
                    f"input_activations.dynamic is False; {AGAIN}, or make dynamic true there, as "
                    "activations are here"
                )
            for end in _ACTIVATIONS:
                headers.leave_out(f"{module}.{end}")
        for end in _ENDS[1:]:
            headers.refuse_alone(f".{end}", ".weight", "a quantised weight")
        return headers.encoding(self)


def _names(entry: str, module: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), module) is not None
    return entry == module


def _refuse_unsaid(headers: Headers, module: str, group: Group) -> None:
    """Raise `QuantizationError` for zero points and orders that the scheme says are not there."""
    for end, what, said in (
        ("weight_zero_point", "zero points", f"symmetric is {group.symmetric}"),
        ("weight_g_idx", "groups of columns in any order", "no actorder 'group'"),
    ):
        tensor = f"{module}.{end}"
        if tensor in headers.plain:
            raise headers.error(
                f"{tensor}{headers.tensors[tensor].where} holds {what}, but the scheme of {module} "
                f"in quantization_config.config_groups has {said}; {AGAIN}"
            )


def _weight(headers: Headers, module: str, data: str, group: Group) -> StoredWeight:
    scales = f"{module}.weight_scale"
    if group.weights == "fp8":
        if headers.tensors[data].dtype != torch.float8_e4m3fn:
            raise headers.unexpected(data, "float8_e4m3fn")
        return fp8_weight(headers, data, scales, blocks=group.strategy == "block")
    if group.weights == "mxfp4":
        n, half = headers.matrix(data, torch.uint8)
        k = 2 * half
        if k % GROUP:
            raise headers.indivisible(data, GROUP, k)
        headers.beside(scales, data, [(n, k // GROUP)], (torch.uint8, torch.float8_e8m0fnu))
        extra = Extra(scales, "scales", as_it_is, NOT_NAN, torch.uint8)
        return StoredWeight((n, k), Kind.of(Mxfp4), data, as_it_is, (extra,))
    return _integers(headers, module, data, scales, group)


def _integers(headers: Headers, module: str, data: str, scales: str, group: Group) -> StoredWeight:
    n, stored = headers.matrix(data, torch.int32 if group.packed else torch.int8)
    weight = partial(_of_columns, headers, module, data, scales, group, n)
    if not group.packed:
        return weight(stored)
    each = 32 // group.bits
    k = stored * each
    if k - each < group.group_size < k:
        return weight(group.group_size)
    if group.group_size == PER_CHANNEL:
        # Only the values of weight_shape, or the model, say how much of the last word is padding.
        return replace(weight(k), padding=each - 1, of_columns=weight)
    return weight(k)


def _of_columns(
    headers: Headers, module: str, data: str, scales: str, group: Group, n: int, k: int
) -> StoredWeight:
    size = k if group.group_size == PER_CHANNEL else group.group_size
    if k % size:
        raise headers.not_full(data, scales, 1, size, k)
    shapes: list[tuple[int, ...]] = [(n, k // size)]
    if group.strategy == "tensor":
        shapes = [(1,), (), (1, 1)]
    elif k == size:
        shapes.append((n,))
    found = headers.beside(scales, data, shapes, SCALE_DTYPES)
    kind = group.kind(k, found.dtype)
    if kind is None:
        raise headers.indivisible(data, size, k)
    read = partial(_scales, groups=held_groups(kind, k))
    extras = [Extra(scales, "scales", read, INTEGER_SCALE)]
    shape = f"{module}.weight_shape"
    if group.packed and shape in headers.tensors:
        headers.beside(shape, data, [(2,)], (torch.int64, torch.int32))
        extras.append(_shape_extra(shape, n, k))
    if not group.symmetric:
        zeros = f"{module}.weight_zero_point"
        if group.packed and group.strategy != "tensor":
            words = -(-n * group.bits // 32)
            headers.beside(zeros, data, [(words, k // size)], (torch.int32,))
            read = partial(_packed_zeros, bits=group.bits, n=n, groups=held_groups(kind, k))
            extras.append(Extra(zeros, "zeros", read))
        else:
            headers.beside(zeros, data, shapes, (torch.int8,))
            read = partial(_zeros, bits=group.bits, groups=held_groups(kind, k))
            extras.append(Extra(zeros, "zeros", read, _in_range(group.bits)))
    g_idx = f"{module}.weight_g_idx"
    if g_idx in headers.plain and size == k:
        headers.drop(g_idx)  # all columns are in one group
    elif group.ordered and size != k:
        headers.beside(g_idx, data, [(k,)], (torch.int32, torch.int64))
        extras.append(order_extra(g_idx, k, size))
    unpack = partial(_data, bits=group.bits, columns=k) if group.packed else as_it_is
    return StoredWeight((n, k), kind, data, unpack, tuple(extras))


def _shape_extra(tensor: str, n: int, k: int) -> Extra:
    def wrong(shape: Tensor) -> Tensor:
        return torch.stack((shape[0] != n, shape[1] != k))

    problem = f"dimension {{place}} is {{value}}, though the data and scales are of [{n}, {k}]"
    return Extra(tensor, check=Check(wrong, problem))


def _in_range(bits: int) -> Check:
    """Return the check of zero points int8 of codes with so many bits."""
    least, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def wrong(zeros: Tensor) -> Tensor:
        return (zeros < least) | (zeros > largest)

    problem = f"the zero point at {{place}} is {{value}}, it must be one of {least} to {largest}"
    return Check(wrong, problem)


def _data(words: Tensor, order: Tensor | None, *, bits: int, columns: int) -> Tensor:
    return held(octets_of(words)[:, : columns * bits // 8], bits, order)


def _scales(stored: Tensor, *, groups: int) -> Tensor:
    return repeated(stored.reshape(-1, 1) if stored.ndim < 2 else stored, groups)


def _zeros(stored: Tensor, *, bits: int, groups: int) -> Tensor:
    return _scales((stored.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), groups=groups)


def _packed_zeros(stored: Tensor, *, bits: int, n: int, groups: int) -> Tensor:
    return repeated(unpacked(stored.T, bits)[:, :n].T, groups)
