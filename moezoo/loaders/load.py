"""Load a model from a checkpoint: build it on meta, plan, allocate, stream the weights in.

Memory beyond the final weights does not grow with the model.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedConfig

from moezoo import registry
from moezoo.causal_lm import MoECausalLM
from moezoo.device import device_of
from moezoo.layers.decoder import Decoder
from moezoo.loaders.checkpoint import Checkpoint, open_checkpoint
from moezoo.loaders.config import (
    own_dtype,
    own_generation_config,
    requested_dtype,
    transformers_config,
)
from moezoo.loaders.devices import DeviceMap, parse_device_map, places_of
from moezoo.loaders.expert_parallel import (
    check_planned,
    eplb_of,
    expert_groups,
    joined,
    sharded,
    union_over_ranks,
)
from moezoo.loaders.hub_layout import set_quantization_config
from moezoo.loaders.mapping import Rule, Skip
from moezoo.loaders.memory import check_memory
from moezoo.loaders.quantization import Quantization
from moezoo.loaders.tied import rules_of, same_bytes, tied_rules, untie
from moezoo.loaders.weights import load_weights, own_encoding, plan_weights
from moezoo.parallel.eplb.options import EPLB
from moezoo.parallel.mesh import Mesh, Parallel
from moezoo.parallel.sharding import balance_


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
    """Return the model of a local folder or hub id, ready to generate.

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
    balance = eplb_of(eplb, parallel)
    asked = Quantization.of(quantization)
    requested_dtype(dtype)  # before anything is asked of the hub
    places = _map(device_map, device, parallel)
    mesh = joined(parallel, device)
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
    """Return the model of an open checkpoint; arguments and errors as in `from_pretrained`, except
    that `device_map` is a result of `parse_device_map`."""
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
        slots = sharded(built.decoder, mesh, built.config, asked, eplb)
    load_weights(
        built.decoder,
        checkpoint,
        built.rules,
        device=target_device if device_map is None else partial(places_of, device_map),
        dtype=built.config.dtype,
        experts=None if mesh is None or slots is None else slots.of_rank(mesh.ep_rank),
        quantization=asked,
        check=None if mesh is None else partial(check_planned, mesh, built.decoder),
        union_over_ranks=None if mesh is None else partial(union_over_ranks, mesh),
        progress=progress,
    )
    set_quantization_config(
        built.config, built.decoder, registry.architecture(built.config.model_type).CHECKPOINT
    )
    if mesh is not None and slots is not None:
        balance_(built.decoder, mesh, slots, eplb, num_groups=expert_groups(built.decoder))
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
    return parse_device_map(device_map)


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
    """Build the model of a checkpoint on meta; arguments and errors as in `from_pretrained`, but
    without a `device` it is not checked to fit."""
    asked_dtype = requested_dtype(dtype)
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
        if not same_bytes(checkpoint, *twins, progress=progress):
            untie(config, checkpoint.name, twins)
            rules = rules_of(checkpoint)
            with torch.device("meta"):
                decoder = registry.build(config)
    return Built(config, generation_config, decoder, rules)
