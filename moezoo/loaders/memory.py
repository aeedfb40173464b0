"""Memory for weights: check that a device has it, and allocate tensors to be filled."""

from collections.abc import Mapping
from contextlib import suppress
from math import prod

import torch
from torch import nn

from moezoo.device import free_bytes, is_out_of_memory, multiplies_fp8
from moezoo.errors import MoEOutOfMemoryError, QuantizationError
from moezoo.formats import FP8, QUANTIZATIONS
from moezoo.loaders.experts import experts_of
from moezoo.loaders.mapping import ParameterInfo
from moezoo.loaders.quantization import Quantization
from moezoo.loaders.quantized_parameters import quantized_infos


def check_memory(
    wanted: Mapping[str, ParameterInfo], device: torch.device, name: str, module: nn.Module
) -> None:
    """Raise `MoEOutOfMemoryError` if `device` has too little free memory for these weights of
    `module`."""
    free = free_memory(device)
    if free is None or _nbytes(wanted) <= free:
        return
    need, slim = _nbytes(wanted), _nbytes(wanted, 2)
    host = free_memory(torch.device("cpu"))
    if slim <= free:
        advice = f"with dtype=torch.bfloat16 they take {_gib(slim)} and fit"
    elif (fitting := _that_fits(wanted, device, module, free)) is not None:
        quantization, small = fitting
        advice = f"with quantization={quantization!r} they take {_gib(small)} and fit"
    elif device.type == "cuda" and host is not None and need <= host:
        advice = f"device='cpu' has {_gib(host)} free and would fit them"
    else:
        advice = f"in 16 bit they fit a device with {_gib(slim)} free"
    raise MoEOutOfMemoryError(
        f"the weights of {name} take {_gib(need)}, {device} has {_gib(free)} free; {advice}"
    )


def _that_fits(
    wanted: Mapping[str, ParameterInfo], device: torch.device, module: nn.Module, free: int
) -> tuple[str, int] | None:
    """Return the most exact quantisation of experts with which the weights fit, and their bytes
    with it."""
    experts = experts_of(module).keys()
    if not experts or not experts <= wanted.keys():
        return None  # nothing to quantise, or quantised already
    for quantization in QUANTIZATIONS:
        if quantization == FP8 and not multiplies_fp8(device):
            continue
        asked = Quantization(quantization)
        try:
            kinds = {
                name: asked.recipe(name, wanted[name].shape[-1], wanted[name].dtype).kind
                for name in experts
            }
        except QuantizationError:
            continue  # there is no such format of these columns
        need = _nbytes(quantized_infos(module, wanted, kinds))
        if need <= free:
            return quantization, need
    return None


def _nbytes(wanted: Mapping[str, ParameterInfo], widest: int = 8) -> int:
    return sum(prod(info.shape) * min(info.dtype.itemsize, widest) for info in wanted.values())


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB"


def free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return free_bytes(device)
    with suppress(OSError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def allocate(wanted: Mapping[str, ParameterInfo], device: torch.device) -> dict[str, torch.Tensor]:
    try:
        return {name: _empty(info, device) for name, info in wanted.items()}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MoEOutOfMemoryError(
            f"the weights take {_gib(_nbytes(wanted))} on {device}: {error}"
        ) from error


def _empty(info: ParameterInfo, device: torch.device) -> torch.Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device=device)
