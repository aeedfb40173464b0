"""From a checkpoint to a model: build on meta, plan, allocate, stream the weights in.

Memory beyond the final weights does not grow with the model.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from moezoo import registry
from moezoo.causal_lm import MoECausalLM
from moezoo.device import device_of
from moezoo.errors import (
    CheckpointError,
    UnsupportedArchitectureError,
)
from moezoo.layers.decoder import Decoder
from moezoo.layers.quant import Format
from moezoo.loaders.checkpoint import (
    CONFIG,
    GENERATION_CONFIG,
    Checkpoint,
    open_checkpoint,
)
from moezoo.loaders.devices import DeviceMap, checked, places_of
from moezoo.loaders.encodings import Encoding, Scheme, hub_scheme
from moezoo.loaders.experts import experts_of, parts_shape, refuse_others
from moezoo.loaders.held import quantize_on_meta, quantized_infos
from moezoo.loaders.initial import initialise
from moezoo.loaders.kinds import Kind
from moezoo.loaders.mapping import (
    ParameterInfo,
    Rule,
    Skip,
    TensorInfo,
    layout,
    parameter_infos,
)
from moezoo.loaders.memory import allocate, check_memory
from moezoo.loaders.plan import dtype_name
from moezoo.loaders.quantization import Quantization
from moezoo.loaders.weights import (
    Planned,
    load_weights,
    own_encoding,
    place,
    plan_weights,
    require_device,
)
from moezoo.loaders.written import describe_
from moezoo.parallel.eplb.options import EPLB
from moezoo.parallel.mesh import Mesh, Parallel, join
from moezoo.parallel.peers import peers_of
from moezoo.parallel.sharding import balance_, check_wire, moe_layers, shard_, slots_of
from moezoo.parallel.slots import Slots

_log = logging.getLogger(__name__)

_MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK = 16 << 20


@torch.inference_mode(False)
def from_pretrained(
    model_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
    quantization: str | Mapping[str, object] | Quantization | None = None,
    parallel: Parallel | None = None,
    eplb: Mapping[str, object] | EPLB | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> MoECausalLM:
    """The model of a local folder or hub id, ready to generate.

    `dtype` is bfloat16, float16 or float32, as a `torch.dtype` or its name, or "auto" for the
    checkpoint's own (float32 for one in float64, cast while loading); `device` is "cuda", "cuda:1"
    or "cpu", by default a GPU if there is one. `device_map` loads each layer to a device of its own
    instead: "auto", or devices by module ({"": 0, "decoder.layers.7": "cpu"}). `quantization`
    quantises the experts of a checkpoint that is not quantised while it loads: "fp8_w8a8",
    "int8_w8a16", "int4_w4a16", "mxfp4", or a dict or `Quantization` with its choices; None keeps
    experts and linear layers as they are stored, and {"dense": "dequantize"} loads linear layers
    that are stored quantised in `dtype`. `parallel` divides experts over the processes of torchrun:
    each reads its own only, on the GPU of its place on the host. `eplb`, a dict or `EPLB`, keeps
    the processes evenly loaded. `revision`, `cache_dir`, `token` and `local_files_only` mean what
    they do in huggingface_hub. `progress` shows a bar where stderr is a terminal.

    Raises `CheckpointError` for a checkpoint that cannot be found, read or fitted,
    `UnsupportedArchitectureError`, `QuantizationError`, `MoEOutOfMemoryError` before anything is
    allocated, `ExpertMapError` for ranks and placements that do not fit, `RankError` where another
    rank fails, and `ValueError` for other arguments.
    """
    balance = _balance(eplb, parallel)
    asked = Quantization.of(quantization)
    _dtype(dtype)  # before anything is asked of the hub
    places = _map(device_map, device, parallel)
    mesh = _joined(parallel, device)
    target_device = device_of(device) if mesh is None else mesh.device
    with nullcontext() if mesh is None else mesh.together("loading the model"):
        checkpoint = open_checkpoint(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        return from_checkpoint(
            checkpoint,
            dtype=dtype,
            device=target_device,
            device_map=places,
            quantization=asked,
            mesh=mesh,
            eplb=balance,
            progress=progress,
        )


@torch.inference_mode(False)
def from_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    device_map: str | Mapping[str, torch.device] | None = None,
    quantization: str | Mapping[str, object] | Quantization | None = None,
    mesh: Mesh | None = None,
    eplb: EPLB | None = None,
    progress: bool = True,
) -> MoECausalLM:
    """The model of an open checkpoint; arguments and errors as in `from_pretrained`, but that
    `device_map` is what `checked` returns."""
    target_device = device_of(device)
    asked = Quantization.of(quantization)
    built = build(
        checkpoint,
        dtype=dtype,
        quantization=asked,
        device=target_device if device_map is None else None,
        progress=progress,
    )
    slots = None
    if mesh is not None:
        tensors = sha256(repr(sorted(checkpoint.tensors.items())).encode()).hexdigest()
        mesh.agree({"the checkpoint": checkpoint.revision, "its tensors (a hash)": tensors})
        slots = _sharded(built.decoder, mesh, built.config, asked, eplb)
    load_weights(
        built.decoder,
        checkpoint,
        built.rules,
        device=target_device if device_map is None else partial(places_of, device_map),
        dtype=built.config.dtype,
        experts=None if mesh is None or slots is None else slots.of_rank(mesh.ep_rank),
        quantization=asked,
        check=None if mesh is None else partial(_check_wire, mesh, built.decoder),
        of_all_ranks=None if mesh is None else partial(_of_all_ranks, mesh),
        progress=progress,
    )
    describe_(
        built.config, built.decoder, registry.architecture(built.config.model_type).CHECKPOINT
    )
    if mesh is not None and slots is not None:
        balance_(built.decoder, mesh, slots, eplb, num_groups=_groups(built.decoder))
    model = MoECausalLM(built.config, built.decoder).eval()
    model.find_devices()
    model.mesh = mesh
    if built.generation_config is not None:
        model.generation_config = built.generation_config
    return model


def _map(
    device_map: DeviceMap | None, device: torch.device | str | None, parallel: Parallel | None
) -> str | Mapping[str, torch.device] | None:
    if device_map is None:
        return None
    for name, value in (("device", device), ("parallel", parallel)):
        if value is not None:
            raise ValueError(f"device_map and {name} both say where layers go: give one")
    return checked(device_map)


def _joined(parallel: Parallel | None, device: torch.device | str | None) -> Mesh | None:
    if parallel is None:
        return None
    if not isinstance(parallel, Parallel):
        raise ValueError(f"parallel is {parallel!r}, expected a moezoo.Parallel or None")
    return join(parallel, device)


def _balance(eplb: Mapping[str, object] | EPLB | None, parallel: Parallel | None) -> EPLB | None:
    balance = EPLB.of(eplb)
    if balance is not None and parallel is None:
        raise ValueError(
            f"eplb={eplb!r} is for experts that are divided over ranks: give parallel too, such as "
            "moezoo.Parallel(expert_parallel_size=8)"
        )
    return balance


def _groups(decoder: Decoder) -> int:
    """Of neighbouring experts that a token chooses first, where the routers do so."""
    return min(moe.router.keywords.get("num_groups", 1) for moe in moe_layers(decoder).values())


def _sharded(
    decoder: Decoder,
    mesh: Mesh,
    config: PreTrainedConfig,
    asked: Quantization | None,
    balance: EPLB | None,
) -> Slots:
    """Leave this rank's experts in a decoder on meta: those of its slots."""
    fields = json.loads(config.to_json_string(use_diff=False))
    fields.pop("_name_or_path", None)  # a folder may be another on each host
    mesh.agree(
        {f"config.{name}": value for name, value in fields.items()}
        | {
            "quantization": asked,
            "eplb": balance and repr(replace(balance, placement=None)),
        }
    )
    slots = slots_of(decoder, mesh, balance)
    shard_(decoder, mesh, slots)
    decoder.peers = peers_of(decoder, mesh)
    return slots


def _check_wire(mesh: Mesh, decoder: Decoder, planned: Planned) -> None:
    check_wire(mesh, _formats(decoder, planned.quantized))


def _of_all_ranks(mesh: Mesh, names: set[str]) -> set[str]:
    told = mesh.watch.exchange("comparing the experts", json.dumps(sorted(names)), patient=True)
    return set().union(*map(json.loads, told))


def _formats(decoder: Decoder, quantized: Mapping[str, Kind]) -> set[type[Format] | None]:
    """Those of the experts of this rank, None for not quantised."""
    held = (name for name, layer in experts_of(decoder).items() if layer.w2.shape[0])
    return {quantized[name].format if name in quantized else None for name in held}


class Built(NamedTuple):
    """A model without its weights, and the rules by which a checkpoint has them."""

    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    decoder: Decoder
    rules: Sequence[Rule | Skip]


def build(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str,
    quantization: Quantization | None,
    device: torch.device | None,
    progress: bool,
) -> Built:
    """The model of a checkpoint on meta; arguments and errors as in `from_pretrained`, but that it
    need not fit a device where that is None."""
    asked_dtype = _dtype(dtype)
    config = transformers_config(checkpoint)
    encoding = own_encoding(checkpoint)
    config.dtype = asked_dtype or own_dtype(config, encoding.tensors)
    generation_config = own_generation_config(checkpoint)
    rules, twins = tied_rules(config, checkpoint, encoding)
    with torch.device("meta"):
        decoder = registry.build(config)
    if twins is not None:
        # What cannot be loaded is refused before the bytes of the two are read.
        planned = plan_weights(
            decoder, checkpoint, rules, dtype=config.dtype, quantization=quantization
        )
        if device is not None:
            check_memory(planned.wanted, device, checkpoint.name, decoder)
        if not _same_bytes(checkpoint, *twins, progress=progress):
            _untie(config, checkpoint.name, twins)
            rules = rules_of(checkpoint)
            with torch.device("meta"):
                decoder = registry.build(config)
    return Built(config, generation_config, decoder, rules)


@torch.inference_mode(False)
def from_config(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    quantization: str | Mapping[str, object] | Quantization | None = None,
    parallel: Parallel | None = None,
    eplb: Mapping[str, object] | EPLB | None = None,
) -> MoECausalLM:
    """The model that `config` describes with random weights, made on `device`.

    Matrices are normal with deviation `config.initializer_range`, norms one, biases zero;
    `torch.manual_seed` decides them, that of rank 0 with `parallel`: each tensor and each expert
    has a seed of its own, so that a rank makes its experts only, and the same as one process.
    "auto" is the config's dtype, or float32. With `quantization`,
    or a config that says so, experts are made one by one and quantised. Arguments and errors
    otherwise as in `from_pretrained`.
    """
    balance = _balance(eplb, parallel)
    asked = Quantization.of(quantization)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a transformers config")
    mesh = _joined(parallel, device)
    target_device = device_of(device) if mesh is None else mesh.device
    config = deepcopy(config)
    scheme = hub_scheme(getattr(config, "quantization_config", None), "the config")
    config.dtype = _dtype(dtype) or _config_dtype(config, torch.float32)
    seed = int(torch.randint(2**62, ()))
    with nullcontext() if mesh is None else mesh.together("making the model"):
        with torch.device("meta"):
            decoder = registry.build(config)
        slots = None
        experts: Mapping[int, Sequence[int]] = {}
        if mesh is not None:
            seed = int(mesh.watch.exchange("agreeing on a seed", str(seed))[0])
            slots = _sharded(decoder, mesh, config, asked, balance)
            experts = slots.of_rank(mesh.ep_rank)
        plain = parameter_infos(decoder, config.dtype)
        quantized = _kinds_of_config(decoder, config, plain, scheme, asked)
        require_device(decoder, quantized, target_device)
        if mesh is not None:
            check_wire(mesh, _formats(decoder, quantized))
        wanted = quantized_infos(decoder, plain, quantized)
        check_memory(wanted, target_device, f"this {config.model_type}", decoder)
        tensors = allocate(wanted, target_device)
        initialise(
            *(decoder, plain, tensors, quantized),
            held={moe: experts[i] for i, moe in moe_layers(decoder).items() if i in experts},
            deviation=config.initializer_range,
            seed=seed,
        )
        quantize_on_meta(decoder, quantized)
        place(decoder, tensors)
        describe_(config, decoder, registry.architecture(config.model_type).CHECKPOINT)
        if mesh is not None and slots is not None:
            balance_(decoder, mesh, slots, balance, num_groups=_groups(decoder))
    model = MoECausalLM(config, decoder).eval()
    model.mesh = mesh
    return model


def _kinds_of_config(
    decoder: nn.Module,
    config: PreTrainedConfig,
    plain: Mapping[str, ParameterInfo],
    scheme: Scheme | None,
    asked: Quantization | None,
) -> dict[str, Kind]:
    """The experts' parameters that are quantised, as the config says or as it is asked."""
    owners = experts_of(decoder)
    columns = {name: parts_shape(layer, name)[-1] for name, layer in owners.items()}
    if scheme is None:
        if asked is None or asked.type is None:
            return {}
        return {name: asked.recipe(name, k, config.dtype).kind for name, k in columns.items()}
    found: dict[str, set[Kind | None]] = {name: set() for name in owners}
    for copy in layout(registry.architecture(config.model_type).CHECKPOINT, plain):
        if copy.target in owners:
            kind = scheme.kind(copy.source, columns[copy.target], config.dtype)
            found[copy.target].add(kind)
    kinds = {
        name: kind
        for name, alike in found.items()
        if len(alike) == 1 and (kind := next(iter(alike))) is not None
    }
    whole = {
        name: kind
        for name, kind in kinds.items()
        if all(other in kinds for other, layer in owners.items() if layer is owners[name])
    }
    refuse_others(asked, whole, columns)
    return whole


def transformers_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The checkpoint's transformers config, if it is of an architecture that moezoo has."""
    raw = dict(checkpoint.config)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{checkpoint.name}: {CONFIG} names no model_type")
    try:
        module = registry.architecture(model_type)
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(f"{checkpoint.name}: {error}") from error
    hub_scheme(raw.get("quantization_config"), checkpoint.name)
    try:
        raw = _with_special_floats(raw)
        if hasattr(module, "text_config"):
            raw = module.text_config(raw)
            model_type = raw["model_type"]
        if model_type not in CONFIG_MAPPING:
            raw["model_type"] = model_type = registry.ARCHITECTURES[model_type]
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


def _with_special_floats(value: Any) -> Any:
    """As transformers writes numbers that JSON has not: {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_special_floats(inner) for key, inner in value.items()}
    return [_with_special_floats(inner) for inner in value] if isinstance(value, list) else value


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
    config: PreTrainedConfig, checkpoint: Checkpoint, encoding: Encoding
) -> tuple[tuple[Rule | Skip, ...], tuple[str, str] | None]:
    """The rules for a checkpoint whose config may tie the head to the embedding.

    As in transformers, one of the two tensors is enough, a head equal to the embedding is left
    out, and a head that differs unties the model: the weights are right and the config is wrong.
    Where only their bytes can say which it is, the names of the two are returned too, and the rules
    leave out the head.
    """
    rules = rules_of(checkpoint)
    tensors = encoding.tensors
    head, embedding = (_stored(rules, name, tensors) for name in ("lm_head.weight", "embed.weight"))
    if not config.tie_word_embeddings or head not in tensors:
        return rules, None
    if embedding not in tensors:
        return (*rules, Rule("embed.weight", head)), None
    a, b = tensors[head], tensors[embedding]
    if (a.shape, a.dtype) != (b.shape, b.dtype) or {head, embedding} & encoding.weights.keys():
        _untie(config, checkpoint.name, (head, embedding))
        return rules, None
    return (*rules, Skip(head, "tied to the embedding")), (head, embedding)


def rules_of(checkpoint: Checkpoint) -> tuple[Rule | Skip, ...]:
    """How its tensors are named, which need not be how the model of its config writes them."""
    module = registry.architecture(str(checkpoint.config["model_type"]))
    rules: tuple[Rule | Skip, ...] = module.CHECKPOINT
    return rules


def _stored(rules: Sequence[Rule | Skip], target: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The tensor that makes a parameter of one source: that which is there, or the first."""
    sources = [
        rule.sources[0] for rule in rules if isinstance(rule, Rule) and rule.target == target
    ]
    return next((name for name in sources if name in tensors), sources[0])


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


def _dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """The dtype asked for; None for "auto"."""
    if dtype == "auto":
        return None
    names = {dtype_name(known): known for known in _MODEL_DTYPES}
    chosen = names.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in _MODEL_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected 'auto' or one of {', '.join(names)}")
    return chosen
