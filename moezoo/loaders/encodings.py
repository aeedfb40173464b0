"""Quantised weights: what a user may ask for, what a checkpoint's config and headers say of them,
and where the pieces of an expert lie in `QuantizedWeights`. Nothing here opens a file.

A checkpoint in block fp8 (`quant_method` "fp8") has `X` in float8_e4m3fn and its scales under the
name `X_scale_inv`, by which X is multiplied whatever the name says.

Legend: H hidden, I expert intermediate, E experts, N rows, K columns.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from moezoo.errors import QuantizationError
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import BlockFp8, QuantizedWeights
from moezoo.layers.quant.fp8 import BLOCK, BLOCK_FP8, scales_shape
from moezoo.loaders.mapping import (
    Copy,
    Index,
    ParameterInfo,
    Rule,
    Skip,
    TensorInfo,
    layout,
    parameter_infos,
)

SCALES = "_scale_inv"
"""What follows the name of a weight in block fp8 in that of its scales."""

EXPERTS = ("w13", "w2")
"""The parameters of a `FusedMoE` that are quantised."""

_LATER = ("int8_w8a16", "int4_w4a16", "mxfp4")
_LATER_FIELDS = ("group_size", "per_channel")
_WORKS = f"this release does {BLOCK_FP8} with block_size [{BLOCK}, {BLOCK}]"
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
# What a hub's quantization_config may say, and the values that mean what is done here.
_HUB_FIELDS: dict[str, tuple[object, ...]] = {
    "activation_scheme": ("dynamic", None),
    "fmt": ("e4m3", None),
    "scale_fmt": ("float", "ue8m0", None),
    "expert_dtype": ("fp8", None),
    "modules_to_convert": (None, []),
    "dequantize": (False, None),
}
_HUB_NAMES = ("quant_method", "weight_block_size", "modules_to_not_convert", "ignored_layers")


@dataclass(frozen=True)
class Quantization:
    """How the experts are held: `type` "fp8_w8a8" with a scale a block of 128 x 128 weights.

    Raises `QuantizationError` for what other releases will do, `ValueError` for anything else.
    """

    type: str = BLOCK_FP8
    granularity: str = "block"
    block_size: Sequence[int] = (BLOCK, BLOCK)

    def __post_init__(self) -> None:
        if self.type in _LATER:
            raise QuantizationError(f"{self.type!r} is not in this release; {_WORKS}")
        if self.type != BLOCK_FP8:
            known = ", ".join(map(repr, (BLOCK_FP8, *_LATER)))
            raise ValueError(f"quantization type is {self.type!r}, expected one of {known}")
        if self.granularity in ("channel", "tensor"):
            raise QuantizationError(
                f"granularity {self.granularity!r} is not in this release; {_WORKS}"
            )
        if self.granularity != "block":
            raise ValueError(
                f"granularity is {self.granularity!r}, expected 'block', 'channel' or 'tensor'"
            )
        size = self.block_size
        if not isinstance(size, Sequence) or not all(type(n) is int and n > 0 for n in size):
            raise ValueError(
                f"block_size is {size!r}, expected two sizes such as [{BLOCK}, {BLOCK}]"
            )
        if list(size) != [BLOCK, BLOCK]:
            raise QuantizationError(f"block_size {list(size)} is not in this release; {_WORKS}")
        object.__setattr__(self, "block_size", tuple(size))

    @classmethod
    def of(cls, value: object) -> "Quantization | None":
        """Of a name, a dict or a `Quantization`; None stays None."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise ValueError(
                f"quantization is {value!r}, expected None, a name such as {BLOCK_FP8!r}, a dict or"
                " a moezoo.Quantization"
            )
        given = dict(value)
        if "type" not in given:
            raise ValueError(f"quantization {value!r} has no 'type', such as {BLOCK_FP8!r}")
        if "block_shape" in given:
            if "block_size" in given:
                raise ValueError(f"quantization {value!r} has block_size and block_shape: give one")
            given["block_size"] = given.pop("block_shape")
        cls(given["type"])  # a type of later releases has fields of its own
        for key in given:
            if key in _LATER_FIELDS:
                raise QuantizationError(f"{key} is not for {BLOCK_FP8}; {_WORKS}")
            if key not in {field.name for field in fields(cls)}:
                raise ValueError(f"quantization has an unknown key {key!r}; {_WORKS}")
        return cls(**given)


@dataclass(frozen=True)
class HubFp8:
    """What a quantization_config of the hub says, as far as it matters here."""

    not_converted: frozenset[str] = frozenset()
    """Modules that are not quantised, nor what is below them."""

    def keeps(self, tensor: str) -> str | None:
        """The entry of `not_converted` that says that this tensor is not quantised, if any."""
        parts = tensor.split(".")
        above = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return next((module for module in above if module in self.not_converted), None)


def hub_scheme(quantization_config: object, name: str) -> HubFp8 | None:
    """What the quantization_config of `name` says; None without one.

    Raises `QuantizationError` naming the field that moezoo does not do.
    """
    if not quantization_config:
        return None
    given = quantization_config
    if not isinstance(given, Mapping) and hasattr(given, "to_dict"):
        given = given.to_dict()
    if not isinstance(given, Mapping):
        raise QuantizationError(f"{name}: quantization_config is {given!r}, expected a table")
    method = given.get("quant_method")
    if method != "fp8":
        raise QuantizationError(
            f"{name} is quantised (quantization_config.quant_method is {method!r}), which this "
            "release does not load, only 'fp8' in blocks; take the 16-bit checkpoint of the model"
        )

    def refuse(field: str, expected: str) -> None:
        raise QuantizationError(
            f"{name}: quantization_config.{field} is {given.get(field)!r} with quant_method 'fp8'; "
            f"this release loads {expected}; take another checkpoint of the model"
        )

    size = given.get("weight_block_size")
    if not isinstance(size, Sequence) or list(size) != [BLOCK, BLOCK]:
        refuse("weight_block_size", f"[{BLOCK}, {BLOCK}]")
    for field, value in given.items():
        if field in _HUB_FIELDS:
            if value not in _HUB_FIELDS[field]:
                refuse(field, " or ".join(repr(v) for v in _HUB_FIELDS[field] if v is not None))
        elif field not in _HUB_NAMES and value:
            refuse(field, "none of that name")
    skipped: list[str] = []
    for field in ("modules_to_not_convert", "ignored_layers"):
        names = given.get(field) or []
        if isinstance(names, str) or not all(isinstance(module, str) for module in names):
            refuse(field, "a list of names")
        skipped.extend(names)
    return HubFp8(frozenset(skipped))


@dataclass(frozen=True)
class Encoding:
    """How a checkpoint stores its weights: `tensors` as if none was quantised, and the name of the
    scales of each weight in fp8.
    """

    scheme: HubFp8 | None
    tensors: Mapping[str, TensorInfo]
    scales: Mapping[str, str]


def encoding_of(
    quantization_config: object, tensors: Mapping[str, TensorInfo], name: str
) -> Encoding:
    """How the checkpoint `name` stores its weights, by its config and its headers.

    Raises `QuantizationError` naming the tensor and its file for a weight without scales, scales
    without a weight, scales of the wrong shape or dtype, and a weight in fp8 that the config says
    is not quantised.
    """
    scheme = hub_scheme(quantization_config, name)
    if scheme is None:
        return Encoding(None, tensors, {})
    plain = dict(tensors)
    scales = {}
    for weight, info in tensors.items():
        if info.dtype == torch.float8_e4m3fn:
            scales[weight] = _scales_of(weight, tensors, scheme, name)
            plain[weight] = replace(info, dtype=torch.bfloat16)
            del plain[scales[weight]]
    alone = next((tensor for tensor in plain if tensor.endswith(SCALES)), None)
    if alone is not None:
        weight = alone.removesuffix(SCALES)
        what = f"is {_dtype(tensors[weight])}" if weight in tensors else "is not there"
        raise QuantizationError(
            f"{name}: {alone}{tensors[alone].where} holds scales of {weight}, which {what}, "
            "expected float8_e4m3fn; get the checkpoint again"
        )
    return Encoding(scheme, plain, scales)


def _scales_of(weight: str, tensors: Mapping[str, TensorInfo], scheme: HubFp8, name: str) -> str:
    info = tensors[weight]
    kept = scheme.keeps(weight)
    if kept is not None:
        raise QuantizationError(
            f"{name}: {weight} is float8_e4m3fn{info.where}, but the quantization_config says that "
            f"{kept} is not quantised; get the config.json that belongs to these weights"
        )
    scales = weight + SCALES
    if scales not in tensors:
        raise QuantizationError(
            f"{name}: {weight} is float8_e4m3fn{info.where} and there is no {scales}; get the "
            "checkpoint again"
        )
    found = tensors[scales]
    expected = scales_shape(info.shape) if len(info.shape) > 1 else None
    if found.shape != expected:
        wanted = "no scales, as it has one dimension" if expected is None else list(expected)
        raise QuantizationError(
            f"{name}: {scales} is {list(found.shape)}{found.where}, {weight} {list(info.shape)} "
            f"takes {wanted}"
        )
    if found.dtype not in (*_SCALE_DTYPES, torch.uint8):
        raise QuantizationError(
            f"{name}: {scales} is {_dtype(found)}{found.where}, expected float32 or float8_e8m0fnu"
        )
    return scales


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def scale_dtype(stored: torch.dtype) -> torch.dtype:
    """How the bytes of scales are read: those of E8M0 are sometimes stored as uint8."""
    return torch.float8_e8m0fnu if stored == torch.uint8 else stored


def experts_of(module: nn.Module) -> dict[str, FusedMoE]:
    """The names of the experts' parameters in `module` and the layer that has each."""
    return {
        f"{name}.{attribute}" if name else attribute: layer
        for name, layer in module.named_modules()
        if isinstance(layer, FusedMoE)
        for attribute in EXPERTS
    }


def quantized_experts(
    module: nn.Module, copies: Sequence[Copy], encoding: Encoding, quantization: Quantization | None
) -> dict[str, tuple[int, ...]]:
    """The experts' parameters that become `QuantizedWeights`, with the shape there.

    All of a model, where the checkpoint is not quantised and `quantization` is asked for; else
    those of the layers that the checkpoint has wholly in fp8, with blocks that gate and up do not
    share. Raises `QuantizationError` for weights in fp8, or to be quantised, that are stored in
    another order of rows and columns.
    """
    owners = experts_of(module)
    on_the_fly = encoding.scheme is None and quantization is not None
    dense: set[int] = set()
    for copy in copies:
        layer = owners.get(copy.target)
        stored = copy.source in encoding.scales
        if copy.view and (stored or (on_the_fly and layer is not None)):
            raise QuantizationError(
                f"{copy.source}{encoding.tensors[copy.source].where} is stored {copy.view}, from "
                f"which this release does not make {BLOCK_FP8}"
            )
        if layer is not None and not on_the_fly:
            shares = copy.target.endswith("w13") and len(copy.target_index) == 1
            if not stored or (shares and layer.w2.shape[2] % BLOCK):
                dense.add(id(layer))
    if not on_the_fly and not encoding.scales:
        return {}
    return {
        name: parts_shape(layer, name) for name, layer in owners.items() if id(layer) not in dense
    }


def parts_shape(layer: FusedMoE, name: str) -> tuple[int, ...]:
    """The shape of w13 or w2 in `QuantizedWeights`."""
    num_experts, hidden_size, intermediate_size = layer.w2.shape
    if name.endswith("w2"):
        return (num_experts, hidden_size, intermediate_size)
    return (num_experts, 2, intermediate_size, hidden_size)


def parts_index(index: Index, shape: Sequence[int]) -> Index:
    """The place in `QuantizedWeights` of this shape of what is parameter[index] of [E, 2I, H]."""
    if len(index) < 2 or len(shape) == 3:
        return index
    part = index[1]
    assert isinstance(part, slice), "the rows of gate or up"
    return (index[0], part.start // shape[2])


def quantized_infos(
    infos: Mapping[str, ParameterInfo], quantized: Mapping[str, tuple[int, ...]]
) -> dict[str, ParameterInfo]:
    """The parameters, with data and scales for those that are quantised."""
    found = {}
    for name, info in infos.items():
        shape = quantized.get(name)
        if shape is None:
            found[name] = info
        else:
            found[f"{name}.data"] = ParameterInfo(shape, torch.float8_e4m3fn)
            found[f"{name}.scales"] = ParameterInfo(scales_shape(shape), torch.float32)
    return found


def quantize_on_meta(module: nn.Module, quantized: Mapping[str, tuple[int, ...]]) -> None:
    """Put `QuantizedWeights` in the place of these parameters, and take no more gradients."""
    for layer in {layer for name, layer in experts_of(module).items() if name in quantized}:
        layer.quantize_(*(BlockFp8.on_meta(*parts_shape(layer, name)) for name in EXPERTS))
    if quantized:
        module.requires_grad_(False)


def stored_layout(
    module: nn.Module, rules: Sequence[Rule | Skip]
) -> tuple[list[Copy], dict[str, torch.Tensor]]:
    """The tensors to write for `module`, and those that they are pieces of, by `Copy.target`.

    Raises `QuantizationError` for quantised weights whose rule stores them in another order.
    """
    weights = dict(_quantized_weights(module))
    infos = {}
    tensors = {}
    state = module.state_dict()
    for name, info in parameter_infos(module).items():
        owner, _, attribute = name.rpartition(".")
        if owner not in weights:
            infos[name], tensors[name] = info, state[name]
        elif attribute == "data":
            flat = state[name].flatten(1, -2)
            infos[owner], tensors[owner] = ParameterInfo(tuple(flat.shape), flat.dtype), flat
        else:
            tensors[f"{owner}{SCALES}"] = state[name].flatten(1, -2)
    copies = layout(rules, infos)
    for copy in [copy for copy in copies if copy.target in weights]:
        shape = weights[copy.target].shape
        index = copy.target_index
        shares = len(shape) == 4 and len(index) == 1
        if copy.view or (shares and shape[2] % BLOCK):
            raise QuantizationError(
                f"{copy.source} cannot be written: its layout has no {BLOCK_FP8} with experts of "
                f"width {shape[-2] if shares else shape[-1]}"
            )
        if len(index) == 2:
            _, part = parts_index(index, shape)
            assert isinstance(part, int), "gate or up"
            rows = scales_shape(shape)[-2]
            index = (index[0], slice(part * rows, (part + 1) * rows))
        target = f"{copy.target}{SCALES}"
        copies.append(Copy(target, index, copy.source + SCALES, None, ()))
    return copies, tensors


def hub_config(module: nn.Module, rules: Sequence[Rule | Skip]) -> dict[str, Any] | None:
    """The quantization_config of `module`, whose values may be on meta; None if it has none."""
    weights = dict(_quantized_weights(module))
    if not weights:
        return None
    copies, tensors = stored_layout(module, rules)
    plain = {
        re.sub(r"\.experts\..*", ".experts", copy.source.removesuffix(".weight"))
        for copy in copies
        if not copy.source.endswith(SCALES)
        and copy.target not in weights
        and tensors[copy.target].dim() > 1
    }
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(plain),
    }


def describe_(config: Any, module: nn.Module, rules: Sequence[Rule | Skip]) -> None:
    """Let a transformers config say what of `module` is quantised, as a checkpoint of it would."""
    described = hub_config(module, rules)
    if described is not None:
        config.quantization_config = described
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def _quantized_weights(module: nn.Module) -> Iterator[tuple[str, QuantizedWeights]]:
    for name, child in module.named_modules():
        if isinstance(child, QuantizedWeights):
            yield name, child
