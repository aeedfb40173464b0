"""The experts of a model: which of them are held quantised, and where their parts lie then.

Legend: H hidden, I expert intermediate, E experts, N rows, K columns.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import nn

from moezoo.errors import AskedQuantizationError
from moezoo.formats import INT4
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant.groups import GROUP_SIZES
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.encodings import Encoding
from moezoo.loaders.mapping import Copy, Index
from moezoo.loaders.quantization import Quantization

_log = logging.getLogger(__name__)

EXPERTS = ("w13", "w2")
"""Names of the parameters of a `FusedMoE` that are quantised."""


def experts_of(module: nn.Module) -> dict[str, FusedMoE]:
    """Return the MoE layers in `module` by the names of their experts' parameters."""
    return {
        f"{name}.{attribute}" if name else attribute: layer
        for name, layer in module.named_modules()
        if isinstance(layer, FusedMoE)
        for attribute in EXPERTS
    }


def parts_shape(layer: FusedMoE, name: str) -> tuple[int, ...]:
    """Return the shape of w13 or w2 in `QuantizedWeights`."""
    num_experts, hidden_size, intermediate_size = layer.w2.shape
    if name.endswith("w2"):
        return (num_experts, hidden_size, intermediate_size)
    return (num_experts, 2, intermediate_size, hidden_size)


def parts_index(index: Index, shape: Sequence[int]) -> Index:
    """Return the index into `QuantizedWeights` of this shape of what is parameter[index] of [E, 2I,
    H]."""
    if len(index) < 2 or len(shape) < 4:
        return index
    part = index[1]
    assert isinstance(part, slice), "the rows of gate or up"
    return (index[0], part.start // shape[2])


def has_gate_and_up(index: Index, shape: Sequence[int]) -> bool:
    """Return whether parameter[index] holds both gate and up."""
    return len(shape) == 4 and len(index) == 1


def quantized_experts(
    module: nn.Module, copies: Sequence[Copy], encoding: Encoding, asked: Quantization | None
) -> dict[str, Kind]:
    """Return the experts' parameters that become `QuantizedWeights`, each with its kind.

    All of a model, where the checkpoint is not quantised and it is asked for; else those of the
    layers that the checkpoint has wholly in one format, all experts alike. Raises
    `AskedQuantizationError` for columns that a format does not have, and where a checkpoint that is
    quantised is asked for in another format.
    """
    owners = experts_of(module)
    by_target: dict[str, list[Copy]] = {name: [] for name in owners}
    for copy in copies:
        if copy.target in by_target:
            by_target[copy.target].append(copy)
    if encoding.scheme is None:
        if asked is None or asked.type is None:
            return {}
        return _on_the_fly(owners, by_target, encoding, asked)
    kinds = {
        name: _stored_kind(by_target[name], encoding, parts_shape(layer, name))
        for name, layer in owners.items()
    }
    formats: dict[FusedMoE, set[type | None]] = {layer: set() for layer in owners.values()}
    for name, layer in owners.items():
        kind = kinds[name]
        formats[layer].add(None if kind is None else kind.format)
    whole = {
        name: kind
        for name, kind in kinds.items()
        if kind is not None and len(formats[owners[name]]) == 1
    }
    stored = {name: _stored(by_target[name], encoding) for name in whole}
    refuse_others(
        asked,
        {stored[name]: kind for name, kind in whole.items()},
        {stored[name]: parts_shape(owners[name], name)[-1] for name in whole},
    )
    return whole


def refuse_others(
    asked: Quantization | None, kinds: Mapping[str, Kind], columns: Mapping[str, int]
) -> None:
    """Raise `AskedQuantizationError` where `asked` contradicts the experts that a checkpoint has
    quantised: weights of these kinds with these numbers of columns."""
    if asked is None or asked.type is None:
        return
    found = sorted({kind.format.name for kind in kinds.values()})
    if set(found) - {asked.type}:
        raise AskedQuantizationError(
            f"the checkpoint has its experts in {' and '.join(found)} already, so they cannot be "
            f"asked for in {asked.type}; leave quantization None, or take the 16-bit checkpoint"
        )
    for name, kind in kinds.items():
        field = asked.contradicted(kind, columns[name])
        if field is not None:
            raise AskedQuantizationError(
                f"{field}={getattr(asked, field)!r} is asked for, but the checkpoint has {name} in "
                f"{kind.described} already; leave quantization None to take it as it is, or take "
                "the 16-bit checkpoint of the model"
            )


def _on_the_fly(
    owners: Mapping[str, FusedMoE],
    by_target: Mapping[str, Sequence[Copy]],
    encoding: Encoding,
    asked: Quantization,
) -> dict[str, Kind]:
    kinds = {}
    smaller: dict[int, list[str]] = {}
    for name, layer in owners.items():
        if not by_target[name]:
            continue  # of a rank without experts
        *_, rows, columns = parts_shape(layer, name)
        asked.require_rows(_stored(by_target[name], encoding), rows)
        dtype = source_dtype(by_target[name], encoding)
        kinds[name] = kind = asked.recipe(_stored(by_target[name], encoding), columns, dtype).kind
        size = kind.group_size or 0
        chosen = asked.group_size or asked.block_size
        if asked.type == INT4 and chosen is None and 0 < size < GROUP_SIZES[0]:
            smaller.setdefault(size, []).append(name)
    for size, names in smaller.items():
        _log.warning(
            "%s: groups of %d columns in %d weights such as %s, the largest that divide them",
            *(asked.type, size, len(names), names[0]),
        )
    return kinds


def _stored(copies: Sequence[Copy], encoding: Encoding) -> str:
    """Describe the first tensor of a parameter for a message: its name, its file and the
    parameter."""
    info = encoding.tensors[copies[0].source]
    return f"{info.data or copies[0].source}{info.where} (for {copies[0].target})"


def source_dtype(copies: Sequence[Copy], encoding: Encoding) -> torch.dtype:
    """Return the dtype of the tensors that make a parameter, the widest if they differ."""
    return reduce(torch.promote_types, (encoding.tensors[copy.source].dtype for copy in copies))


def _stored_kind(copies: Sequence[Copy], encoding: Encoding, shape: Sequence[int]) -> Kind | None:
    """Return the kind that all tensors of a parameter share, or None if they cannot be held as they
    are."""
    kinds = set()
    for copy in copies:
        stored = encoding.weights.get(copy.source)
        if stored is None or stored.transposed != ("transpose" in copy.view):
            return None
        interleaved = "deinterleave" in copy.view
        if "unflatten" in copy.view or (interleaved and stored.columns):
            return None
        rows = stored.kind.format.rows_per_scale
        if has_gate_and_up(copy.target_index, shape) and (
            shape[2] % rows or (interleaved and rows > 1)
        ):
            return None
        kinds.add(stored.kind)
    return kinds.pop() if len(kinds) == 1 else None
