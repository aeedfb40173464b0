"""The form that a model is written in: the tensors of a checkpoint, and what its config says of
quantised ones. The inverse of `loaders.encodings`. Nothing here opens a file.

Weights all in block fp8 are written as `quant_method` "fp8"; those in mxfp4 as "mxfp4" where an
architecture stores experts in one tensor; all else as "compressed-tensors".
"""

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import QuantizationError
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import (
    BlockFp8,
    Format,
    Fp8Weights,
    Int4,
    Integers,
    Mxfp4,
    QuantizedWeights,
)
from moezoo.layers.quant.fp8 import BLOCK
from moezoo.layers.quant.groups import GROUP_SIZES, pack
from moezoo.layers.quant.mxfp4 import GROUP
from moezoo.loaders.encodings import fp8, mxfp4
from moezoo.loaders.encodings.integers import words_of
from moezoo.loaders.experts import experts_of, has_gate_and_up, parts_index
from moezoo.loaders.mapping import (
    Copy,
    ParameterInfo,
    Rule,
    Skip,
    copies_by_target,
    layout,
    parameter_infos,
    stored_order,
    stored_shape,
)

_log = logging.getLogger(__name__)


class TensorToWrite(NamedTuple):
    """A tensor of a checkpoint, made of the parameter `target`; `make` returns it, contiguous or
    not."""

    name: str
    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class WritePlan:
    """Plan for writing `module` by these rules, whatever its values."""

    def __init__(self, module: nn.Module, rules: Sequence[Rule | Skip]) -> None:
        self.weights = dict(quantized_weights(module))
        self.method = _method(module, rules)
        self.copies = copies_by_target(_layout(module, rules))

    def tensors(self, state: Mapping[str, Tensor]) -> list[TensorToWrite]:
        """Return the tensors to write for the parameters in `state`, which is all or some of a
        state_dict.

        Raises `QuantizationError` for quantised weights that no layout of the hub has.
        """
        found: list[TensorToWrite] = []
        for target in dict.fromkeys(map(self.parameter, state)):
            copies = self.copies.get(target, ())
            if target in self.weights:
                held = self.weights[target]
                fields: Any = {field: state.get(f"{target}.{field}") for field in held.keep_dtype}
                whole = held.kind.format(**fields)
                found.extend(
                    part for copy in copies for part in _quantized(copy, whole, self.method)
                )
                continue
            for copy in copies:
                part = state[target][copy.target_index]
                shape = stored_shape(part.shape, copy.view)
                make = partial(stored_order, part, copy.view)
                found.append(TensorToWrite(copy.source, target, shape, part.dtype, make))
        return found

    def parameter(self, name: str) -> str:
        """Return the parameter, or the quantised weights, that a tensor of a state_dict belongs
        to."""
        owner = name.rpartition(".")[0]
        return owner if owner in self.weights else name


def hub_config(module: nn.Module, rules: Sequence[Rule | Skip]) -> dict[str, Any] | None:
    """Return the quantization_config of `module`, whose values may be on meta; None if nothing is
    quantised."""
    weights = dict(quantized_weights(module))
    if not weights:
        return None
    infos = plain_infos(module)
    copies = _layout(module, rules)
    plain = sorted(
        {
            copy.source.removesuffix(".weight")
            for copy in copies
            if copy.target not in weights
            and len(infos[copy.target].shape) > 1
            and not copy.source.endswith("bias")
        }
        | _tied(module, rules)
    )
    method = _method(module, rules)
    if method == "compressed-tensors":
        return _compressed(copies, weights, plain)
    kept = sorted({re.sub(r"\.experts\..*", ".experts", name) for name in plain})
    if method == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }


def set_quantization_config(config: Any, module: nn.Module, rules: Sequence[Rule | Skip]) -> None:
    """Set the quantization_config of a transformers config to what a checkpoint of `module` would
    say."""
    described = hub_config(module, rules)
    if described is not None:
        config.quantization_config = described
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def warn_of_schemes(
    described: Mapping[str, Any] | None, module: nn.Module, rules: Sequence[Rule | Skip]
) -> None:
    """Warn where transformers does not load what this quantization_config describes."""
    if described is None:
        return
    usual = {copy.source for copy in layout(rules, plain_infos(module))}
    if not usual.issuperset(copy.source for copy in _layout(module, rules)):
        _log.warning(
            "experts are written one by one, since in one tensor there is no layout for their "
            "format: moezoo loads it, but transformers does not"
        )
        return
    if described["quant_method"] == "fp8":
        cut = sorted(_cut_blocks(module, rules))
        if cut:
            _log.warning(
                "blocks of %d are cut off in weights of %s columns or rows: moezoo loads them, but "
                "transformers does not where it dequantises: it takes all blocks for equal, and "
                "reads other numbers without an error; {'type': 'fp8_w8a8', 'granularity': "
                "'channel'} gives a model that both load",
                *(BLOCK, " and ".join(map(str, cut))),
            )
        return
    if described["quant_method"] != "compressed-tensors":
        return
    weights = [held() for _, held in quantized_weights(module)]
    integers = [weight for weight in weights if isinstance(weight, Integers)]
    unread = {
        "have zero points": any(w.zeros is not None for w in integers),
        "have their columns in an order of their own": any(w.order is not None for w in integers),
    }
    if any(unread.values()):
        _log.warning(
            "experts of this model %s: moezoo loads it, but transformers does not; quantise the "
            "16-bit checkpoint without, for a model that both load",
            " and ".join(what for what, there in unread.items() if there),
        )
        return
    some = any(r"\.experts\." in entry for entry in described["ignore"])
    if some or len(described["config_groups"]) > 1:
        _log.warning(
            "layers of this model are quantised in different ways (%s): moezoo loads it, but "
            "transformers does not%s",
            "some experts are not" if some else "formats, or sizes of groups",
            "" if some else _cure(module),
        )


def _cut_blocks(module: nn.Module, rules: Sequence[Rule | Skip]) -> set[int]:
    """Return the row and column counts of matrices, as written, whose last of several blocks is cut
    off."""
    weights, infos = dict(quantized_weights(module)), plain_infos(module)
    sizes = set()
    for copy in _layout(module, rules):
        if copy.target in weights:
            *lead, n, k = infos[copy.target].shape
            rows = copy.target_index[len(lead) :]
            part = rows[0] if rows else slice(None)
            assert isinstance(part, slice)
            sizes |= {len(range(n)[part]), k}
    return {size for size in sizes if size > BLOCK and size % BLOCK}


def _cure(module: nn.Module) -> str:
    """Return advice for groups of int4 that differ in their sizes, empty where there is none."""
    weights = [held() for _, held in quantized_weights(module)]
    int4 = [weight for weight in weights if isinstance(weight, Int4)]
    size = min((weight.group_size for weight in int4), default=0)
    if (
        len(int4) < len(weights)
        or size not in GROUP_SIZES
        or any(weight.group_size % size for weight in int4)
    ):
        return ""
    return (
        f"; quantise to {{'type': 'int4_w4a16', 'group_size': {size}}}, which divides all of their "
        "columns, for a model that both load"
    )


def quantized_weights(module: nn.Module) -> Iterator[tuple[str, QuantizedWeights]]:
    for name, child in module.named_modules():
        if isinstance(child, QuantizedWeights):
            yield name, child


def experts_and_linears(
    module: nn.Module,
) -> tuple[list[QuantizedWeights], list[QuantizedWeights]]:
    """Return a module's quantised weights: those of experts, and those of linear layers."""
    owners = experts_of(module)
    found: tuple[list[QuantizedWeights], list[QuantizedWeights]] = ([], [])
    for name, weights in quantized_weights(module):
        found[name not in owners].append(weights)
    return found


def plain_infos(module: nn.Module) -> dict[str, ParameterInfo]:
    """Return the parameters as if none was quantised."""
    weights = dict(quantized_weights(module))
    infos = {}
    for name, info in parameter_infos(module).items():
        owner = name.rpartition(".")[0]
        if owner not in weights:
            infos[name] = info
        elif owner not in infos:
            layer = module.get_submodule(owner.rpartition(".")[0])
            *lead, n, k = weights[owner].shape
            shape = (*lead[:1], prod(lead[1:]) * n, k)
            infos[owner] = ParameterInfo(shape, torch.bfloat16, getattr(layer, "part_sizes", None))
    return infos


def _layout(module: nn.Module, rules: Sequence[Rule | Skip]) -> list[Copy]:
    """Return the tensors to write, one per quantised expert where the hub has no layout for all in
    one."""
    infos = plain_infos(module)
    if _method(module, rules) == "mxfp4":
        return layout(rules, infos)
    owners = {
        name
        for name, child in module.named_modules()
        if isinstance(child, FusedMoE) and child.quantized is not None
    }
    return layout(rules, infos, per_expert={n for n in infos if n.rpartition(".")[0] in owners})


def _tied(module: nn.Module, rules: Sequence[Rule | Skip]) -> set[str]:
    """Return the modules of a checkpoint that `module` does without, such as a head that is the
    embedding: other libraries build them from the config, which must say that they are not
    quantised."""
    return {
        rule.sources[0].removesuffix(".weight")
        for rule in rules
        if isinstance(rule, Rule)
        and getattr(module, rule.target.removesuffix(".weight"), module) is None
    }


def _method(module: nn.Module, rules: Sequence[Rule | Skip]) -> str:
    weights = dict(quantized_weights(module))
    formats = {held.kind.format for held in weights.values()}
    if formats <= {BlockFp8}:
        return "fp8"
    if formats == {Mxfp4} and all(
        "transpose" in copy.view
        for copy in layout(rules, plain_infos(module))
        if copy.target in weights
    ):
        return "mxfp4"
    return "compressed-tensors"


def _quantized(copy: Copy, whole: Format, method: str) -> Iterator[TensorToWrite]:
    """Yield the tensors of one quantised weight."""
    index = parts_index(copy.target_index, whole.shape)
    both = has_gate_and_up(copy.target_index, whole.shape)
    if len(whole.shape) == 2 and index:
        (rows,) = index
        assert isinstance(rows, slice)
        part = whole.rows(rows.start, rows.stop)
    else:
        part = whole.map(lambda tensor: tensor[index])
    if method == "mxfp4":
        yield from _mxfp4(copy, part, both=both)
        return
    blocks_shared = both and isinstance(whole, BlockFp8) and whole.shape[2] % BLOCK
    if copy.view or blocks_shared or (both and part.order is not None):
        raise _unwritable(copy, whole)
    if both:
        part = part.map(lambda tensor: tensor.flatten(-3, -2))
    if method == "fp8":
        yield _as_it_is(copy, copy.source, part.data)
        yield _as_it_is(copy, copy.source + fp8.SCALES, part.scales)
        return
    if part.data.ndim != 2 or not copy.source.endswith(".weight"):
        raise _unwritable(copy, whole)
    yield from _compressed_tensors(copy, part)


def _unwritable(copy: Copy, weights: Format) -> QuantizationError:
    return QuantizationError(
        f"{copy.source} cannot be written: there is no layout for {weights.name} of shape "
        f"{list(weights.shape)} there; quantise them otherwise, or save the model before"
    )


def _as_it_is(copy: Copy, name: str, tensor: Tensor) -> TensorToWrite:
    return TensorToWrite(name, copy.target, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _mxfp4(copy: Copy, part: Format, *, both: bool) -> Iterator[TensorToWrite]:
    data, scales = part.data, part.scales
    if both and "deinterleave" in copy.view:
        data, scales = data.transpose(1, 2), scales.transpose(1, 2)
    if both:
        data, scales = data.flatten(1, 2), scales.flatten(1, 2)
    yield _as_it_is(copy, copy.source + mxfp4.BLOCKS, data.unflatten(-1, (-1, GROUP // 2)))
    yield _as_it_is(copy, copy.source + mxfp4.SCALES, scales)


def _compressed_tensors(copy: Copy, part: Format) -> Iterator[TensorToWrite]:
    module = copy.source.removesuffix(".weight")
    if isinstance(part, Fp8Weights):
        yield _as_it_is(copy, f"{module}.weight", part.data)
        scales = part.scales if isinstance(part, BlockFp8) else part.scales.unsqueeze(-1)
        yield _as_it_is(copy, f"{module}.weight_scale", scales)
        return
    if isinstance(part, Mxfp4):
        yield _as_it_is(copy, f"{module}.weight_packed", part.data)
        yield _as_it_is(copy, f"{module}.weight_scale", part.scales)
        return
    assert isinstance(part, Integers)
    n, k = part.shape
    words = (n, -(-k * part.bits // 32))
    yield TensorToWrite(
        f"{module}.weight_packed", copy.target, words, torch.int32, partial(_words, part)
    )
    yield _as_it_is(copy, f"{module}.weight_scale", part.scales)
    yield TensorToWrite(
        f"{module}.weight_shape", copy.target, (2,), torch.int64, lambda: torch.tensor([n, k])
    )
    if part.zeros is not None:
        shape = (-(-n * part.bits // 32), part.zeros.shape[1])
        make = partial(_packed_along_rows, part.zeros, part.bits)
        yield TensorToWrite(f"{module}.weight_zero_point", copy.target, shape, torch.int32, make)
    if part.order is not None:
        make = partial(_groups, part.order, part.group_size)
        yield TensorToWrite(f"{module}.weight_g_idx", copy.target, (k,), torch.int32, make)


def _words(part: Integers) -> Tensor:
    """Return the codes packed in int32, columns in their natural order, the last word filled with
    zeros."""
    codes = part.codes()
    if part.order is not None:
        codes = torch.empty_like(codes).index_copy_(1, part.order.long(), codes)
    octets = pack(codes) if part.bits == 4 else codes
    return words_of(F.pad(octets, (0, -octets.shape[1] % 4)))


def _groups(order: Tensor, group_size: int) -> Tensor:
    columns = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return torch.empty_like(order).index_copy_(0, order.long(), columns // group_size)


def _packed_along_rows(zeros: Tensor, bits: int) -> Tensor:
    """Pack zeros uint8 [N, G] into int32 [N * bits / 32, G], the first row in the lowest bits."""
    n = len(zeros)
    # Rows that fill the last word are written as compressed-tensors does: as bits of zero.
    filled = torch.cat([zeros, zeros.new_zeros(-n % (32 // bits), zeros.shape[1])])
    return words_of(pack(filled.T) if bits == 4 else filled.T).T


def _compressed(
    copies: Sequence[Copy], weights: Mapping[str, QuantizedWeights], plain: Sequence[str]
) -> dict[str, Any]:
    # A group of all columns is named as the others are: transformers wants one scheme for a layer.
    sizes = {
        (held.kind.format, held.kind.group_size)
        for held in weights.values()
        if held.kind.group_size is not None
    }
    by_scheme: dict[str, tuple[dict[str, Any], set[str]]] = {}
    for copy in copies:
        pattern = _pattern(copy.source.removesuffix(".weight"))
        if copy.target in weights:
            scheme = _scheme(weights[copy.target](), sizes)
            by_scheme.setdefault(repr(scheme), (scheme, set()))[1].add(pattern)
    groups = {}
    for i, (scheme, names) in enumerate(by_scheme.values()):
        targets = ["Linear"] if len(by_scheme) == 1 else sorted(names)
        groups[f"group_{i}"] = {"targets": targets, **scheme}
    formats = {scheme["format"] for scheme, _ in by_scheme.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({_pattern(n) if ".experts." in n else n for n in plain}),
    }


def _pattern(module: str) -> str:
    """Return a pattern that matches the modules of this name in all experts."""
    escaped = re.sub(r"(?<=\.experts\\\.)\d+(?=\\\.)", r"\\d+", re.escape(module))
    return f"re:{escaped}$"


def _scheme(weights: Format, sizes: Collection[tuple[type, int]]) -> dict[str, Any]:
    """Return the entry of config_groups for such weights; `sizes` are the formats and sizes that
    mean groups."""
    activations: dict[str, Any] | None = None
    if isinstance(weights, Fp8Weights):
        stored = "float-quantized"
        described: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel"}
        activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
        if isinstance(weights, BlockFp8):
            described |= {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
            activations |= {"strategy": "group", "group_size": BLOCK}
        activations["symmetric"] = True
    elif isinstance(weights, Mxfp4):
        stored = "mxfp4-pack-quantized"
        described = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": GROUP}
        described["scale_dtype"] = "torch.uint8"
    else:
        assert isinstance(weights, Integers)
        stored = "pack-quantized"
        described = {"num_bits": weights.bits, "type": "int"}
        size = weights.group_size
        if weights.scales.shape[-1] == 1 and (type(weights), size) not in sizes:
            described |= {"strategy": "channel"}
        else:
            described |= {"strategy": "group", "group_size": size}
        if weights.order is not None:
            described["actorder"] = "group"
    described |= {"symmetric": weights.zeros is None, "dynamic": False}
    return {
        "weights": described,
        "input_activations": activations,
        "output_activations": None,
        "format": stored,
    }
