"""Make a model with random weights from a config: build it on meta, allocate, initialise."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedConfig

from moezoo import registry
from moezoo.causal_lm import MoECausalLM
from moezoo.device import device_of
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.config import config_dtype, requested_dtype
from moezoo.loaders.encodings import Scheme, hub_scheme
from moezoo.loaders.expert_parallel import eplb_of, expert_groups, formats, joined, sharded
from moezoo.loaders.experts import experts_of, parts_shape, refuse_others
from moezoo.loaders.hub_layout import set_quantization_config
from moezoo.loaders.mapping import ParameterInfo, layout, parameter_infos
from moezoo.loaders.memory import allocate, check_memory
from moezoo.loaders.quantization import Quantization
from moezoo.loaders.quantized_parameters import quantize_on_meta, quantized_infos
from moezoo.loaders.random_weights import initialise
from moezoo.loaders.weights import place, require_device
from moezoo.parallel.eplb.options import EPLB
from moezoo.parallel.mesh import Parallel
from moezoo.parallel.sharding import balance_, check_wire


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
    """Return the model that `config` describes with random weights, made on `device`.

    Matrices are normal with deviation `config.initializer_range`, norms one, biases zero;
    `torch.manual_seed` decides them, that of rank 0 with `parallel`: each tensor and each expert
    has a seed of its own, so that a rank makes its experts only, and the same as one process.
    "auto" is the config's dtype, or float32. With `quantization`,
    or a config that says so, experts are made one by one and quantised. Arguments and errors
    otherwise as in `from_pretrained`.
    """
    balance = eplb_of(eplb, parallel)
    asked = Quantization.of(quantization)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a transformers config")
    mesh = joined(parallel, device)
    target_device = device_of(device) if mesh is None else mesh.device
    config = deepcopy(config)
    scheme = hub_scheme(getattr(config, "quantization_config", None), "the config")
    config.dtype = requested_dtype(dtype) or config_dtype(config, torch.float32)
    seed = int(torch.randint(2**62, (), device="cpu"))
    with nullcontext() if mesh is None else mesh.together("making the model"):
        with torch.device("meta"):
            decoder = registry.build(config)
        slots = None
        experts: Mapping[int, Sequence[int]] = {}
        if mesh is not None:
            seed = int(mesh.watch.exchange("agreeing on a seed", str(seed))[0])
            slots = sharded(decoder, mesh, config, asked, balance)
            experts = slots.of_rank(mesh.ep_rank)
        plain = parameter_infos(decoder, config.dtype)
        quantized = _kinds_of_config(decoder, config, plain, scheme, asked)
        require_device(decoder, quantized, target_device)
        if mesh is not None:
            check_wire(mesh, formats(decoder, quantized))
        wanted = quantized_infos(decoder, plain, quantized)
        check_memory(wanted, target_device, f"this {config.model_type}", decoder)
        tensors = allocate(wanted, target_device)
        initialise(
            *(decoder, plain, tensors, quantized),
            held={moe: experts[i] for i, moe in decoder.moe_layers.items() if i in experts},
            deviation=config.initializer_range,
            seed=seed,
        )
        quantize_on_meta(decoder, quantized)
        place(decoder, tensors)
        set_quantization_config(
            config, decoder, registry.architecture(config.model_type).CHECKPOINT
        )
        if mesh is not None and slots is not None:
            balance_(decoder, mesh, slots, balance, num_groups=expert_groups(decoder))
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
    """Return the kinds of the experts' parameters that are quantised, as the config or the user
    says."""
    owners = experts_of(decoder)
    columns = {name: parts_shape(layer, name)[-1] for name, layer in owners.items()}
    if scheme is None:
        if asked is None or asked.type is None:
            return {}
        for name, layer in owners.items():
            asked.require_rows(name, parts_shape(layer, name)[-2])
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
