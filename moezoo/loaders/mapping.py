"""The checkpoint language: which tensors of a checkpoint make which parameters of a model.

A model file holds a table of `Rule` and `Skip`. `loaders.plan` reads it forwards, from a checkpoint
to a model; `layout` is the inverse for writing: the tensors that the first rule of every target
names. Nothing here opens a file.

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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import nn

Index = tuple[slice | int, ...]
View = Literal["transpose", "deinterleave", "deinterleave_last", "unflatten"]

_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, as its header describes it.

    `padding` is how many of its last columns may be no part of the weight, which it does not say.
    `data` is the tensor that holds its numbers, where it is stored quantised.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    padding: int = field(default=0, kw_only=True)
    data: str | None = field(default=None, kw_only=True, compare=False)

    @property
    def where(self) -> str:
        """Place of the tensor in a message: empty, or " in " and the name of its file."""
        return ""


@dataclass(frozen=True)
class ParameterInfo:
    """Shape, dtype and parts of a model's parameter.

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
    gate rows then up rows, "deinterleave_last" does so with the last dim, as biases need it, and
    "unflatten" turns [E * N, K] into [E, N, K].

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
        order = ("unflatten", "transpose", "deinterleave", "deinterleave_last")
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


def copies_by_target(copies: Iterable[Copy]) -> dict[str, list[Copy]]:
    """Return the copies of each parameter."""
    found: dict[str, list[Copy]] = {}
    for copy in copies:
        found.setdefault(copy.target, []).append(copy)
    return found


def parameter_infos(
    module: nn.Module, dtype: torch.dtype | None = None
) -> dict[str, ParameterInfo]:
    """Return the parameters and persistent buffers of `module`, each once under its first name.

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
    """Return a view of `part`, a piece of a parameter, in the order of the stored tensor.

    Its shape may have more dims than the stored tensor: [I, 2, H] for interleaved rows [2 * I, H].
    """
    if "deinterleave_last" in view:
        part = part.unflatten(-1, (2, -1)).transpose(-2, -1)
    interleaved = "deinterleave" in view
    if interleaved:
        *lead, rows, cols = part.shape
        part = part.view(*lead, 2, rows // 2, cols).transpose(-3, -2)
    if "transpose" in view:
        part = part.movedim(-1, -3 if interleaved else -2)
    return part


def stored_name(rules: Sequence[Rule | Skip], target: str, names: Collection[str]) -> str:
    """Return the name of the tensor that makes a parameter with one source: the one among `names`,
    or else the first."""
    sources = [
        rule.sources[0] for rule in rules if isinstance(rule, Rule) and rule.target == target
    ]
    return next((name for name in sources if name in names), sources[0])


def stored_shape(shape: Sequence[int], view: Sequence[View]) -> tuple[int, ...]:
    """Return the shape in which a parameter's piece of this shape is stored."""
    stored = tuple(shape)
    if "transpose" in view:
        stored = (*stored[:-2], stored[-1], stored[-2])
    if "unflatten" in view:
        stored = (stored[0] * stored[1], *stored[2:])
    return stored


def layout(
    rules: Sequence[Rule | Skip],
    parameters: Mapping[str, ParameterInfo],
    *,
    per_expert: Collection[str] = (),
) -> list[Copy]:
    """Return the tensors to write for `parameters`, in the layout of each one's first rule; for
    those in `per_expert`, of the first rule with a tensor per expert, if there is one.

    `rows` is None in all of them. Raises `ValueError` for a parameter that no rule names.
    """
    table = by_target(rules)
    copies = []
    for name, parameter in parameters.items():
        candidates = candidates_of(table, name)
        stacking = (found for found in candidates if name in per_expert and found[0].stacks)
        rule, layer = next(stacking, candidates[0])
        parts = parts_of(rule, parameter)
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


class Template(NamedTuple):
    """A parsed template: the name with "#" for numbers, and what each number is: L, E or itself."""

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
def template_of(name: str) -> Template:
    slots = {"{L}": "L", "{E}": "E"}
    parts = [
        (part, slots.get(part) or (part if _NUMBER.fullmatch(part) else None))
        for part in name.split(".")
    ]
    return Template(
        ".".join(part if slot is None else "#" for part, slot in parts),
        tuple(slot for _, slot in parts if slot is not None),
    )


def skeleton_of(name: str) -> tuple[str, list[str]]:
    """Return the skeleton of a full name, and its numbers."""
    return _NUMBER.sub("#", name), _NUMBER.findall(name)


def fill(template: str, layer: int | None, expert: int | None = None) -> str:
    if layer is not None:
        template = template.replace("{L}", str(layer))
    return template if expert is None else template.replace("{E}", str(expert))


def by_target(rules: Sequence[Rule | Skip]) -> dict[str, list[Rule]]:
    table: dict[str, list[Rule]] = defaultdict(list)
    for rule in rules:
        if isinstance(rule, Rule):
            table[template_of(rule.target).skeleton].append(rule)
    return table


def candidates_of(table: Mapping[str, list[Rule]], name: str) -> list[tuple[Rule, int | None]]:
    """Return the rules whose target is this parameter, each with the layer."""
    skeleton, numbers = skeleton_of(name)
    found = [(rule, template_of(rule.target).match(numbers)) for rule in table.get(skeleton, ())]
    candidates = [(rule, slots.get("L")) for rule, slots in found if slots is not None]
    if not candidates:
        raise ValueError(f"no rule names the parameter {name}")
    return candidates


def parts_of(rule: Rule, parameter: ParameterInfo) -> list[tuple[slice, ...]] | None:
    """Return the index of each source on the axis of concatenation, or None when the rows do not
    split equally."""
    if len(rule.sources) == 1:
        return [()]
    axis = concat_axis(rule)
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


def concat_axis(rule: Rule) -> int:
    return 1 if rule.stacks or rule.shard else 0
