"""The linear layers of a model, and which of them keep the quantised weights of a checkpoint."""

from collections.abc import Mapping, Sequence

from torch import nn

from moezoo.layers.linear import Linear
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.encodings import Encoding
from moezoo.loaders.mapping import Copy, copies_by_target


def linears_of(module: nn.Module) -> dict[str, Linear]:
    """Return the linear layers in `module` by the names of their weights, except those that their
    owner names in `keep_dense`."""
    found = {}
    for name, layer in module.named_modules():
        owner, _, attribute = name.rpartition(".")
        kept = getattr(module.get_submodule(owner), "keep_dense", ())
        if isinstance(layer, Linear) and attribute not in kept:
            found[f"{name}.weight" if name else "weight"] = layer
    return found


def quantized_linears(
    module: nn.Module, copies: Sequence[Copy], encoding: Encoding
) -> dict[str, Kind | str]:
    """Return the weights that the checkpoint has quantised, except those of experts: each with its
    kind if a linear layer can hold it, or else with the reason why it is dequantised."""
    layers = linears_of(module)
    found: dict[str, Kind | str] = {}
    for name, some in copies_by_target(copies).items():
        if not any(copy.source in encoding.weights for copy in some):
            continue
        if name in layers:
            found[name] = _kind(some, encoding)
        elif isinstance(module.get_submodule(name.rpartition(".")[0]), Linear):
            found[name] = "their layer takes them apart"
        else:
            found[name] = "not of a linear layer"
    return found


def _kind(copies: Sequence[Copy], encoding: Encoding) -> Kind | str:
    stored = [encoding.weights.get(copy.source) for copy in copies]
    kinds = {None if weight is None else weight.kind for weight in stored}
    kind = kinds.pop()
    if kinds or kind is None:
        return "parts of one layer that are stored in several ways"
    if any(copy.view for copy in copies) or any(weight and weight.transposed for weight in stored):
        return "rows that are stored in another order"
    starts = [index.start for copy in copies for index in copy.target_index[:1]]  # type: ignore[union-attr]
    if any(start % kind.format.rows_per_scale for start in starts):
        return "parts of one layer that would share blocks"
    return kind


def held_kinds(found: Mapping[str, Kind | str]) -> dict[str, Kind]:
    return {name: kind for name, kind in found.items() if isinstance(kind, Kind)}


def by_outcome(
    copies: Sequence[Copy], encoding: Encoding, found: Mapping[str, Kind | str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the checkpoint's quantised weights in these parameters: those that stay, by the
    description of their kind, and those that are dequantised, by the reason."""
    stay: dict[str, list[str]] = {}
    dequantized: dict[str, list[str]] = {}
    for copy in copies:
        if copy.source in encoding.weights and copy.target in found:
            outcome = found[copy.target]
            if isinstance(outcome, Kind):
                stay.setdefault(outcome.described, []).append(copy.source)
            else:
                dequantized.setdefault(outcome, []).append(copy.source)
    return stay, dequantized
