"""The checkpoint language: which tensors of a checkpoint make which parameters of a model.

A model file holds a table of `Rule` and `Skip`; `plan` matches it with the names and shapes of a
checkpoint and of a model, refuses what does not fit before a byte of weights is read, and returns
the copies to make. `layout` is the inverse for writing: the tensors that the first rule of every
target names. Nothing here opens a file.

Templates are dotted names in which `{L}` stands for the layer and `{E}` for the expert. The last
two of these rules are two layouts of one parameter [E, H, I]: a tensor an expert, and one for all.

    Rule("embed.weight", "model.embed_tokens.weight")
    Rule("layers.{L}.mlp.gate_up.weight", "model.layers.{L}.mlp.gate_proj.weight",
         "model.layers.{L}.mlp.up_proj.weight")
    Rule("layers.{L}.mlp.w2", "model.layers.{L}.mlp.experts.{E}.down_proj.weight", shard="expert")
    Rule("layers.{L}.mlp.w2", "model.layers.{L}.mlp.experts.down_proj", shard="expert")
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import nn

from moezoo.errors import CheckpointError

Index = tuple[slice | int, ...]
View = Literal["transpose", "deinterleave", "unflatten"]

_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SHOWN = 10
# How tensor names give away who quantised a checkpoint whose config does not say.
_QUANTISED_NAMES = (
    (".weight_scale_inv", "fp8"),
    (".qzeros", "gptq or awq"),
    (".qweight", "gptq or awq"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale", "compressed-tensors"),
    ("_blocks", "mxfp4"),
    (".absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
)


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint's header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ParameterInfo:
    """What a model says of one parameter.

    `part_sizes` are the rows of each source that is concatenated in it, where they are not equal.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    part_sizes: tuple[int, ...] | None = None


@dataclass(frozen=True, init=False)
class Rule:
    """One or many parameters and the checkpoint tensors that make them.

    `{L}` in the target is the layer and appears in every source too. Several sources are
    concatenated along dim 0. `{E}` in the sources stacks the experts on a new leading axis; sources
    are then concatenated along dim 1, as they are when `shard` says that dim 0 of a stored tensor
    is the experts. Only parameters that `shard="expert"` marks are split over ranks.

    `view` is applied to each source before it is put in place, from left to right when it is a
    tuple: "transpose" swaps the last two dims, "deinterleave" turns rows g0, u0, g1, u1, ... into
    gate rows then up rows, "unflatten" turns [E * N, K] into [E, N, K].

    Several rules may name one target: other layouts of the same weights. A checkpoint holds the
    sources of exactly one of them for each parameter; the first is the one that is written. Raises
    `ValueError` for a malformed rule.
    """

    target: str
    sources: tuple[str, ...]
    shard: Literal["expert"] | None
    view: tuple[View, ...]

    def __init__(
        self,
        target: str,
        *sources: str,
        shard: Literal["expert"] | None = None,
        view: View | tuple[View, ...] | None = None,
    ) -> None:
        views: tuple[View, ...] = (view,) if isinstance(view, str) else tuple(view or ())
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "shard", shard)
        object.__setattr__(self, "view", views)
        if not sources:
            raise ValueError(f"Rule({target!r}) has no sources")
        if shard not in (None, "expert"):
            raise ValueError(f"Rule({target!r}): shard is {shard!r}, expected None or 'expert'")
        for name in (target, *sources):
            rest = re.sub(r"(?<![^.])\{[LE]\}(?![^.])", "", name)
            if "{" in rest or "}" in rest or name.count("{L}") > 1 or name.count("{E}") > 1:
                raise ValueError(
                    f"Rule({target!r}): {name!r} may have {{L}} and {{E}}, each once between dots"
                )
        if "{E}" in target:
            raise ValueError(
                f"Rule({target!r}): experts are stacked, so {{E}} belongs into the sources only"
            )
        if any(("{L}" in source) != ("{L}" in target) for source in sources):
            raise ValueError(
                f"Rule({target!r}): {{L}} must be in the target and every source, or in none"
            )
        if len({"{E}" in source for source in sources}) > 1:
            raise ValueError(f"Rule({target!r}): {{E}} must be in every source, or in none")
        order = ("unflatten", "transpose", "deinterleave")
        if list(views) != [step for step in order if step in views]:
            raise ValueError(
                f"Rule({target!r}): view is {views}, expected some of {order}, in this order"
            )
        if "unflatten" in views and ("{E}" in sources[0] or shard is None):
            raise ValueError(
                f"Rule({target!r}): 'unflatten' is for the experts in one tensor: shard='expert'"
            )

    @property
    def stacks(self) -> bool:
        """Whether each expert is a tensor of its own in the checkpoint."""
        return "{E}" in self.sources[0]


@dataclass(frozen=True)
class Skip:
    """Checkpoint tensors that are known and not loaded, and why.

    `pattern` is a template in which `{*}` stands for any rest of a name. With `marks`, which are
    templates too, only layers that the model does not have and that hold one of these tensors are
    skipped.
    """

    pattern: str
    reason: str
    marks: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if "{*}" in self.pattern.removesuffix("{*}"):
            raise ValueError(
                f"Skip({self.pattern!r}): {{*}} stands for the rest of a name and comes last"
            )
        if self.marks and not all("{L}" in name for name in (self.pattern, *self.marks)):
            raise ValueError(f"Skip({self.pattern!r}): marks need {{L}}, as does the pattern then")


class Copy(NamedTuple):
    """One contiguous piece of a stored tensor and its place in a parameter.

    `rows` are the rows (dim 0) of the stored tensor to read, all of them when None; `target_index`
    is the place in the parameter. `stored_order(parameter[target_index], view)` runs through the
    elements in the order in which they are stored.
    """

    target: str
    target_index: Index
    source: str
    rows: slice | None
    view: tuple[View, ...]


@dataclass(frozen=True)
class Plan:
    """The copies that fill every parameter once, and the tensors that each `Skip` leaves out."""

    copies: tuple[Copy, ...]
    skipped: Mapping[Skip, tuple[str, ...]]


def parameter_infos(
    module: nn.Module, dtype: torch.dtype | None = None
) -> dict[str, ParameterInfo]:
    """The parameters and persistent buffers of `module`, each once under its first name.

    Floating ones count as `dtype` if one is given, but for those that their own module names in
    `keep_dtype`. `part_sizes` are the own module's.
    """
    infos = {}
    seen = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            owner_name, _, attribute = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            fixed = attribute in getattr(owner, "keep_dtype", ()) or not tensor.is_floating_point()
            infos[name] = ParameterInfo(
                tuple(tensor.shape),
                tensor.dtype if fixed or dtype is None else dtype,
                getattr(owner, "part_sizes", None),
            )
    return infos


def stored_order(part: torch.Tensor, view: Sequence[View]) -> torch.Tensor:
    """A view of `part`, a piece of a parameter, that runs in the order of the stored tensor.

    Its shape may have more dims than the stored tensor: [I, 2, H] for interleaved rows [2 * I, H].
    """
    interleaved = "deinterleave" in view
    if interleaved:
        *lead, rows, cols = part.shape
        part = part.view(*lead, 2, rows // 2, cols).transpose(-3, -2)
    if "transpose" in view:
        part = part.movedim(-1, -3 if interleaved else -2)
    return part


def stored_shape(shape: Sequence[int], view: Sequence[View]) -> tuple[int, ...]:
    """The shape in which a parameter's piece of this shape is stored."""
    stored = tuple(shape)
    if "transpose" in view:
        stored = (*stored[:-2], stored[-1], stored[-2])
    if "unflatten" in view:
        stored = (stored[0] * stored[1], *stored[2:])
    return stored


def plan(
    rules: Sequence[Rule | Skip],
    checkpoint: Mapping[str, TensorInfo],
    parameters: Mapping[str, ParameterInfo],
    *,
    experts: Sequence[int] | None = None,
) -> Plan:
    """The copies that make `parameters` from `checkpoint` by `rules`.

    `experts` are the ids that this rank owns, in the order of the rows of its parameters; None
    means all. Raises `CheckpointError` that names every unknown or missing tensor, every one
    claimed twice, every wrong shape and every dtype that is not a plain float.
    """
    return _Planner(rules, checkpoint, parameters, experts).run()


def layout(rules: Sequence[Rule | Skip], parameters: Mapping[str, ParameterInfo]) -> list[Copy]:
    """The tensors to write for `parameters`, in the layout of the first rule of each.

    `rows` is None in all of them. Raises `ValueError` for a parameter that no rule names.
    """
    table = _by_target(rules)
    copies = []
    for name, parameter in parameters.items():
        rule, layer = _candidates(table, name)[0]
        parts = _parts(rule, parameter)
        if parts is None:
            raise ValueError(
                f"{name} {list(parameter.shape)} is not {len(rule.sources)} equal parts"
            )
        for source, part in zip(rule.sources, parts, strict=True):
            if rule.stacks:
                for expert in range(parameter.shape[0]):
                    stored = fill(source, layer, expert)
                    copies.append(Copy(name, (expert, *part), stored, None, rule.view))
            else:
                index: Index = (slice(None), *part) if rule.shard else part
                copies.append(Copy(name, index, fill(source, layer), None, rule.view))
    return copies


class _Template(NamedTuple):
    """A template taken apart: the name with "#" for numbers, and what each is: L, E or itself."""

    skeleton: str
    slots: tuple[str, ...]

    def match(self, numbers: Sequence[str]) -> dict[str, int] | None:
        found = {}
        for slot, number in zip(self.slots, numbers, strict=True):
            if slot in "LE":
                found[slot] = int(number)
            elif slot != number:
                return None
        return found


@lru_cache(maxsize=4096)
def _template(name: str) -> _Template:
    slots = {"{L}": "L", "{E}": "E"}
    parts = [
        (part, slots.get(part) or (part if _NUMBER.fullmatch(part) else None))
        for part in name.split(".")
    ]
    return _Template(
        ".".join(part if slot is None else "#" for part, slot in parts),
        tuple(slot for _, slot in parts if slot is not None),
    )


def _skeleton(name: str) -> tuple[str, list[str]]:
    """The skeleton of a full name and its numbers."""
    return _NUMBER.sub("#", name), _NUMBER.findall(name)


def fill(template: str, layer: int | None, expert: int | None = None) -> str:
    if layer is not None:
        template = template.replace("{L}", str(layer))
    return template if expert is None else template.replace("{E}", str(expert))


def _by_target(rules: Sequence[Rule | Skip]) -> dict[str, list[Rule]]:
    table: dict[str, list[Rule]] = defaultdict(list)
    for rule in rules:
        if isinstance(rule, Rule):
            table[_template(rule.target).skeleton].append(rule)
    return table


def _candidates(table: Mapping[str, list[Rule]], name: str) -> list[tuple[Rule, int | None]]:
    """The rules whose target is this parameter, each with the layer."""
    skeleton, numbers = _skeleton(name)
    found = [(rule, _template(rule.target).match(numbers)) for rule in table.get(skeleton, ())]
    candidates = [(rule, slots.get("L")) for rule, slots in found if slots is not None]
    if not candidates:
        raise ValueError(f"no rule names the parameter {name}")
    return candidates


def _parts(rule: Rule, parameter: ParameterInfo) -> list[tuple[slice, ...]] | None:
    """The index of each source on the axis of concatenation, or None when the rows do not split
    equally.
    """
    if len(rule.sources) == 1:
        return [()]
    axis = _concat_axis(rule)
    sizes = parameter.part_sizes
    if sizes is None:
        each, rest = divmod(parameter.shape[axis], len(rule.sources))
        if rest:
            return None
        sizes = (each,) * len(rule.sources)
    assert len(sizes) == len(rule.sources) and sum(sizes) == parameter.shape[axis], (
        rule,
        parameter,
    )
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(slice(end - size, end),) for end, size in zip(ends, sizes, strict=True)]


def _concat_axis(rule: Rule) -> int:
    return 1 if rule.stacks or rule.shard else 0


class _Place(NamedTuple):
    """Where one source of a rule goes: the shape is that of its piece of the parameter."""

    target: str
    rule: Rule
    layer: int | None
    shape: tuple[int, ...]
    part: tuple[slice, ...]
    dtype: torch.dtype


class _Planner:
    """One run of `plan`: collects every problem, so that the error names them all."""

    def __init__(
        self,
        rules: Sequence[Rule | Skip],
        checkpoint: Mapping[str, TensorInfo],
        parameters: Mapping[str, ParameterInfo],
        experts: Sequence[int] | None,
    ) -> None:
        self.rules = rules
        self.checkpoint = checkpoint
        self.parameters = parameters
        self.experts = experts
        self.by_skeleton: dict[str, list[tuple[list[str], str]]] = defaultdict(list)
        for name in checkpoint:
            skeleton, numbers = _skeleton(name)
            self.by_skeleton[skeleton].append((numbers, name))
        self.per_expert: dict[str, dict[int | None, dict[int, str]]] = {}
        self.claims: dict[str, str] = {}
        self.copies: list[Copy] = []
        self.missing: list[str] = []
        self.double: list[str] = []
        self.shapes: list[str] = []
        self.dtypes: list[str] = []

    def run(self) -> Plan:
        table = _by_target(self.rules)
        depth = 0
        for name, parameter in self.parameters.items():
            candidates = _candidates(table, name)
            layer = candidates[0][1]
            depth = max(depth, 0 if layer is None else layer + 1)
            rule = self._choose(name, candidates)
            if rule is not None:
                self._fill(name, parameter, rule, layer)
        skipped = self._skip(depth)
        unknown = [self._explain(name) for name in self.checkpoint if name not in self.claims]
        problems = {
            "missing": self.missing,
            "given or wanted twice": self.double,
            "of the wrong shape": self.shapes,
            "of a dtype that is not loaded": self.dtypes,
            "unknown": unknown,
        }
        if any(problems.values()):
            raise CheckpointError(self._quantised() + _message(problems))
        return Plan(tuple(self.copies), skipped)

    def _choose(self, name: str, candidates: list[tuple[Rule, int | None]]) -> Rule | None:
        """The rule of this parameter whose sources the checkpoint holds, in whole or in part."""
        if len(candidates) == 1:
            return candidates[0][0]
        present = {rule: self._present(rule, layer) for rule, layer in candidates}
        there = [rule for rule in present if present[rule]]
        if not there:
            layouts = (
                ", ".join(fill(source, layer) for source in rule.sources)
                for rule, layer in candidates
            )
            self.missing.append(f"{' or '.join(layouts)} (for {name})")
            return None
        best = max(there, key=lambda rule: len(present[rule]))
        everything = set().union(*present.values())
        if everything != present[best]:
            self.double.append(
                f"{name} is given by {' and by '.join(min(present[rule]) for rule in there)}"
            )
            self.claims.update(dict.fromkeys(everything, name))
            return None
        return best

    def _present(self, rule: Rule, layer: int | None) -> set[str]:
        if rule.stacks:
            return {
                name for source in rule.sources for name in self._experts_of(source, layer).values()
            }
        return {name for source in rule.sources if (name := fill(source, layer)) in self.checkpoint}

    def _experts_of(self, source: str, layer: int | None) -> Mapping[int, str]:
        """The tensors of a per-expert source in one layer, by expert."""
        if source not in self.per_expert:
            template = _template(source)
            layers: dict[int | None, dict[int, str]] = defaultdict(dict)
            for numbers, name in self.by_skeleton.get(template.skeleton, ()):
                slots = template.match(numbers)
                if slots is not None:
                    layers[slots.get("L")][slots["E"]] = name
            self.per_expert[source] = layers
        return self.per_expert[source].get(layer, {})

    def _fill(self, name: str, parameter: ParameterInfo, rule: Rule, layer: int | None) -> None:
        parts = _parts(rule, parameter)
        if parts is None:
            sources = ", ".join(rule.sources)
            self.shapes.append(f"{name} {list(parameter.shape)} is not equal parts of {sources}")
            return
        for source, part in zip(rule.sources, parts, strict=True):
            shape = list(parameter.shape)
            if part:
                shape[_concat_axis(rule)] = part[0].stop - part[0].start
            place = _Place(name, rule, layer, tuple(shape), part, parameter.dtype)
            if rule.stacks:
                self._fill_from_experts(place, source)
            else:
                self._fill_from_one(place, fill(source, layer))

    def _fill_from_experts(self, place: _Place, source: str) -> None:
        """One tensor per expert, stacked on dim 0; those of other ranks are only claimed."""
        found = self._experts_of(source, place.layer)
        sharded = self.experts is not None and place.rule.shard is not None
        owned = self.experts if self.experts is not None and sharded else range(place.shape[0])
        for row, expert in enumerate(owned):
            name = found.get(expert)
            if name is None:
                absent = fill(source, place.layer, expert)
                self.missing.append(f"{_which(expert, place)}: {absent} (for {place.target})")
            elif self._claim(name, place) and self._fits(name, place, place.shape[1:]):
                self.copies.append(
                    Copy(place.target, (row, *place.part), name, None, place.rule.view)
                )
        if sharded:
            self.claims.update(
                (found[expert], place.target) for expert in found.keys() - set(owned)
            )

    def _fill_from_one(self, place: _Place, name: str) -> None:
        """One tensor for the piece; if it holds all experts and this rank owns some, those rows of
        it.
        """
        if name not in self.checkpoint:
            self.missing.append(f"{name} (for {place.target})")
        elif self._claim(name, place):
            if self.experts is not None and place.rule.shard is not None:
                self._fill_owned(place, name, self.experts)
            elif self._fits(name, place, place.shape):
                index = (slice(None), *place.part) if place.rule.shard else place.part
                self.copies.append(Copy(place.target, index, name, None, place.rule.view))

    def _fill_owned(self, place: _Place, name: str, owned: Sequence[int]) -> None:
        expected = stored_shape((1, *place.shape[1:]), place.rule.view)
        stored = self.checkpoint[name].shape
        if stored[1:] != expected[1:] or stored[0] % expected[0]:
            takes = f"{place.target} takes {list(expected)} of it for each expert"
            self.shapes.append(f"{name} is {list(stored)}, {takes}")
            return
        total = stored[0] // expected[0]
        beyond = [expert for expert in owned if expert >= total]
        if beyond:
            self.missing.extend(
                f"{_which(expert, place)}: {name} holds {total} experts (for {place.target})"
                for expert in beyond
            )
            return
        for row, first, count in _runs(owned):
            index = (slice(row, row + count), *place.part)
            rows = slice(first * expected[0], (first + count) * expected[0])
            self.copies.append(Copy(place.target, index, name, rows, place.rule.view))

    def _claim(self, name: str, place: _Place) -> bool:
        """Note who wants `name`; whether nobody did before and its dtype can be loaded."""
        if name in self.claims:
            self.double.append(f"{name} is wanted by {self.claims[name]} and by {place.target}")
            return False
        self.claims[name] = place.target
        stored = self.checkpoint[name].dtype
        if stored != place.dtype and not (stored in _FLOATS and place.dtype in _FLOATS):
            self.dtypes.append(
                f"{name} is {_short(stored)}, {place.target} is {_short(place.dtype)}"
            )
            return False
        return True

    def _fits(self, name: str, place: _Place, shape: tuple[int, ...]) -> bool:
        expected = stored_shape(shape, place.rule.view)
        stored = self.checkpoint[name].shape
        if stored != expected:
            self.shapes.append(
                f"{name} is {list(stored)}, {place.target} takes {list(expected)} of it"
            )
        return stored == expected

    def _skip(self, depth: int) -> dict[Skip, tuple[str, ...]]:
        skipped = {}
        for skip in self.rules:
            if isinstance(skip, Skip):
                pattern = _pattern(skip)
                found = [
                    (name, match) for name in self.checkpoint if (match := pattern.fullmatch(name))
                ]
                if skip.marks:
                    found = [
                        (name, match)
                        for name, match in found
                        if int(match["L"]) >= depth
                        and any(fill(m, int(match["L"])) in self.checkpoint for m in skip.marks)
                    ]
                names = [name for name, _ in found]
                self.double.extend(
                    f"{name} is wanted by {self.claims[name]} and skipped by {skip.pattern}"
                    for name in names
                    if name in self.claims
                )
                self.claims.update(dict.fromkeys(names, skip.pattern))
                if names:
                    skipped[skip] = tuple(names)
        return skipped

    def _explain(self, unknown: str) -> str:
        """The unknown name, and which parameter it would have been if a rule knows it."""
        skeleton, numbers = _skeleton(unknown)
        for rule in (rule for rule in self.rules if isinstance(rule, Rule)):
            for source in rule.sources:
                template = _template(source)
                slots = template.match(numbers) if template.skeleton == skeleton else None
                if slots is not None:
                    target = fill(rule.target, slots.get("L"))
                    if target in self.parameters:
                        return f"{unknown} ({target} is {list(self.parameters[target].shape)})"
                    return f"{unknown} (the model has no {target})"
        return unknown

    def _quantised(self) -> str:
        """A first sentence for a checkpoint that somebody quantised, or nothing."""
        methods = [
            method
            for end, method in _QUANTISED_NAMES
            if any(name.endswith(end) for name in self.checkpoint)
        ]
        integer = [self.checkpoint[line.split(" ", 1)[0]].dtype for line in self.dtypes]
        if not methods and not integer:
            return ""
        how = f"quant_method {methods[0]}" if methods else f"stored as {_short(integer[0])}"
        return f"the checkpoint looks quantised ({how}), which this release does not load; "


def _message(problems: Mapping[str, list[str]]) -> str:
    lines = []
    for kind, offenders in problems.items():
        if offenders:
            rest = len(offenders) - _SHOWN
            more = [f"and {rest} more"] if rest > 0 else []
            noun = "tensor" if len(offenders) == 1 else "tensors"
            lines.append(
                "\n  ".join([f"{len(offenders)} {noun} {kind}:", *offenders[:_SHOWN], *more])
            )
    return "the checkpoint does not fit the model: " + "\n".join(lines)


def _pattern(skip: Skip) -> re.Pattern[str]:
    known = {"{L}": "(?P<L>[0-9]+)", "{E}": "[0-9]+", "{*}": ".+"}
    return re.compile(
        "".join(
            known.get(part) or re.escape(part) for part in re.split(r"(\{[LE*]\})", skip.pattern)
        )
    )


def _runs(ids: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """(row, first id, count) of each run of consecutive ids."""
    row, first, count = 0, -1, 0
    for i in ids:
        if count and i == first + count:
            count += 1
        else:
            if count:
                yield row, first, count
            row, first, count = row + count, i, 1
    if count:
        yield row, first, count


def _which(expert: int, place: _Place) -> str:
    of = "" if place.layer is None else f" of layer {place.layer}"
    return f"expert {expert}{of}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
