"""Replace parameters of a module, experts' and linear layers', by quantised weights on meta."""

from collections.abc import Mapping

from torch import nn

from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import QuantizedWeights
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.experts import experts_of, parts_shape
from moezoo.loaders.linears import linears_of
from moezoo.loaders.mapping import ParameterInfo


def quantized_infos(
    module: nn.Module, infos: Mapping[str, ParameterInfo], quantized: Mapping[str, Kind]
) -> dict[str, ParameterInfo]:
    """Return the parameters of `module`, with the tensors of their format in place of those that
    are quantised."""
    owners = experts_of(module)
    found = {}
    for name, info in infos.items():
        if name not in quantized:
            found[name] = info
            continue
        shape = parts_shape(owners[name], name) if name in owners else info.shape
        for field, tensor in quantized[name].on_meta(*shape).tensors().items():
            if tensor is not None:
                found[f"{name}.{field}"] = ParameterInfo(tuple(tensor.shape), tensor.dtype)
    return found


def quantize_on_meta(module: nn.Module, quantized: Mapping[str, Kind]) -> None:
    """Put `QuantizedWeights` in place of these parameters, and stop all gradients of the module."""
    names: dict[FusedMoE, list[str]] = {}
    for name, moe in experts_of(module).items():
        if name in quantized:
            names.setdefault(moe, []).append(name)
    for moe, both in names.items():
        moe.quantize_(*(quantized[name].on_meta(*parts_shape(moe, name)) for name in both))
    for name, layer in linears_of(module).items():
        if name in quantized:
            layer.quantize_(quantized[name].on_meta(*layer.weight.shape))
    for name, kind in quantized.items():
        held = module.get_submodule(name)
        assert isinstance(held, QuantizedWeights)
        held.kind = kind
    if quantized:
        module.requires_grad_(False)
