"""From a checkpoint to a model: build on meta, plan, allocate, stream the weights in.

Memory beyond the final weights does not grow with the model.
"""

import logging
import mmap
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from math import prod
from pathlib import Path

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
from moezoo.loaders.checkpoint import (
    CONFIG,
    GENERATION_CONFIG,
    Checkpoint,
    Location,
    open_checkpoint,
)
from moezoo.loaders.mapping import (
    Copy,
    ParameterInfo,
    Rule,
    Skip,
    parameter_infos,
    stored_order,
)
from moezoo.loaders.plan import Plan, dtype_name, plan
from moezoo.loaders.stream import Piece, cut, stream

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
    quantization: object = None,
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
    or "cpu", by default a GPU if there is one. `quantization`, `parallel` and `eplb` are
    None in this release. `revision`, `cache_dir`, `token` and `local_files_only` mean what they do
    in huggingface_hub. `progress` shows a bar where stderr is a terminal.

    Raises `CheckpointError` for a checkpoint that cannot be found, read or fitted,
    `UnsupportedArchitectureError`, `QuantizationError`, `MoEOutOfMemoryError` before anything is
    allocated, and `ValueError` for other arguments.
    """
    _refuse_later_options(quantization, parallel, eplb)
    _dtype(dtype)  # before anything is asked of the hub
    target_device = device_of(device)
    checkpoint = open_checkpoint(
        model_id,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    return from_checkpoint(checkpoint, dtype=dtype, device=target_device, progress=progress)


@torch.inference_mode(False)
def from_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> MoECausalLM:
    """The model of an open checkpoint; arguments and errors as in `from_pretrained`."""
    target_device = device_of(device)
    asked_dtype = _dtype(dtype)
    config = transformers_config(checkpoint)
    config.dtype = asked_dtype or own_dtype(config, checkpoint)
    generation_config = own_generation_config(checkpoint)
    rules, twins = tied_rules(config, checkpoint)
    with torch.device("meta"):
        decoder = registry.build(config)
    if twins is not None:
        _planned(decoder, checkpoint, rules, device=target_device, dtype=config.dtype)
        if not _same_bytes(checkpoint, *twins, progress=progress):
            _untie(config, checkpoint.name, twins)
            rules = registry.architecture(config.model_type).CHECKPOINT
            with torch.device("meta"):
                decoder = registry.build(config)
    load_weights(
        decoder, checkpoint, rules, device=target_device, dtype=config.dtype, progress=progress
    )
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
    quantization: object = None,
    parallel: object = None,
    eplb: object = None,
) -> MoECausalLM:
    """The model that `config` describes with random weights, made on `device`.

    Matrices are normal with deviation `config.initializer_range`, norms one, biases zero;
    `torch.manual_seed` decides them. "auto" is the config's dtype, or float32. Arguments and errors
    otherwise as in `from_pretrained`.
    """
    _refuse_later_options(quantization, parallel, eplb)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a transformers config")
    target_device = device_of(device)
    config = deepcopy(config)
    refuse_quantised(getattr(config, "quantization_config", None), "the config")
    config.dtype = _dtype(dtype) or _config_dtype(config, torch.float32)
    with torch.device("meta"):
        decoder = registry.build(config)
    wanted = parameter_infos(decoder, config.dtype)
    check_memory(wanted, target_device, f"this {config.model_type}")
    tensors = _allocate(wanted, target_device)
    for name, tensor in tensors.items():
        _initialise(name, tensor, config.initializer_range)
    _place(decoder, tensors)
    return MoECausalLM(config, decoder).eval()


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    rules: Sequence[Rule | Skip],
    *,
    device: torch.device,
    dtype: torch.dtype,
    experts: Sequence[int] | None = None,
    progress: bool = False,
) -> None:
    """Give `module`, built on the meta device, the weights of `checkpoint` by `rules`.

    Parameters and persistent buffers come to `device`, floating ones as `dtype` but for those that
    their module names in `keep_dtype`. `experts` are the ids that this rank owns, in the order of
    its rows. Weights that the module shares are loaded once and stay shared.

    Raises `CheckpointError` for what does not fit or cannot be read and `MoEOutOfMemoryError`
    before any allocation; the module is then still on meta, and no memory is held.
    """
    wanted, chosen = _planned(
        module, checkpoint, rules, device=device, dtype=dtype, experts=experts
    )
    for skip, names in chosen.skipped.items():
        _log.warning("%s: %d tensors not loaded: %s", skip.pattern, len(names), skip.reason)
    locations = checkpoint.fetch({copy.source for copy in chosen.copies}, progress=progress)
    try:
        tensors = _read_copies(
            checkpoint,
            chosen.copies,
            locations,
            wanted=wanted,
            device=device,
            progress=progress,
        )
    except BaseException as error:
        # The frames of the traceback hold the tensors for as long as anybody keeps the error.
        _clear_frames(error)
        raise
    _place(module, tensors)


def _planned(
    module: nn.Module,
    checkpoint: Checkpoint,
    rules: Sequence[Rule | Skip],
    *,
    device: torch.device,
    dtype: torch.dtype,
    experts: Sequence[int] | None = None,
) -> tuple[dict[str, ParameterInfo], Plan]:
    """What `module` wants and how it comes there, all that can be refused without a weight."""
    wanted = parameter_infos(module, dtype)
    chosen = plan(rules, checkpoint.tensors, wanted, experts=experts, name=checkpoint.name)
    check_memory(wanted, device, checkpoint.name)
    return wanted, chosen


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
    copies: Sequence[Copy],
    locations: Mapping[str, Location],
    *,
    wanted: Mapping[str, ParameterInfo],
    device: torch.device,
    progress: bool,
) -> dict[str, torch.Tensor]:
    """The wanted tensors on `device`, read from the files."""
    tensors = _allocate(wanted, device)
    pieces: list[Piece] = []
    for copy in copies:
        stored = checkpoint.tensors[copy.source]
        path, offset = locations[copy.source]
        if copy.rows is not None:
            offset += copy.rows.start * prod(stored.shape[1:]) * stored.dtype.itemsize
        target = stored_order(tensors[copy.target][copy.target_index], copy.view)
        pieces.extend(cut(copy.source, Location(path, offset), stored.dtype, target))
    stream(pieces, device, progress=progress)
    return tensors


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
    refuse_quantised(raw.get("quantization_config"), checkpoint.name)
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


def refuse_quantised(quantization_config: object, name: str) -> None:
    if quantization_config:
        method = (
            quantization_config.get("quant_method")
            if isinstance(quantization_config, Mapping)
            else getattr(quantization_config, "quant_method", None)
        )
        raise QuantizationError(
            f"{name} is quantised (quantization_config.quant_method is {method!r}), which this "
            "release does not load; take the 16-bit checkpoint of the model"
        )


def own_dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the config names, or else that of the first floating tensor.

    float32 where that is float64. Raises `UnsupportedArchitectureError` if the config names
    another dtype.
    """
    stored = (tensor.dtype for tensor in checkpoint.tensors.values())
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
    if (a.shape, a.dtype) != (b.shape, b.dtype):
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


def _refuse_later_options(quantization: object, parallel: object, eplb: object) -> None:
    if quantization is not None:
        raise QuantizationError(
            f"quantization={quantization!r} is not in this release; leave it None"
        )
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
