"""Load a checkpoint's weights into a module built on meta: plan, check, read."""

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from moezoo.formats import FP8
from moezoo.layers.quant.fp8 import FOR_EXPERTS, FOR_LINEARS, require_fp8
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.checkpoint import Checkpoint, Location
from moezoo.loaders.devices import Places
from moezoo.loaders.encodings import Encoding, encoding_of
from moezoo.loaders.experts import experts_of, quantized_experts, source_dtype
from moezoo.loaders.fill import Filling, Squares
from moezoo.loaders.linears import by_outcome, held_kinds, quantized_linears
from moezoo.loaders.mapping import (
    Copy,
    ParameterInfo,
    Rule,
    Skip,
    copies_by_target,
    parameter_infos,
    skeleton_of,
)
from moezoo.loaders.memory import allocate, check_memory
from moezoo.loaders.plan import OwnedExperts, Plan, plan
from moezoo.loaders.quantization import Quantization
from moezoo.loaders.quantized_parameters import quantize_on_meta, quantized_infos
from moezoo.loaders.stream import Piece, read

_log = logging.getLogger(__name__)


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    rules: Sequence[Rule | Skip],
    *,
    device: torch.device | Callable[[Mapping[str, ParameterInfo]], Places],
    dtype: torch.dtype,
    experts: OwnedExperts | None = None,
    quantization: Quantization | None = None,
    check: Callable[["Planned"], None] | None = None,
    union_over_ranks: Callable[[set[str]], set[str]] | None = None,
    progress: bool = False,
) -> None:
    """Give `module`, built on the meta device, the weights of `checkpoint` by `rules`.

    Parameters and persistent buffers come to `device`, or where it says when it is given all of
    them; floating ones as `dtype` but for those that their module names in `keep_dtype`. `experts`
    are the ids that this rank owns, as `plan` takes them. Weights that the module shares are loaded
    once and stay shared.

    With `quantization` the experts of a checkpoint that is not quantised become `QuantizedWeights`;
    so do those that are stored quantised, and linear layers that are, unless it says otherwise.
    Other quantised weights are dequantised. A module with quantised weights needs no gradient.
    `check` may refuse the plan before anything is read; `union_over_ranks` is for
    `with_orders`, where experts are divided.

    Raises `CheckpointError` for what does not fit or cannot be read, `QuantizationError` for what
    is wrong with quantised weights, and `MoEOutOfMemoryError` before any allocation; the module is
    then still on meta, and no memory is held.
    """
    planned = plan_weights(
        module,
        checkpoint,
        rules,
        dtype=dtype,
        experts=experts,
        quantization=quantization,
    )
    if check is not None:
        check(planned)
    places = _require_places(module, planned, device, checkpoint.name)
    locations = checkpoint.fetch(sources_of(planned), progress=progress)
    settled = with_orders(
        module, checkpoint, planned, locations, dtype=dtype, union_over_ranks=union_over_ranks
    )
    if settled.wanted != planned.wanted:  # fewer orders, or layers that do not stay quantised
        places = _require_places(module, settled, device, checkpoint.name)
    planned = settled
    report(module, planned)
    try:
        tensors = _read_to(places, checkpoint, planned, locations, progress=progress)
    except BaseException as error:
        # The frames of the traceback hold the tensors for as long as anybody keeps the error.
        _clear_frames(error)
        raise
    quantize_on_meta(module, planned.quantized)
    place(module, tensors)


def _require_places(
    module: nn.Module,
    planned: "Planned",
    device: torch.device | Callable[[Mapping[str, ParameterInfo]], Places],
    name: str,
) -> Places:
    """Return where the tensors go; raises for a device without room or kernels for them."""
    places = Places(device) if isinstance(device, torch.device) else device(planned.wanted)
    if len(places.devices) > 1:
        name = f"what device_map puts there of {name}"
    for on, part in places.parts(planned.quantized):
        require_device(module, part, on)
    for on, wanted in places.parts(planned.wanted):
        check_memory(wanted, on, name, module)
    return places


def _read_to(
    places: Places,
    checkpoint: Checkpoint,
    planned: "Planned",
    locations: Mapping[str, Location],
    *,
    progress: bool,
) -> dict[str, torch.Tensor]:
    """Run `read_copies` device by device."""
    tensors: dict[str, torch.Tensor] = {}
    for device, wanted in places.parts(planned.wanted):
        copies = (copy for copy in planned.plan.copies if places.of(copy.target) == device)
        part = planned._replace(wanted=wanted, plan=Plan(tuple(copies), {}))
        tensors |= read_copies(checkpoint, part, locations, device=device, progress=progress)
    return tensors


class Planned(NamedTuple):
    """The plan of a load: the tensors that a module wants, and how they are made."""

    wanted: dict[str, ParameterInfo]
    plan: Plan
    encoding: Encoding
    quantized: dict[str, Kind]
    """Kinds of the experts' and linear layers' parameters that become `QuantizedWeights`."""
    dense: dict[str, Kind | str]
    """Outcome for each weight outside the experts that is stored quantised: the kind it is held in,
    or why it is dequantised."""
    asked: Quantization | None


def sources_of(planned: Planned) -> set[str]:
    """Return the names of the tensors to read."""
    found = set()
    for copy in planned.plan.copies:
        stored = planned.encoding.weights.get(copy.source)
        if stored is None:
            found.add(copy.source)
        else:
            found.update((stored.data, *(extra.tensor for extra in stored.extras)))
    return found


def plan_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    rules: Sequence[Rule | Skip],
    *,
    dtype: torch.dtype,
    experts: OwnedExperts | None = None,
    quantization: Quantization | None = None,
) -> Planned:
    """Plan a load, and raise for all that can be refused without reading weights or knowing the
    device."""
    encoding = own_encoding(checkpoint)
    plain = parameter_infos(module, dtype)
    chosen = plan(rules, encoding.tensors, plain, experts=experts, name=checkpoint.name)
    encoding = unpadded(encoding, chosen, plain)
    quantized = quantized_experts(module, chosen.copies, encoding, quantization)
    owners = experts_of(module)
    others = [copy for copy in chosen.copies if copy.target not in owners]
    dense = quantized_linears(module, others, encoding)
    if quantization is not None and quantization.dense == "dequantize":
        dense = dict.fromkeys(dense, "as asked")
    quantized |= held_kinds(dense)
    wanted = quantized_infos(module, plain, quantized)
    return Planned(wanted, chosen, encoding, quantized, dense, quantization)


def unpadded(encoding: Encoding, chosen: Plan, parameters: Mapping[str, ParameterInfo]) -> Encoding:
    """Return the encoding without columns that the parameters do not have, which are padding."""
    return encoding.unpadded(
        {
            copy.source: parameters[copy.target].shape[-1]
            for copy in chosen.copies
            if copy.source in encoding.weights and not copy.view
        }
    )


def with_orders(
    module: nn.Module,
    checkpoint: Checkpoint,
    planned: Planned,
    locations: Mapping[str, Location],
    *,
    dtype: torch.dtype,
    union_over_ranks: Callable[[set[str]], set[str]] | None = None,
) -> Planned:
    """Return the plan with what only the files tell of columns in an order of their own: an order
    that moves none is left out, and linear layers whose parts have different ones are dequantised
    (quantisers give parts of one input the same).

    `union_over_ranks` returns the union of the names that each rank gives: an expert that moves to
    a rank needs the tensors of the experts there, so all ranks keep an order that one needs.
    """
    dense = dict(planned.dense)
    trivial: set[str] = set()
    needed: set[str] = set()
    for name, copies in copies_by_target(planned.plan.copies).items():
        kind = planned.quantized.get(name)
        if kind is None or not kind.ordered:
            continue
        orders = (_order(checkpoint, planned, locations, copy) for copy in copies)
        if name not in dense:
            moves = any(map(_moves, orders))  # mostly the first does, and no other is read
        else:
            first, *others = orders
            if not all(order.equal(first) for order in others):
                dense[name] = "parts of one layer with columns in different orders"
                continue
            moves = _moves(first)
        (needed if moves else trivial).add(name)
    if union_over_ranks is not None:
        trivial -= union_over_ranks(needed)
    if not trivial and dense == planned.dense:
        return planned
    quantized = {
        name: kind.unordered() if name in trivial else kind
        for name, kind in planned.quantized.items()
        if isinstance(dense.get(name, kind), Kind)
    }
    weights = dict(planned.encoding.weights)
    for copy in planned.plan.copies:
        if copy.target in trivial:
            weights[copy.source] = weights[copy.source].unordered()
    return planned._replace(
        wanted=quantized_infos(module, parameter_infos(module, dtype), quantized),
        encoding=replace(planned.encoding, weights=weights),
        quantized=quantized,
        dense={name: quantized.get(name, outcome) for name, outcome in dense.items()},
    )


def _order(
    checkpoint: Checkpoint, planned: Planned, locations: Mapping[str, Location], copy: Copy
) -> torch.Tensor:
    """Read the order of a weight's columns."""
    (extra,) = (e for e in planned.encoding.weights[copy.source].extras if e.field == "order")
    info = checkpoint.tensors[extra.tensor]
    return extra.read(read(Piece(extra.tensor, *locations[extra.tensor], info.dtype, info.shape)))


def _moves(order: torch.Tensor) -> bool:
    return not order.equal(torch.arange(len(order), dtype=order.dtype))


def require_device(module: nn.Module, quantized: Mapping[str, Kind], device: torch.device) -> None:
    """Raise `QuantizationError` for formats that the device has no kernel for."""
    in_fp8 = {name for name, kind in quantized.items() if kind.format.name == FP8}
    if in_fp8:
        require_fp8(device, FOR_EXPERTS if in_fp8 & experts_of(module).keys() else FOR_LINEARS)


def report(module: nn.Module, planned: Planned) -> None:
    """Log which weights of the checkpoint are not held as they are stored, counted in its own
    weights."""
    encoding, copies = planned.encoding, planned.plan.copies
    for skip, names in planned.plan.skipped.items():
        _log.warning("%s: %d tensors not loaded: %s", skip.pattern, len(names), skip.reason)
    if encoding.left_out:
        _log.warning(
            "%s and such: %d static scales of activations not loaded: activations are quantised "
            "as they come, or not at all",
            *(encoding.left_out[0], len(encoding.left_out)),
        )
    dense_experts = experts_of(module).keys() - planned.quantized.keys()
    dequantized = sorted(
        {c.source for c in copies if c.source in encoding.weights and c.target in dense_experts}
    )
    for pattern, alike in _by_pattern(dequantized).items():
        _log.warning(
            "%s: %d dequantised, since the checkpoint does not have all experts of these layers in "
            "one format, or has blocks that gate and up share",
            *(pattern, len(alike)),
        )
    for note in () if encoding.scheme is None else encoding.scheme.notes:
        _log.warning("%s", note)
    stay, others = by_outcome(copies, encoding, planned.dense)
    for kind, some in stay.items():
        _log.info("%d weights of linear layers stay in %s: %s", len(some), kind, _shown(some))
    for reason, some in others.items():
        _log.warning("%d weights dequantised (%s): %s", len(some), reason, _shown(some))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(sorted(_by_pattern(names)))


def _by_pattern(names: Sequence[str]) -> dict[str, list[str]]:
    """Group names that are equal but for their numbers, under a pattern with * for those."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(skeleton_of(name)[0].replace("#", "*"), []).append(name)
    return found


def own_encoding(checkpoint: Checkpoint) -> Encoding:
    """Return how the checkpoint stores its weights; raises `QuantizationError` for what cannot be
    loaded."""
    return encoding_of(
        checkpoint.config.get("quantization_config"), checkpoint.tensors, checkpoint.name
    )


def read_copies(
    checkpoint: Checkpoint,
    planned: Planned,
    locations: Mapping[str, Location],
    *,
    device: torch.device,
    progress: bool,
    squares: Squares | None = None,
) -> dict[str, torch.Tensor]:
    """Read the wanted tensors from the files, and return them on `device`.

    To `squares` are added those of the errors and of the weights that are quantised.
    """
    tensors = allocate(planned.wanted, device)
    filling = Filling(checkpoint, planned.encoding, locations, device)
    filling.squares = squares
    for name, copies in copies_by_target(planned.plan.copies).items():
        kind = planned.quantized.get(name)
        if kind is None:
            for copy in copies:
                if copy.source in planned.encoding.weights:
                    filling.dequantize(copy, tensors[name])
                else:
                    filling.copy(copy, tensors[name])
            continue
        fields = fields_of(tensors, name)
        for copy in copies:
            if copy.source in planned.encoding.weights:
                filling.unpack(copy, fields)
            else:
                assert planned.asked is not None
                columns = fields["data"].shape[-1] * kind.format.columns_per_element
                dtype = source_dtype(copies, planned.encoding)
                filling.quantize(copy, fields, planned.asked.recipe(name, columns, dtype))
    filling.run(progress=progress)
    return tensors


def fields_of(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the quantised weights of this name, by field."""
    start = f"{name}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def place(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
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
