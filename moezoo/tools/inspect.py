"""What a checkpoint holds and needs, from its config and the headers of its files.

Legend: H hidden, I expert intermediate, E experts, K experts per token.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn

from moezoo import registry
from moezoo.errors import CheckpointError, ExpertMapError, MoEZooError, QuantizationError
from moezoo.generation.paged import attentions
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder
from moezoo.layers.moe import FusedMoE, workspace_bytes
from moezoo.layers.moe.chunks import CHUNK_TOKENS
from moezoo.layers.quant import Format
from moezoo.layers.states import state_bytes
from moezoo.loaders.checkpoint import Checkpoint, open_config
from moezoo.loaders.config import own_dtype, own_generation_config, transformers_config
from moezoo.loaders.dense import by_outcome, kept, quantized_linears
from moezoo.loaders.encodings import Encoding
from moezoo.loaders.experts import experts_of, quantized_experts
from moezoo.loaders.held import quantized_infos
from moezoo.loaders.kinds import Kind
from moezoo.loaders.mapping import ParameterInfo, parameter_infos
from moezoo.loaders.plan import dtype_name, plan
from moezoo.loaders.tied import tied_rules
from moezoo.loaders.weights import own_encoding, unpadded
from moezoo.parallel.placement import Strategy
from moezoo.parallel.slots import Slots
from moezoo.tools.shares import RankShare, held_bytes, rank_shares

EXPERT_PARALLEL_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Sizes that memory is reported for, as far as there are experts for every rank."""

AS_STORED = "as stored"
"""What `weight_bytes` calls a quantised checkpoint as it is held."""

UNITS = ("B", "kB", "MB", "GB", "TB")

_OF_EXPERT = re.compile(r"(^|\.)(experts|block_sparse_moe\.(in|out)put_linear)\.")
_FP8_BLOCK = 128
_MXFP4_GROUP = 32
_INT4_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Experts:
    """The routed experts, which are the same in every MoE layer."""

    num_experts: int
    per_token: int
    intermediate_size: int
    router: str
    shared_parameters: int
    """Of what runs beside the routed experts of one layer."""
    workspace_bytes: int
    """What one MoE layer allocates on a GPU for the longest chunk of tokens, at most."""
    formats: tuple[str, ...] = ()
    """Those that experts stay in, by their names in options; none where they are not quantised."""


@dataclass(frozen=True)
class Report:
    """What `inspect` found; None and empty stand for what could not be found."""

    model: str
    model_type: str | None
    architecture: str | None
    checkpoint_bytes: int
    checkpoint_dtypes: Mapping[str, int]
    """Bytes on disk by dtype."""
    checkpoint_files: int
    expert_bytes_on_disk: int
    """Bytes of the tensors whose names say that they belong to routed experts."""
    supported: bool = False
    reason: str | None = None
    """Why moezoo does not run it."""
    stored_as: str | None = None
    """How quantised weights are stored, and which of them stay so in memory."""
    dtype: str | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    context_length: int | None = None
    num_layers: int | None = None
    num_moe_layers: int | None = None
    experts: Experts | None = None
    parameters: int | None = None
    """Numbers of the model as if none was quantised: scales and zero points do not count."""
    active_parameters: int | None = None
    """What a token passes through: all but the experts that it is not sent to."""
    kv_cache_bytes_per_token: int | None = None
    state_bytes_per_sequence: int | None = None
    """Of layers that keep a state instead of keys and values; 0 where there are none."""
    sliding_windows: Mapping[int, int] = field(default_factory=dict)
    """Window -> number of layers whose cache stops growing there."""
    weight_bytes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Quantisation -> expert-parallel size -> bytes of the weights on the fullest rank. The first
    of a quantised checkpoint is AS_STORED."""
    ranks: Sequence[RankShare] = ()
    """Of the expert-parallel size that was asked for, each rank's."""

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON knows (whose object keys are strings)."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        tables = [_memory(self)] if self.weight_bytes else []
        return Group(_facts(self), *tables, *([_ranks(self)] if self.ranks else []))


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
    unreadable: CheckpointError | None = None
    checkpoint = open_config(model_id, **where)
    try:
        checkpoint = checkpoint.with_tensors()
    except CheckpointError as error:
        unreadable = error
    report = _on_disk(checkpoint)
    # quantised or not, the modules are the same
    bare = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    try:
        config = transformers_config(replace(checkpoint, config=bare))
        encoding = _encoding_if_known(checkpoint)
        dtype = own_dtype(config, encoding.tensors)
        rules, _ = tied_rules(config, checkpoint, encoding)
        with torch.device("meta"):
            decoder = registry.build(config)
        report = _of_decoder(report, decoder, dtype)
        report = replace(report, context_length=config.max_position_embeddings)
        if unreadable is not None:
            raise unreadable
        encoding = own_encoding(checkpoint)
        own_generation_config(checkpoint)
        infos = parameter_infos(decoder, dtype)
        chosen = plan(rules, encoding.tensors, infos, name=checkpoint.name)
        encoding = unpadded(encoding, chosen, infos)
        quantized = quantized_experts(decoder, chosen.copies, encoding, None)
        others = [copy for copy in chosen.copies if copy.target not in experts_of(decoder)]
        dense = quantized_linears(decoder, others, encoding)
        if report.experts is not None and quantized:
            owners = experts_of(decoder)
            kinds = (quantized.get(name) for name in owners)
            formats = {None if kind is None else kind.format for kind in kinds}
            moe, per_token = next(iter(owners.values())), report.experts.per_token
            needed = _workspace_bytes(moe, per_token, dtype, formats)
            names = sorted({format_.name for format_ in formats if format_ is not None})
            experts = replace(report.experts, workspace_bytes=needed, formats=tuple(names))
            report = replace(report, experts=experts)
        stay = quantized | kept(dense)
        if encoding.scheme is not None:
            lost = {copy.source for copy in chosen.copies if copy.target not in stay}
            linear, _ = by_outcome(chosen.copies, encoding, dense)
            stored_as = _stored_as(decoder, quantized, linear)
            if dequantized := len(lost & encoding.weights.keys()):
                stored_as += f", {dequantized} quantised weights are dequantised when they load"
            report = replace(report, stored_as=stored_as)
        wanted = quantized_infos(decoder, infos, stay)
        if report.experts is not None and wanted.keys() != infos.keys():
            as_stored = _bytes_held(decoder, wanted, report.experts.num_experts)
            weight_bytes = {AS_STORED: as_stored, **report.weight_bytes}
            report = replace(report, weight_bytes=weight_bytes)
    except MoEZooError as error:
        return replace(report, reason=str(error))
    report = replace(report, supported=True)
    if expert_parallel_size is None:
        return report
    layers = decoder.moe_layers
    if report.experts is None:
        raise ExpertMapError(f"{checkpoint.name} has no MoE layers to divide")
    slots = Slots.of(placement, report.experts.num_experts, list(layers), expert_parallel_size)
    shares = rank_shares(decoder, checkpoint, chosen, encoding, wanted=wanted, slots=slots)
    return replace(report, ranks=shares)


def _encoding_if_known(checkpoint: Checkpoint) -> Encoding:
    """Its tensors as if none were quantised, where that can be said."""
    try:
        return own_encoding(checkpoint)
    except QuantizationError:
        return Encoding(None, checkpoint.tensors, {})


def _stored_as(
    decoder: Decoder,
    quantized: Mapping[str, Kind],
    linear: Mapping[str, Sequence[str]],
) -> str:
    """`linear` are those of the checkpoint's weights that linear layers keep, by their kind; they
    are counted as the report of a load does."""
    layers = sum(name.endswith("w2") for name in experts_of(decoder))
    stay = sum(name.endswith("w2") for name in quantized)
    kinds = " and ".join(sorted({kind.described for kind in quantized.values()})) or "quantised"
    others = "".join(
        f", {len(names)} weights of linear layers in {kind}" for kind, names in linear.items()
    )
    return f"{kinds}: the experts of {stay} of {layers} MoE layers stay so{others}"


def _on_disk(checkpoint: Checkpoint) -> Report:
    dtypes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[dtype_name(tensor.dtype)] += tensor.nbytes
    architectures = checkpoint.config.get("architectures") or [None]
    return Report(
        model=checkpoint.name,
        model_type=checkpoint.config.get("model_type"),
        architecture=architectures[0],
        checkpoint_bytes=dtypes.total(),
        checkpoint_dtypes=dict(dtypes.most_common()),
        checkpoint_files=len({tensor.file for tensor in checkpoint.tensors.values()}),
        expert_bytes_on_disk=sum(
            tensor.nbytes for name, tensor in checkpoint.tensors.items() if _OF_EXPERT.search(name)
        ),
    )


def _of_decoder(report: Report, decoder: Decoder, dtype: torch.dtype) -> Report:
    """Add what the modules say, which were built on the meta device."""
    infos = parameter_infos(decoder, dtype).values()
    parameters = sum(prod(info.shape) for info in infos)
    all_bytes = sum(prod(info.shape) * info.dtype.itemsize for info in infos)
    moe_layers = [layer.mlp for layer in decoder.layers if isinstance(layer.mlp, FusedMoE)]
    in_experts = sum(map(_in_experts, moe_layers))
    experts = _experts(moe_layers[0], dtype) if moe_layers else None
    active, weight_bytes = parameters, {}
    if experts is not None:
        active = parameters - sum(map(_idle, moe_layers))
        rest = all_bytes - in_experts * dtype.itemsize
        weight_bytes = _weight_bytes(moe_layers, rest, dtype)
    windows = Counter(
        attention.window
        for attention in attentions(decoder)
        if isinstance(attention, GroupedQueryAttention) and attention.window is not None
    )
    return replace(
        report,
        dtype=dtype_name(dtype),
        hidden_size=decoder.embed.embedding_dim,
        vocab_size=decoder.embed.num_embeddings,
        num_layers=len(decoder.layers),
        num_moe_layers=len(moe_layers),
        experts=experts,
        parameters=parameters,
        active_parameters=active,
        kv_cache_bytes_per_token=sum(map(_kv_width, attentions(decoder))) * dtype.itemsize,
        state_bytes_per_sequence=state_bytes(attentions(decoder), dtype),
        sliding_windows=dict(windows),
        weight_bytes=weight_bytes,
    )


def _in_experts(moe: FusedMoE) -> int:
    return prod(moe.w13.shape) + prod(moe.w2.shape) + _biases(moe)


def _idle(moe: FusedMoE) -> int:
    """Numbers of the experts that a token is not sent to, at the least: some that it can choose may
    have none."""
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
    """With the experts in any of these formats, None for not quantised."""
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


def _kv_width(attention: Any) -> int:
    """Numbers cached a token."""
    return sum(heads * width for heads, width in attention.cache_shapes)


def _biases(moe: FusedMoE) -> int:
    """Numbers in the biases of a layer's experts."""
    return sum(bias.numel() for bias in (moe.bias13, moe.bias2) if bias is not None)


def _weight_bytes(
    moe_layers: list[FusedMoE], rest: int, dtype: torch.dtype
) -> dict[str, dict[int, int]]:
    num_experts, hidden_size, intermediate_size = moe_layers[0].w2.shape
    biases = _biases(moe_layers[0]) // num_experts * dtype.itemsize
    table: dict[str, dict[int, int]] = {}
    for name, matrix_bytes in FORMATS.items():
        gate_or_up = matrix_bytes(intermediate_size, hidden_size)
        down = matrix_bytes(hidden_size, intermediate_size)
        if gate_or_up is None or down is None:
            continue
        expert = (2 * gate_or_up + down + biases) * len(moe_layers)
        table[name] = _by_size(rest, expert, num_experts)
    return table


def _bytes_held(
    decoder: Decoder, wanted: Mapping[str, ParameterInfo], num_experts: int
) -> dict[int, int]:
    rest, held = held_bytes(decoder, wanted)
    return _by_size(rest, sum(held.values()) // num_experts, num_experts)


def _by_size(rest: int, expert: int, num_experts: int) -> dict[int, int]:
    """Expert-parallel size -> bytes on the fullest rank; `expert` are those of one, all layers."""
    return {
        size: rest + ceil(num_experts / size) * expert
        for size in EXPERT_PARALLEL_SIZES
        if size <= num_experts
    }


def _bf16(rows: int, columns: int) -> int:
    return 2 * rows * columns


def _fp8_w8a8(rows: int, columns: int) -> int:
    """One fp32 scale a block of 128 x 128; gate and up have grids of their own."""
    return rows * columns + 4 * ceil(rows / _FP8_BLOCK) * ceil(columns / _FP8_BLOCK)


def _int8_w8a16(rows: int, columns: int) -> int:
    """A 16-bit scale an output channel."""
    return rows * columns + 2 * rows


def _int4_w4a16(rows: int, columns: int) -> int | None:
    """A 16-bit scale a group of the largest size that divides the columns."""
    for group in _INT4_GROUPS:
        if columns % group == 0:
            return rows * columns // 2 + 2 * rows * columns // group
    return None


def _mxfp4(rows: int, columns: int) -> int | None:
    """An 8-bit exponent a group of 32 columns."""
    if columns % _MXFP4_GROUP:
        return None
    return rows * columns // 2 + rows * columns // _MXFP4_GROUP


FORMATS: dict[str, Callable[[int, int], int | None]] = {
    "bf16": _bf16,
    "fp8_w8a8": _fp8_w8a8,
    "int8_w8a16": _int8_w8a16,
    "int4_w4a16": _int4_w4a16,
    "mxfp4": _mxfp4,
}
"""Bytes of an expert's matrix of rows x columns in each format; None where it does not fit."""


def _facts(report: Report) -> Table:
    table = Table(title=report.model, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: object) -> None:
        if value is not None:
            table.add_row(name, str(value))

    row("architecture", f"{report.architecture} (model_type {report.model_type})")
    row("supported", "yes" if report.supported else f"no: {report.reason}")
    row("quantised", report.stored_as)
    if report.checkpoint_files:
        dtypes = ", ".join(f"{_size(n)} {dtype}" for dtype, n in report.checkpoint_dtypes.items())
        files = "1 file" if report.checkpoint_files == 1 else f"{report.checkpoint_files} files"
        row("on disk", f"{_size(report.checkpoint_bytes)} in {files}: {dtypes}")
        row("of which experts", _size(report.expert_bytes_on_disk))
    if report.parameters is not None and report.active_parameters is not None:
        active = f"{report.active_parameters:,} active per token"
        before = "" if report.stored_as is None else " (before quantisation)"
        row("parameters", f"{report.parameters:,}, {active}{before}")
        dense = (report.num_layers or 0) - (report.num_moe_layers or 0)
        row("layers", f"{report.num_layers}: {report.num_moe_layers} MoE, {dense} dense")
        row("hidden size", report.hidden_size)
        row("vocabulary", report.vocab_size)
        row("context", report.context_length)
    if (experts := report.experts) is not None:
        row("experts", f"{experts.per_token} of {experts.num_experts}")
        row("expert width", experts.intermediate_size)
        row("router", experts.router)
        if experts.shared_parameters:
            row("shared experts", f"{experts.shared_parameters:,} parameters a layer")
        row("layer workspace", f"{_size(experts.workspace_bytes)} per {CHUNK_TOKENS} tokens")
    if report.kv_cache_bytes_per_token is not None:
        row("KV cache", f"{report.kv_cache_bytes_per_token:,} bytes per token")
    if report.state_bytes_per_sequence:
        row("states", f"{report.state_bytes_per_sequence:,} bytes per sequence")
    for window, layers in report.sliding_windows.items():
        row("sliding window", f"{window} tokens in {layers} layers")
    return table


def _memory(report: Report) -> Table:
    """One unit for all cells, so that seven of them fit a terminal of 80 columns."""
    sizes = list(next(iter(report.weight_bytes.values())))
    most = max(max(per_rank.values()) for per_rank in report.weight_bytes.values())
    power = max(0, min(4, (len(str(most)) - 2) // 3))
    table = Table(
        title=f"{UNITS[power]} of weights per GPU, by expert-parallel size",
    )
    table.add_column("experts as", no_wrap=True)
    for size in sizes:
        table.add_column(str(size), justify="right", no_wrap=True)
    for name, per_rank in report.weight_bytes.items():
        table.add_row(name, *(_number(per_rank[size] / 1000**power) for size in sizes))
    return table


def _ranks(report: Report) -> Table:
    table = Table(title=f"each of {len(report.ranks)} ranks, as the checkpoint is stored")
    table.add_column("rank", justify="right")
    for name in ("experts", "in memory", "read", "in files to download"):
        table.add_column(name, justify="right")
    for share in report.ranks:
        sizes = share.weight_bytes, share.read_bytes, share.download_bytes
        table.add_row(str(share.rank), str(share.experts), *map(_size, sizes))
    return table


def _number(value: float) -> str:
    """Three digits, or as many as there are before the point: 9.23, 61.1, 1342."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"


def _size(nbytes: int) -> str:
    if nbytes < 1_000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in UNITS[1:-1]:
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.3g} {UNITS[-1]}"
