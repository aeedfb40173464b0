"""The device that each layer of a model is loaded to, by a `device_map`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import torch

from moezoo.device import device_of
from moezoo.loaders.mapping import ParameterInfo
from moezoo.loaders.memory import free_memory

T = TypeVar("T")

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]

AUTO = "auto"
_WHOLE = ("", "decoder")
_LAYERS = "decoder.layers"
_ENDS = ("decoder.embed", "decoder.norm", "decoder.rope", "decoder.lm_head")
_KEPT_FREE = 0.1
"""Share of a GPU's free memory that "auto" leaves for caches and activations."""


@dataclass(frozen=True)
class Places:
    """Devices of a decoder's layers, and `home`, the device of everything else."""

    home: torch.device
    layers: tuple[torch.device, ...] = ()
    """Device of each layer; empty where all are at home."""

    @property
    def devices(self) -> list[torch.device]:
        return list(dict.fromkeys((self.home, *self.layers)))

    def of(self, name: str) -> torch.device:
        """Return the device of a tensor of the decoder."""
        layer = _layer_of(name)
        return self.home if layer is None or not self.layers else self.layers[layer]

    def parts(self, named: Mapping[str, T]) -> Iterator[tuple[torch.device, dict[str, T]]]:
        """Yield, device by device, the entries of a mapping whose keys are names of tensors."""
        for device in self.devices:
            yield device, {n: value for n, value in named.items() if self.of(n) == device}


def parse_device_map(device_map: DeviceMap) -> str | Mapping[str, torch.device]:
    """Return "auto" or the devices of a map; a single device is a map of everything. Raises for
    anything else.

    Raises `ValueError` for a device that there is not, for a disk, and for a module that a map
    cannot place.
    """
    if device_map == AUTO:
        return AUTO
    if not isinstance(device_map, Mapping):
        return {"": _device(device_map, f"device_map={device_map!r}, which is not {AUTO!r}")}
    found = {}
    for module, device in device_map.items():
        if module not in (*_WHOLE, _LAYERS, *_ENDS) and not _is_layer(module):
            raise ValueError(
                f"device_map names {module!r}, expected '' for the whole model, '{_LAYERS}.0' and "
                f"so on for its layers (a layer is not divided), or {', '.join(_ENDS)}"
            )
        found[module] = _device(device, f"device_map[{module!r}]")
    return found


def _device(device: object, name: str) -> torch.device:
    if device in ("disk", "meta"):
        raise ValueError(
            f"{name} is {device!r}: moezoo keeps no weights on a disk; give that layer a GPU or "
            "'cpu', or take less memory with quantization='int4_w4a16'"
        )
    index = isinstance(device, int) or (isinstance(device, str) and device.isdigit())
    try:
        return device_of(f"cuda:{device}" if index else device)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _is_layer(module: str) -> bool:
    return module.startswith(f"{_LAYERS}.") and module.removeprefix(f"{_LAYERS}.").isdigit()


def _layer_of(name: str) -> int | None:
    start, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if start == "layers" else None


def places_of(
    device_map: str | Mapping[str, torch.device], wanted: Mapping[str, ParameterInfo]
) -> Places:
    """Return where `wanted`, the tensors of a decoder, go by the result of `parse_device_map`.

    Raises `ValueError` for a map that leaves out a layer, names one that there is not, or divides
    the embedding, the last norm and the head.
    """
    sizes: dict[int | None, int] = {None: 0}
    for name, info in wanted.items():
        layer = _layer_of(name)
        sizes[layer] = sizes.get(layer, 0) + prod(info.shape) * info.dtype.itemsize
    num_layers = len(sizes) - 1
    layers = [sizes[layer] for layer in range(num_layers)]
    if isinstance(device_map, str):
        return _automatic(sizes[None], layers)
    for module in device_map:
        if _is_layer(module) and int(module.rpartition(".")[2]) >= num_layers:
            raise ValueError(f"device_map names {module!r}, and there are {num_layers} layers")
    whole = next((device_map[name] for name in reversed(_WHOLE) if name in device_map), None)
    rest = device_map.get(_LAYERS, whole)
    of_layers = [device_map.get(f"{_LAYERS}.{layer}", rest) for layer in range(num_layers)]
    named = {device_map.get(name, whole) for name in _ENDS} - {None}
    if len(named) > 1:
        raise ValueError(
            f"device_map gives several devices to {', '.join(_ENDS)}: they go to one together"
        )
    missing = [f"{_LAYERS}.{i}" for i, device in enumerate(of_layers) if device is None]
    if missing or not named:
        shown = ", ".join([*(() if named else _ENDS[:1]), *missing][:3])
        raise ValueError(
            f"device_map has no device for {shown}; name them, or '' for all that is not named"
        )
    (home,) = named
    assert home is not None
    return Places(home, tuple(device for device in of_layers if device is not None))


def _automatic(ends: int, layers: list[int]) -> Places:
    """Choose as few GPUs as have room, filled evenly by their free memory; all GPUs and the CPU if
    they have not; the CPU if there is no GPU."""
    cpu = torch.device("cpu")
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    room = {gpu: int((free_memory(gpu) or 0) * (1 - _KEPT_FREE)) for gpu in gpus}
    return spread(ends, layers, room, cpu)


def spread(
    ends: int, layers: list[int], room: Mapping[torch.device, int], last: torch.device
) -> Places:
    """Distribute layers of these bytes in order over the devices of `room`, and the others to
    `last`.

    `ends`, what is in no layer, go to the first that has room for them.
    """
    roomy = {device: free for device, free in room.items() if free >= ends}
    for count in range(1, len(roomy) + 1):
        some = dict(list(roomy.items())[:count])
        for percent in range(1, 101):
            places = _filled(ends, layers, {d: free * percent // 100 for d, free in some.items()})
            if len(places) == len(layers):
                return Places(next(iter(some)), tuple(places))
    if not roomy:
        return Places(last, (last,) * len(layers))
    places = _filled(ends, layers, roomy)
    return Places(next(iter(roomy)), (*places, *(last,) * (len(layers) - len(places))))


def _filled(ends: int, layers: list[int], room: Mapping[torch.device, int]) -> list[torch.device]:
    """Return the devices of the first layers, as many layers as have room."""
    places: list[torch.device] = []
    used = ends
    for device, free in room.items():
        while len(places) < len(layers) and used + layers[len(places)] <= free:
            used += layers[len(places)]
            places.append(device)
        used = 0
    return places
