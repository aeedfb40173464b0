"""From a checkpoint to a model: build on meta, plan, allocate, stream the weights in.

Memory beyond the final weights does not grow with the model.
"""

import logging
import mmap
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from moezoo import registry
from moezoo.causal_lm import MoECausalLM
from moezoo.device import device_of
from moezoo.errors import (
    CheckpointError,
    MoEOutOfMemoryError,
    QuantizationError,
    UnsupportedArchitectureError,
)
from moezoo.layers.moe.experts_fp8 import require_fp8
from moezoo.layers.quant import BlockFp8
from moezoo.layers.quant.format import wrong_scale
from moezoo.layers.quant.fp8 import scales_shape
from moezoo.loaders.checkpoint import (
    CONFIG,
    GENERATION_CONFIG,
    Checkpoint,
    Location,
    open_checkpoint,
)
from moezoo.loaders.encodings import (
    Encoding,
    Quantization,
    describe_,
    encoding_of,
    experts_of,
    hub_scheme,
    parts_index,
    parts_shape,
    quantize_on_meta,
    quantized_experts,
    quantized_infos,
    scale_dtype,
)
from moezoo.loaders.mapping import (
    ParameterInfo,
    Rule,
    Skip,
    TensorInfo,
    layout,
    parameter_infos,
    stored_order,
)
from moezoo.loaders.plan import Plan, dtype_name, plan
from moezoo.loaders.stream import Piece, cut, cut_blocks, stream

_log = logging.getLogger(__name__)

_MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HUGE_PAGE = 2 << 20
_CHUNK = 16 << 20


@torch.inference_mode(False)
def from_pretrained(
    model_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    quantization: str | Mapping[str, object] | Quantization | None = None,
    parallel: object = None,
    eplb: object = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> MoECausalLM:
    """The model of a local folder or hub id, ready to generate.

    `dtype` is bfloat16, float16 or float32, as a `torch.dtype` or its name, or "auto" for the
    checkpoint's own (float32 for one in float64, cast while loading); `device` is "cuda", "cuda:1"
    or "cpu", by default a GPU if there is one. `quantization` is "fp8_w8a8", which quantises the
    experts of a checkpoint that is not quantised while it loads, or None, which keeps them as they
    are stored. `parallel` and `eplb` are None in this release. `revision`, `cache_dir`, `token` and
    `local_files_only` mean what they do in huggingface_hub. `progress` shows a bar where stderr is
    a terminal.

    Raises `CheckpointError` for a checkpoint that cannot be found, read or fitted,
    `UnsupportedArchitectureError`, `QuantizationError`, `MoEOutOfMemoryError` before anything is
    allocated, and `ValueError` for other arguments.
    """
    _refuse_later_options(parallel, eplb)
    asked = Quantization.of(quantization)
    _dtype(dtype)  # before anything is asked of the hub
    target_device = device_of(device)
    checkpoint = open_checkpoint(
        model_id,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    return from_checkpoint(
        checkpoint, dtype=dtype, device=target_device, quantization=asked, progress=progress
    )


@torch.inference_mode(False)
def from_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    quantization: str | Mapping[str, object] | Quantization | None = None,
    progress: bool = True,
) -> MoECausalLM:
    """The model of an open checkpoint; arguments and errors as in `from_pretrained`."""
    target_device = device_of(device)
    asked_dtype = _dtype(dtype)
    asked = Quantization.of(quantization)
    config = transformers_config(checkpoint)
    encoding = own_encoding(checkpoint)
    config.dtype = asked_dtype or own_dtype(config, encoding.tensors)
    generation_config = own_generation_config(checkpoint)
    rules, twins = tied_rules(config, checkpoint)
    with torch.device("meta"):
        decoder = registry.build(config)
    if twins is not None:
        _planned(
            decoder,
            checkpoint,
            rules,
            device=target_device,
            dtype=config.dtype,
            quantization=asked,
        )
        if not _same_bytes(checkpoint, *twins, progress=progress):
            _untie(config, checkpoint.name, twins)
            rules = registry.architecture(config.model_type).CHECKPOINT
            with torch.device("meta"):
                decoder = registry.build(config)
    load_weights(
        decoder,
        checkpoint,
        rules,
        device=target_device,
        dtype=config.dtype,
        quantization=asked,
        progress=progress,
    )
    describe_(config, decoder, registry.architecture(config.model_type).CHECKPOINT)
    model = MoECausalLM(config, decoder).eval()
    if generation_config is not None:
        model.generation_config = generation_config
    return model


@torch.inference_mode(False)
def from_config(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    quantization: str | Mapping[str, object] | Quantization | None = None,
    parallel: object = None,
    eplb: object = None,
) -> MoECausalLM:
    """The model that `config` describes with random weights, made on `device`.

    Matrices are normal with deviation `config.initializer_range`, norms one, biases zero;
    `torch.manual_seed` decides them. "auto" is the config's dtype, or float32. With `quantization`,
    or a config that says so, experts are made one by one and quantised. Arguments and errors
    otherwise as in `from_pretrained`.
    """
    _refuse_later_options(parallel, eplb)
    asked = Quantization.of(quantization)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a transformers config")
    target_device = device_of(device)
    config = deepcopy(config)
    scheme = hub_scheme(getattr(config, "quantization_config", None), "the config")
    config.dtype = _dtype(dtype) or _config_dtype(config, torch.float32)
    with torch.device("meta"):
        decoder = registry.build(config)
    plain = parameter_infos(decoder, config.dtype)
    quantized: dict[str, tuple[int, ...]] = {}
    if asked is not None or scheme is not None:
        kept = {
            copy.target
            for copy in layout(registry.architecture(config.model_type).CHECKPOINT, plain)
            if scheme is not None and scheme.keeps(copy.source)
        }
        quantized = {
            name: parts_shape(layer, name)
            for name, layer in experts_of(decoder).items()
            if kept.isdisjoint(n for n, other in experts_of(decoder).items() if other is layer)
        }
    if quantized:
        require_fp8(target_device)
    wanted = quantized_infos(plain, quantized)
    check_memory(wanted, target_device, f"this {config.model_type}")
    tensors = _allocate(wanted, target_device)
    for name in quantized:
        data, scales = tensors[f"{name}.data"], tensors[f"{name}.scales"]
        _initialise_quantized(data, scales, config.dtype, config.initializer_range)
    for name in (name for name in plain if name in wanted):
        _initialise(name, tensors[name], config.initializer_range)
    quantize_on_meta(decoder, quantized)
    _place(decoder, tensors)
    describe_(config, decoder, registry.architecture(config.model_type).CHECKPOINT)
    return MoECausalLM(config, decoder).eval()


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    rules: Sequence[Rule | Skip],
    *,
    device: torch.device,
    dtype: torch.dtype,
    experts: Sequence[int] | None = None,
    quantization: Quantization | None = None,
    progress: bool = False,
) -> None:
    """Give `module`, built on the meta device, the weights of `checkpoint` by `rules`.

    Parameters and persistent buffers come to `device`, floating ones as `dtype` but for those that
    their module names in `keep_dtype`. `experts` are the ids that this rank owns, in the order of
    its rows. Weights that the module shares are loaded once and stay shared.

    With `quantization` the experts of a checkpoint that is not quantised become `QuantizedWeights`;
    so do those that are stored in fp8, and other weights in fp8 are dequantised. A module with
    quantised experts needs no gradient.

    Raises `CheckpointError` for what does not fit or cannot be read, `QuantizationError` for what
    is wrong with quantised weights, and `MoEOutOfMemoryError` before any allocation; the module is
    then still on meta, and no memory is held.
    """
    planned = _planned(
        module,
        checkpoint,
        rules,
        device=device,
        dtype=dtype,
        experts=experts,
        quantization=quantization,
    )
    chosen = planned.plan
    for skip, names in chosen.skipped.items():
        _log.warning("%s: %d tensors not loaded: %s", skip.pattern, len(names), skip.reason)
    sources = {copy.source for copy in chosen.copies}
    scales = planned.encoding.scales
    for name in sorted(_dequantized_experts(module, planned)):
        _log.warning(
            "%s: dequantised, since the checkpoint has the experts of this layer in fp8 only in "
            "part, or in blocks that gate and up share",
            name,
        )
    sources |= {scales[source] for source in sources & scales.keys()}
    locations = checkpoint.fetch(sources, progress=progress)
    try:
        tensors = _read_copies(checkpoint, planned, locations, device=device, progress=progress)
    except BaseException as error:
        # The frames of the traceback hold the tensors for as long as anybody keeps the error.
        _clear_frames(error)
        raise
    quantize_on_meta(module, planned.quantized)
    _place(module, tensors)


class _Planned(NamedTuple):
    """What a module wants and how it comes there."""

    wanted: dict[str, ParameterInfo]
    plan: Plan
    encoding: Encoding
    quantized: dict[str, tuple[int, ...]]
    """The experts' parameters that become `QuantizedWeights`, of this shape."""


def _planned(
    module: nn.Module,
    checkpoint: Checkpoint,
    rules: Sequence[Rule | Skip],
    *,
    device: torch.device,
    dtype: torch.dtype,
    experts: Sequence[int] | None = None,
    quantization: Quantization | None = None,
) -> _Planned:
    """All that can be refused without a weight."""
    encoding = own_encoding(checkpoint)
    plain = parameter_infos(module, dtype)
    chosen = plan(rules, encoding.tensors, plain, experts=experts, name=checkpoint.name)
    quantized = quantized_experts(module, chosen.copies, encoding, quantization)
    if quantized:
        require_fp8(device)
    wanted = quantized_infos(plain, quantized)
    check_memory(wanted, device, checkpoint.name)
    return _Planned(wanted, chosen, encoding, quantized)


def _dequantized_experts(module: nn.Module, planned: _Planned) -> set[str]:
    """The experts' parameters of which some are stored in fp8 and none stays so."""
    stored = {copy.target for copy in planned.plan.copies if copy.source in planned.encoding.scales}
    return stored & experts_of(module).keys() - planned.quantized.keys()


def check_memory(wanted: Mapping[str, ParameterInfo], device: torch.device, name: str) -> None:
    """Raise `MoEOutOfMemoryError` if `device` has too little free memory for these weights."""
    free = _free_memory(device)
    if free is None or _nbytes(wanted) <= free:
        return
    need, slim = _nbytes(wanted), _nbytes(wanted, 2)
    host = _free_memory(torch.device("cpu"))
    if slim <= free:
        advice = f"with dtype=torch.bfloat16 they take {_gib(slim)} and fit"
    elif device.type == "cuda" and host is not None and need <= host:
        advice = f"device='cpu' has {_gib(host)} free and would fit them"
    else:
        advice = f"in 16 bit they fit a device with {_gib(slim)} free"
    raise MoEOutOfMemoryError(
        f"the weights of {name} take {_gib(need)}, {device} has {_gib(free)} free; {advice}"
    )


def _nbytes(wanted: Mapping[str, ParameterInfo], widest: int = 8) -> int:
    return sum(prod(info.shape) * min(info.dtype.itemsize, widest) for info in wanted.values())


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB"


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    with suppress(OSError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _allocate(wanted: Mapping[str, ParameterInfo], device: torch.device) -> dict[str, torch.Tensor]:
    try:
        return {name: _empty(info, device) for name, info in wanted.items()}
    except (torch.OutOfMemoryError, OSError) as error:
        raise MoEOutOfMemoryError(
            f"the weights take {_gib(_nbytes(wanted))} on {device}: {error}"
        ) from error


def _empty(info: ParameterInfo, device: torch.device) -> torch.Tensor:
    """Uninitialised memory; large tensors on the CPU lie in huge pages.

    Most of the time to fill fresh memory goes into page faults, and huge pages need 512 times
    fewer.
    """
    nbytes = prod(info.shape) * info.dtype.itemsize
    if device.type != "cpu" or nbytes < _HUGE_PAGE or sys.platform != "linux":
        return torch.empty(info.shape, dtype=info.dtype, device=device)
    memory = mmap.mmap(-1, nbytes)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=info.dtype).view(info.shape)


def _read_copies(
    checkpoint: Checkpoint,
    planned: _Planned,
    locations: Mapping[str, Location],
    *,
    device: torch.device,
    progress: bool,
) -> dict[str, torch.Tensor]:
    """The wanted tensors on `device`, read from the files: scales first, as others need them."""
    tensors = _allocate(planned.wanted, device)
    pieces: list[Piece] = []
    scale_pieces: list[Piece] = []
    stored_scales: list[tuple[str, torch.Tensor]] = []
    computed_scales: list[tuple[str, torch.Tensor]] = []
    for copy in planned.plan.copies:
        source, dtype = copy.source, checkpoint.tensors[copy.source].dtype
        place = _place_of(checkpoint, locations, source, copy.rows)
        scales_source = planned.encoding.scales.get(source)
        shape = planned.quantized.get(copy.target)
        if shape is None:
            target = tensors[copy.target][copy.target_index]
            if scales_source is None:
                pieces.extend(cut(source, place, dtype, stored_order(target, copy.view)))
                continue
            scales = torch.empty(scales_shape(target.shape), dtype=torch.float32, device=device)
            put: Callable[..., object] = _dequantize_into
        else:
            index = parts_index(copy.target_index, shape)
            target = tensors[f"{copy.target}.data"][index]
            scales = tensors[f"{copy.target}.scales"][index]
            put = _quantize_into
        if scales_source is None or shape is None:
            pieces.extend(cut_blocks(source, place, dtype, weights=target, scales=scales, put=put))
        else:
            pieces.extend(cut(source, place, dtype, target))
        if scales_source is None:
            computed_scales.append((source, scales))
        else:
            stored_scales.append((scales_source, scales))
            place = _place_of(checkpoint, locations, scales_source, copy.rows)
            dtype = scale_dtype(checkpoint.tensors[scales_source].dtype)
            scale_pieces.extend(cut(scales_source, place, dtype, scales))
    if scale_pieces:
        stream(scale_pieces, device, progress=False)
        _check_scales(checkpoint, stored_scales, "the scale of block {} is {}")
    stream(pieces, device, progress=progress)
    _check_scales(checkpoint, computed_scales, "the weights of block {} are NaN or Inf, scale {}")
    return tensors


def _place_of(
    checkpoint: Checkpoint, locations: Mapping[str, Location], source: str, rows: slice | None
) -> Location:
    stored = checkpoint.tensors[source]
    path, offset = locations[source]
    if rows is not None:
        offset += rows.start * prod(stored.shape[1:]) * stored.dtype.itemsize
    return Location(path, offset)


def _quantize_into(data: torch.Tensor, scales: torch.Tensor, stored: torch.Tensor) -> None:
    quantized = BlockFp8.quantize_unchecked(stored)
    data.copy_(quantized.data)
    scales.copy_(quantized.scales)


def _dequantize_into(target: torch.Tensor, scales: torch.Tensor, stored: torch.Tensor) -> None:
    target.copy_(BlockFp8(stored, scales).dequantize())


def _check_scales(
    checkpoint: Checkpoint, scales: Sequence[tuple[str, torch.Tensor]], problem: str
) -> None:
    """Raise `QuantizationError` naming the first tensor with a scale that cannot be one."""
    # One wait for the GPU a thousand tensors; which of them is wrong matters only if one is.
    for start in range(0, len(scales), 1000):
        some = scales[start : start + 1000]
        if wrong_scale(torch.cat([tensor.flatten() for _, tensor in some])) is None:
            continue
        for source, tensor in some:
            place = wrong_scale(tensor)
            if place is not None:
                found = problem.format(place, tensor[tuple(place)].item())
                raise QuantizationError(
                    f"{checkpoint.name}: {source}{checkpoint.tensors[source].where}: {found}; it "
                    "must be finite and positive"
                )


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _place(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `tensors` where `module` has the parameters and buffers of these names."""
    placed: dict[int, torch.Tensor] = {}
    for name, old in module.state_dict(keep_vars=True).items():
        if id(old) not in placed:
            tensor = tensors[name]
            if isinstance(old, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
            placed[id(old)] = tensor
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, placed[id(old)])
    for name, buffer in module.named_buffers():
        assert not buffer.is_meta, f"{name} is not persistent, so nothing says what is in it"


@torch.no_grad()
def _initialise_quantized(
    data: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, deviation: float
) -> None:
    """An expert at a time."""
    for part, part_scales in zip(data, scales, strict=True):
        drawn = torch.empty(part.shape, dtype=dtype, device=data.device).normal_(std=deviation)
        _quantize_into(part, part_scales, drawn)


@torch.no_grad()
def _initialise(name: str, tensor: torch.Tensor, deviation: float) -> None:
    if name.endswith("bias"):
        tensor.zero_()
    elif tensor.dim() == 1:
        tensor.fill_(1)  # a norm's weight
    else:
        tensor.normal_(std=deviation)


def transformers_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The checkpoint's transformers config, if it is of an architecture that moezoo has."""
    raw = dict(checkpoint.config)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{checkpoint.name}: {CONFIG} names no model_type")
    try:
        registry.architecture(model_type)
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(f"{checkpoint.name}: {error}") from error
    hub_scheme(raw.get("quantization_config"), checkpoint.name)
    if model_type not in CONFIG_MAPPING:
        raw["model_type"] = model_type = registry.ARCHITECTURES[model_type]
    try:
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        raise CheckpointError(f"{checkpoint.name}: {CONFIG} is not valid: {error}") from error
    config.name_or_path = checkpoint.name
    return config


def own_generation_config(checkpoint: Checkpoint) -> GenerationConfig | None:
    """What the checkpoint says of generation, if anything; raises `CheckpointError` if invalid."""
    if GENERATION_CONFIG not in checkpoint.files.listing():
        return None
    try:
        return GenerationConfig.from_pretrained(checkpoint.config_folder)
    except (OSError, TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: {GENERATION_CONFIG} is not valid: {error}"
        ) from error


def own_encoding(checkpoint: Checkpoint) -> Encoding:
    """How the checkpoint stores its weights; raises `QuantizationError` for what is not loaded."""
    return encoding_of(
        checkpoint.config.get("quantization_config"), checkpoint.tensors, checkpoint.name
    )


def own_dtype(config: PreTrainedConfig, tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """The dtype that the config names, or else that of the first floating tensor.

    float32 where that is float64. Raises `UnsupportedArchitectureError` if the config names
    another dtype.
    """
    stored = (tensor.dtype for tensor in tensors.values())
    floating = (dtype for dtype in stored if dtype in (*_MODEL_DTYPES, torch.float64))
    return _config_dtype(config, next(floating, torch.float32))


def _config_dtype(config: PreTrainedConfig, default: torch.dtype) -> torch.dtype:
    dtype = config.dtype or default
    if dtype == torch.float64:
        return torch.float32  # no layer computes in float64
    if dtype not in _MODEL_DTYPES:
        raise UnsupportedArchitectureError(
            f"{config.name_or_path or config.model_type}: config.dtype is {dtype}, expected"
            f" {', '.join(map(dtype_name, _MODEL_DTYPES))} or float64; choose one with dtype"
        )
    return dtype


def tied_rules(
    config: PreTrainedConfig, checkpoint: Checkpoint
) -> tuple[tuple[Rule | Skip, ...], tuple[str, str] | None]:
    """The rules for a checkpoint whose config may tie the head to the embedding.

    As in transformers, one of the two tensors is enough, a head equal to the embedding is left
    out, and a head that differs unties the model: the weights are right and the config is wrong.
    Where only their bytes can say which it is, the names of the two are returned too, and the rules
    leave out the head.
    """
    rules: tuple[Rule | Skip, ...] = registry.architecture(config.model_type).CHECKPOINT
    sources = {rule.target: rule.sources[0] for rule in rules if isinstance(rule, Rule)}
    head, embedding = sources["lm_head.weight"], sources["embed.weight"]
    if not config.tie_word_embeddings or head not in checkpoint.tensors:
        return rules, None
    if embedding not in checkpoint.tensors:
        return (*rules, Rule("embed.weight", head)), None
    a, b = checkpoint.tensors[head], checkpoint.tensors[embedding]
    if (a.shape, a.dtype) != (b.shape, b.dtype) or a.dtype == torch.float8_e4m3fn:
        _untie(config, checkpoint.name, (head, embedding))
        return rules, None
    return (*rules, Skip(head, "tied to the embedding")), (head, embedding)


def _untie(config: PreTrainedConfig, name: str, twins: tuple[str, str]) -> None:
    _log.warning(
        "%s: tie_word_embeddings is set, but %s and %s differ; they stay apart", name, *twins
    )
    config.tie_word_embeddings = False


def _same_bytes(checkpoint: Checkpoint, first: str, second: str, *, progress: bool) -> bool:
    nbytes = checkpoint.tensors[first].nbytes
    locations = checkpoint.fetch((first, second), progress=progress)
    with open(locations[first].path, "rb") as left, open(locations[second].path, "rb") as right:
        left.seek(locations[first].offset)
        right.seek(locations[second].offset)
        sizes = (min(_CHUNK, nbytes - start) for start in range(0, nbytes, _CHUNK))
        return all(left.read(size) == right.read(size) for size in sizes)


def _refuse_later_options(parallel: object, eplb: object) -> None:
    for name, value in (("parallel", parallel), ("eplb", eplb)):
        if value is not None:
            raise ValueError(f"{name}={value!r} is not in this release; leave it None")


def _dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """The dtype asked for; None for "auto"."""
    if dtype == "auto":
        return None
    names = {dtype_name(known): known for known in _MODEL_DTYPES}
    chosen = names.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in _MODEL_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected 'auto' or one of {', '.join(names)}")
    return chosen
