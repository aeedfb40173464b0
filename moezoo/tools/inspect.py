"""`inspect`: report what a checkpoint holds and needs, from its config and its files' headers.

Legend: H hidden, I expert intermediate, E experts, K experts per token.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moezoo import registry
from moezoo.errors import CheckpointError, ExpertMapError, MoEZooError, QuantizationError
from moezoo.formats import QUANTIZATIONS
from moezoo.generation.paged import attentions
from moezoo.layers.decoder import Decoder
from moezoo.layers.mixer import SequenceMixer, state_bytes
from moezoo.layers.moe import FusedMoE, workspace_bytes
from moezoo.layers.moe.chunks import CHUNK_TOKENS
from moezoo.layers.quant import Format
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.checkpoint import Checkpoint, open_config
from moezoo.loaders.config import own_dtype, own_generation_config, transformers_config
from moezoo.loaders.encodings import Encoding
from moezoo.loaders.experts import experts_of
from moezoo.loaders.linears import by_outcome
from moezoo.loaders.mapping import parameter_infos
from moezoo.loaders.plan import dtype_name
from moezoo.loaders.quantization import Quantization
from moezoo.loaders.tied import tied_rules
from moezoo.loaders.weights import Planned, own_encoding, plan_weights
from moezoo.parallel.placement import Strategy
from moezoo.parallel.slots import Slots
from moezoo.tools.report import AS_STORED, Experts, Report
from moezoo.tools.shares import held_bytes, rank_shares

EXPERT_PARALLEL_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Expert-parallel sizes that memory is reported for, up to the number of experts."""

EXPERTS_AS = ("bf16", *QUANTIZATIONS)
"""Keys of `weight_bytes`: experts in bf16, and in each format with its default options."""

_OF_EXPERT = re.compile(r"(^|\.)(experts|block_sparse_moe\.(in|out)put_linear)\.")


def inspect(
    model_id: str | os.PathLike[str],
    *,
    expert_parallel_size: int | None = None,
    placement: Strategy | os.PathLike[str] = "linear",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Report:
    """Report on the checkpoint in a folder or a hub repository without reading a weight.

    A model that moezoo cannot run is reported too: `supported` is False and `reason` says why. If
    its weights are pickled or their headers cannot be read, the config alone is reported.
    `weight_bytes` counts experts in the format with its scales, and everything else in the model's
    dtype and on every rank; of a quantised checkpoint also what is held "as stored", linear layers
    included. A format that does not fit the experts' shapes is left out.
    With an expert-parallel size, `ranks` says what each rank would read and hold of the checkpoint
    as it is stored, under a placement as `Parallel` takes it.

    Raises:
        CheckpointError: there is no checkpoint, or its config cannot be read.
        ExpertMapError: the placement does not fit the model.
    """
    where: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
    }
    obstacle: MoEZooError | None = None
    checkpoint = open_config(model_id, **where)
    try:
        checkpoint = checkpoint.with_tensors()
    except CheckpointError as error:
        obstacle = error
    found = _on_disk(checkpoint)
    # quantised or not, the modules are the same
    bare = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    try:
        config = transformers_config(replace(checkpoint, config=bare))
        try:
            encoding = own_encoding(checkpoint)
        except QuantizationError as error:
            # The config and the modules are still reported, as if no tensor was quantised.
            encoding, obstacle = Encoding(None, checkpoint.tensors, {}), obstacle or error
        dtype = own_dtype(config, encoding.tensors)
        rules, _ = tied_rules(config, checkpoint, encoding)
        with torch.device("meta"):
            decoder = registry.build(config)
        found |= _of_decoder(decoder, dtype)
        found["context_length"] = config.max_position_embeddings
        if obstacle is not None:
            raise obstacle
        own_generation_config(checkpoint)
        planned = plan_weights(decoder, checkpoint, rules, dtype=dtype)
    except MoEZooError as error:
        return Report(**found, reason=str(error))
    found |= _of_quantized(decoder, planned, dtype, found)
    if expert_parallel_size is not None:
        if found["experts"] is None:
            raise ExpertMapError(f"{checkpoint.name} has no MoE layers to divide")
        num_experts, layers = found["experts"].num_experts, list(decoder.moe_layers)
        slots = Slots.of(placement, num_experts, layers, expert_parallel_size)
        found["ranks"] = rank_shares(decoder, checkpoint, planned, slots)
    return Report(**found, supported=True)


def _of_quantized(
    decoder: Decoder, planned: Planned, dtype: torch.dtype, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what quantised weights change in the fields of the report that were found."""
    owners, encoding, copies = experts_of(decoder), planned.encoding, planned.plan.copies
    quantized = {name: kind for name, kind in planned.quantized.items() if name in owners}
    changed: dict[str, Any] = {}
    if quantized:
        kinds = (quantized.get(name) for name in owners)
        formats = {None if kind is None else kind.format for kind in kinds}
        moe, experts = next(iter(owners.values())), found["experts"]
        changed["experts"] = replace(
            experts,
            workspace_bytes=_workspace_bytes(moe, experts.per_token, dtype, formats),
            formats=tuple(sorted({format_.name for format_ in formats if format_ is not None})),
        )
    if encoding.scheme is not None:
        linear, _ = by_outcome(copies, encoding, planned.dense)
        stored_as = _stored_as(decoder, quantized, linear)
        lost = {copy.source for copy in copies if copy.target not in planned.quantized}
        if dequantized := len(lost & encoding.weights.keys()):
            stored_as += f", {dequantized} quantised weights are dequantised when they load"
        changed["stored_as"] = stored_as
    if found["experts"] is not None and planned.quantized:
        rest, held = held_bytes(decoder, planned.wanted)
        num_experts = found["experts"].num_experts
        as_stored = _by_size(rest, sum(held.values()) // num_experts, num_experts)
        changed["weight_bytes"] = {AS_STORED: as_stored, **found["weight_bytes"]}
    return changed


def _stored_as(
    decoder: Decoder,
    quantized: Mapping[str, Kind],
    linear: Mapping[str, Sequence[str]],
) -> str:
    """Describe how quantised weights are held. `linear` are the names of the checkpoint's weights
    that linear layers keep, by kind, counted as a load reports them."""
    layers = sum(name.endswith("w2") for name in experts_of(decoder))
    stay = sum(name.endswith("w2") for name in quantized)
    kinds = " and ".join(sorted({kind.described for kind in quantized.values()})) or "quantised"
    others = "".join(
        f", {len(names)} weights of linear layers in {kind}" for kind, names in linear.items()
    )
    return f"{kinds}: the experts of {stay} of {layers} MoE layers stay so{others}"


def _on_disk(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the fields of the report that the files and the names in the config say."""
    dtypes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[dtype_name(tensor.dtype)] += tensor.nbytes
    architectures = checkpoint.config.get("architectures") or [None]
    return {
        "model": checkpoint.name,
        "model_type": checkpoint.config.get("model_type"),
        "architecture": architectures[0],
        "checkpoint_bytes": dtypes.total(),
        "checkpoint_dtypes": dict(dtypes.most_common()),
        "checkpoint_files": len({tensor.file for tensor in checkpoint.tensors.values()}),
        "expert_bytes_on_disk": sum(
            tensor.nbytes for name, tensor in checkpoint.tensors.items() if _OF_EXPERT.search(name)
        ),
    }


def _of_decoder(decoder: Decoder, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of the report that the modules, built on the meta device, say."""
    infos = parameter_infos(decoder, dtype).values()
    parameters = sum(prod(info.shape) for info in infos)
    all_bytes = sum(prod(info.shape) * info.dtype.itemsize for info in infos)
    moes = [layer.mlp for layer in decoder.layers if isinstance(layer.mlp, FusedMoE)]
    in_experts = sum(map(_in_experts, moes))
    experts = _experts(moes[0], dtype) if moes else None
    active, weight_bytes = parameters, {}
    if experts is not None:
        active = parameters - sum(map(_idle, moes))
        rest = all_bytes - in_experts * dtype.itemsize
        weight_bytes = _weight_bytes(moes, rest, dtype)
    windows = Counter(
        attention.window for attention in attentions(decoder) if attention.window is not None
    )
    return {
        "dtype": dtype_name(dtype),
        "hidden_size": decoder.embed.embedding_dim,
        "vocab_size": decoder.embed.num_embeddings,
        "num_layers": len(decoder.layers),
        "num_moe_layers": len(moes),
        "experts": experts,
        "parameters": parameters,
        "active_parameters": active,
        "kv_cache_bytes_per_token": sum(map(_kv_width, attentions(decoder))) * dtype.itemsize,
        "state_bytes_per_sequence": state_bytes(attentions(decoder), dtype),
        "sliding_windows": dict(windows),
        "weight_bytes": weight_bytes,
    }


def _in_experts(moe: FusedMoE) -> int:
    """Return the number of parameters of a layer's experts."""
    return prod(moe.w13.shape) + prod(moe.w2.shape) + _biases(moe)


def _idle(moe: FusedMoE) -> int:
    """Return the number of parameters of the experts that a token is not sent to; it is more where
    a token may choose fewer experts."""
    num_experts = moe.w2.shape[0]
    per_token: int = moe.router.keywords["k"]
    return _in_experts(moe) // num_experts * max(num_experts - per_token, 0)


def _experts(moe: FusedMoE, dtype: torch.dtype) -> Experts:
    num_experts, _, intermediate_size = moe.w2.shape
    route = moe.router
    settings = dict(route.keywords)
    per_token = settings.pop("k")
    if isinstance(moe.route, nn.Module):
        settings |= {name: True for name, _ in moe.route.named_parameters()}
    described = ", ".join(f"{name}={value}" for name, value in settings.items())
    return Experts(
        num_experts=num_experts,
        per_token=per_token,
        intermediate_size=intermediate_size,
        router=f"{route.func.__name__}({described})",
        shared_parameters=sum(p.numel() for p in moe.shared.parameters()) if moe.shared else 0,
        workspace_bytes=_workspace_bytes(moe, per_token, dtype, {None}),
    )


def _workspace_bytes(
    moe: FusedMoE, per_token: int, dtype: torch.dtype, formats: Iterable[type[Format] | None]
) -> int:
    """Return the largest workspace of the layer in these formats, None for not quantised."""
    _, hidden_size, intermediate_size = moe.w2.shape
    return max(
        workspace_bytes(
            CHUNK_TOKENS,
            per_token,
            hidden_size,
            intermediate_size=intermediate_size,
            element_size=dtype.itemsize,
            weights=weights,
        )
        for weights in formats
    )


def _kv_width(attention: SequenceMixer) -> int:
    """Return the number of elements cached per token."""
    return sum(heads * width for heads, width in attention.cache_shapes)


def _biases(moe: FusedMoE) -> int:
    """Return the number of elements in the biases of a layer's experts."""
    return sum(bias.numel() for bias in (moe.bias13, moe.bias2) if bias is not None)


def _weight_bytes(
    moes: Sequence[FusedMoE], rest: int, dtype: torch.dtype
) -> dict[str, dict[int, int]]:
    num_experts, hidden_size, intermediate_size = moes[0].w2.shape
    biases = _biases(moes[0]) // num_experts * dtype.itemsize
    table: dict[str, dict[int, int]] = {}
    for name in EXPERTS_AS:
        gate_or_up = matrix_bytes(name, intermediate_size, hidden_size)
        down = matrix_bytes(name, hidden_size, intermediate_size)
        if gate_or_up is None or down is None:
            continue
        expert = (2 * gate_or_up + down + biases) * len(moes)
        table[name] = _by_size(rest, expert, num_experts)
    return table


def _by_size(rest: int, expert: int, num_experts: int) -> dict[int, int]:
    """Return the bytes on the fullest rank by expert-parallel size; `rest` is on every rank, and
    `expert` the bytes of one expert in all layers."""
    return {
        size: rest + ceil(num_experts / size) * expert
        for size in EXPERT_PARALLEL_SIZES
        if size <= num_experts
    }


def matrix_bytes(name: str, rows: int, columns: int) -> int | None:
    """Return the bytes of an expert's matrix in "bf16" or a format, with scales of 16 bits where
    the format has a choice; None where the format does not fit."""
    if name == "bf16":
        return 2 * rows * columns
    try:
        kind = Quantization(name).recipe("experts", columns, torch.bfloat16).kind
    except QuantizationError:
        return None
    tensors = kind.on_meta(rows, columns).tensors().values()
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
