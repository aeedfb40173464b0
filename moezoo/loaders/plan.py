"""Plan which copies fill a model from a checkpoint, by the rules of `loaders.mapping`.

`plan` matches the rules with the names and shapes on both sides and refuses what does not fit
before a byte of weights is read. Nothing here opens a file.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moezoo.errors import CheckpointError, QuantizationError
from moezoo.loaders.mapping import (
    Copy,
    ParameterInfo,
    Rule,
    Skip,
    TensorInfo,
    by_target,
    candidates_of,
    concat_axis,
    fill,
    parts_of,
    skeleton_of,
    stored_shape,
    template_of,
)

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SHOWN = 10
_LOADED = ("fp8", "float8", "gptq", "awq", "compressed-tensors", "mxfp4")
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


OwnedExperts = Sequence[int] | Mapping[int, Sequence[int]]
"""Ids of a rank's experts in the order of rows, for all layers or by layer."""


@dataclass(frozen=True)
class Plan:
    """The copies that fill every parameter once, and the tensors that each `Skip` leaves out."""

    copies: tuple[Copy, ...]
    skipped: Mapping[Skip, tuple[str, ...]]


def plan(
    rules: Sequence[Rule | Skip],
    checkpoint: Mapping[str, TensorInfo],
    parameters: Mapping[str, ParameterInfo],
    *,
    experts: OwnedExperts | None = None,
    name: str = "the checkpoint",
) -> Plan:
    """Return the copies that make `parameters` from `checkpoint`, which errors call `name`, by
    `rules`.

    `experts` are the ids that this rank owns, in the order of the rows of its parameters, the same
    in all layers or those of each; one may fill several rows. None means all. Raises
    `CheckpointError` that names every unknown or missing tensor, every one claimed twice, every
    wrong shape and every dtype that is not a plain float, and the files that hold them.
    """
    return _Planner(rules, checkpoint, parameters, experts=experts, name=name).run()


class _Place(NamedTuple):
    """Place that one source of a rule fills, with the shape of its piece of the parameter."""

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
        *,
        experts: OwnedExperts | None,
        name: str,
    ) -> None:
        self.name = name
        self.rules = rules
        self.checkpoint = checkpoint
        self.parameters = parameters
        self.experts = experts
        self.by_skeleton: dict[str, list[tuple[list[str], str]]] = defaultdict(list)
        for name in checkpoint:
            skeleton, numbers = skeleton_of(name)
            self.by_skeleton[skeleton].append((numbers, name))
        self.per_expert: dict[str, dict[int | None, dict[int, str]]] = {}
        self.claims: dict[str, str] = {}
        self.copies: list[Copy] = []
        self.missing: list[str] = []
        self.double: list[str] = []
        self.shapes: list[str] = []
        self.quantised_shapes: list[str] = []
        self.dtypes: list[str] = []

    def run(self) -> Plan:
        table = by_target(self.rules)
        depth = 0
        for name, parameter in self.parameters.items():
            candidates = candidates_of(table, name)
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
        if self.quantised_shapes and not any(problems.values()):
            raise QuantizationError(
                f"{self.name} does not fit the model of its config.json: "
                f"{_described({'of the wrong shape': self.quantised_shapes}, _SHOWN)}\n"
                "Get the checkpoint again, or the config.json that belongs to these weights"
            )
        problems["of the wrong shape"] = [*self.shapes, *self.quantised_shapes]
        if any(problems.values()):
            raise CheckpointError(
                f"{self.name} does not fit the model of its config.json: {self._refusal(problems)}"
            )
        return Plan(tuple(self.copies), skipped)

    def _refusal(self, problems: Mapping[str, list[str]]) -> str:
        """Return the message of an error: what is wrong and what to do."""
        method = self._quantised()
        if method is None:
            return (
                f"{_described(problems, _SHOWN)}\n"
                "Get the checkpoint again, or the config.json that belongs to these weights"
            )
        if any(known in method for known in _LOADED):
            advice = (
                "which its config.json does not say: get the config.json with the "
                "quantization_config of these weights, or take the 16-bit checkpoint of the model"
            )
        else:
            advice = "which this release does not load; take the 16-bit checkpoint of the model"
        return f"{_described(problems, 1)}\nIt looks quantised ({method}), {advice}"

    def _choose(self, name: str, candidates: list[tuple[Rule, int | None]]) -> Rule | None:
        """Return the rule of this parameter whose sources the checkpoint holds, in whole or in
        part."""
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
        layers = dict(candidates)
        best = max(
            there, key=lambda rule: (len(present[rule]), self._matches(rule, name, layers[rule]))
        )
        everything = set().union(*present.values())
        if everything != present[best]:
            self.double.append(
                f"{name} is given by {' and by '.join(min(present[rule]) for rule in there)}"
            )
            self.claims.update(dict.fromkeys(everything, name))
            return None
        return best

    def _matches(self, rule: Rule, target: str, layer: int | None) -> bool:
        """Return whether a layout of one tensor has the shape that is stored; two layouts may
        differ in that alone."""
        info = self.checkpoint.get(fill(rule.sources[0], layer))
        if rule.stacks or len(rule.sources) > 1 or info is None:
            return False
        expected = stored_shape(self.parameters[target].shape, rule.view)
        # Of a rank's experts, all but their number is known.
        return info.shape[1:] == expected[1:]

    def _present(self, rule: Rule, layer: int | None) -> set[str]:
        if rule.stacks:
            return {
                name for source in rule.sources for name in self._experts_of(source, layer).values()
            }
        return {name for source in rule.sources if (name := fill(source, layer)) in self.checkpoint}

    def _experts_of(self, source: str, layer: int | None) -> Mapping[int, str]:
        """Return the tensors of a per-expert source in one layer, by expert."""
        if source not in self.per_expert:
            template = template_of(source)
            layers: dict[int | None, dict[int, str]] = defaultdict(dict)
            for numbers, name in self.by_skeleton.get(template.skeleton, ()):
                slots = template.match(numbers)
                if slots is not None:
                    layers[slots.get("L")][slots["E"]] = name
            self.per_expert[source] = layers
        return self.per_expert[source].get(layer, {})

    def _fill(self, name: str, parameter: ParameterInfo, rule: Rule, layer: int | None) -> None:
        parts = parts_of(rule, parameter)
        if parts is None:
            sources = ", ".join(rule.sources)
            self.shapes.append(f"{name} {list(parameter.shape)} is not equal parts of {sources}")
            return
        for source, part in zip(rule.sources, parts, strict=True):
            shape = list(parameter.shape)
            if part:
                shape[concat_axis(rule)] = part[0].stop - part[0].start
            place = _Place(name, rule, layer, tuple(shape), part, parameter.dtype)
            if rule.stacks:
                self._fill_from_experts(place, source)
            else:
                self._fill_from_one(place, fill(source, layer))

    def _fill_from_experts(self, place: _Place, source: str) -> None:
        """Plan to stack one tensor per expert on dim 0; tensors of other ranks' experts are only
        claimed."""
        found = self._experts_of(source, place.layer)
        owned = self._owned(place)
        sharded = owned is not None
        if owned is None:
            owned = range(place.shape[0])
        rows: dict[int, list[int]] = {}
        for row, expert in enumerate(owned):
            rows.setdefault(expert, []).append(row)
        for expert, same in rows.items():
            name = found.get(expert)
            if name is None:
                absent = fill(source, place.layer, expert)
                self.missing.append(f"{_which(expert, place)}: {absent} (for {place.target})")
            elif self._claim(name, place) and self._fits(name, place, place.shape[1:]):
                self.copies.extend(
                    Copy(place.target, (row, *place.part), name, None, place.rule.view)
                    for row in same
                )
        if sharded:
            self.claims.update(
                (found[expert], place.target) for expert in found.keys() - set(owned)
            )

    def _fill_from_one(self, place: _Place, name: str) -> None:
        """Plan to copy one tensor into the piece: of a stack of all experts the rows of this
        rank's."""
        if name not in self.checkpoint:
            self.missing.append(f"{name} (for {place.target})")
        elif self._claim(name, place):
            owned = self._owned(place)
            if owned is not None:
                self._fill_owned(place, name, owned)
            elif self._fits(name, place, place.shape):
                index = (slice(None), *place.part) if place.rule.shard else place.part
                self.copies.append(Copy(place.target, index, name, None, place.rule.view))

    def _owned(self, place: _Place) -> Sequence[int] | None:
        """Return this rank's experts, where a parameter is divided over ranks."""
        if self.experts is None or place.rule.shard is None:
            return None
        if isinstance(self.experts, Mapping):
            assert place.layer is not None, place.target
            return self.experts[place.layer]
        return self.experts

    def _fill_owned(self, place: _Place, name: str, owned: Sequence[int]) -> None:
        expected = stored_shape((1, *place.shape[1:]), place.rule.view)
        stored = self.checkpoint[name].shape
        if stored[1:] != expected[1:] or stored[0] % expected[0]:
            self._note_shape(name, f"{place.target} takes {list(expected)} of it for each expert")
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
        """Note that `name` is used; return whether it was free and its dtype can be loaded."""
        if name in self.claims:
            self.double.append(f"{name} is wanted by {self.claims[name]} and by {place.target}")
            return False
        self.claims[name] = place.target
        stored, where = self.checkpoint[name].dtype, self.checkpoint[name].where
        if stored != place.dtype and not (stored in _FLOATS and place.dtype in _FLOATS):
            self.dtypes.append(
                f"{name} is {dtype_name(stored)}{where}, "
                f"{place.target} is {dtype_name(place.dtype)}"
            )
            return False
        return True

    def _fits(self, name: str, place: _Place, shape: tuple[int, ...]) -> bool:
        expected = stored_shape(shape, place.rule.view)
        info = self.checkpoint[name]
        stored = info.shape
        columns = range(stored[-1] - info.padding, stored[-1]) if stored else range(0)
        fits = stored == expected or (
            stored[:-1] == expected[:-1] and bool(expected) and expected[-1] in columns
        )
        if not fits:
            self._note_shape(name, f"{place.target} takes {list(expected)} of it")
        return fits

    def _note_shape(self, name: str, takes: str) -> None:
        info = self.checkpoint[name]
        if info.data is None:
            self.shapes.append(f"{name} is {list(info.shape)}{info.where}, {takes}")
            return
        of = "" if info.data == name else f", as {info.data} has it,"
        self.quantised_shapes.append(f"{name}{of} is {list(info.shape)}{info.where}, {takes}")

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
        """Describe an unknown tensor: its name, its file, and the parameter it resembles if a rule
        has one."""
        where = self.checkpoint[unknown].where
        skeleton, numbers = skeleton_of(unknown)
        for rule in (rule for rule in self.rules if isinstance(rule, Rule)):
            for source in rule.sources:
                template = template_of(source)
                slots = template.match(numbers) if template.skeleton == skeleton else None
                if slots is not None:
                    target = fill(rule.target, slots.get("L"))
                    if target in self.parameters:
                        return (
                            f"{unknown}{where} ({target} is {list(self.parameters[target].shape)})"
                        )
                    return f"{unknown}{where} (the model has no {target})"
        return unknown + where

    def _quantised(self) -> str | None:
        """Return how the checkpoint seems to be quantised, None where it does not."""
        methods = [
            method
            for end, method in _QUANTISED_NAMES
            if any(name.endswith(end) for name in self.checkpoint)
        ]
        integer = [self.checkpoint[line.split(" ", 1)[0]].dtype for line in self.dtypes]
        if not methods and not integer:
            return None
        return f"quant_method {methods[0]}" if methods else f"stored as {dtype_name(integer[0])}"


def _described(problems: Mapping[str, list[str]], shown: int) -> str:
    """Describe each kind of problem, naming a few of those that have it and counting the rest."""
    lines = []
    for kind, offenders in problems.items():
        if offenders:
            rest = len(offenders) - shown
            more = [f"and {rest} more"] if rest > 0 else []
            noun = "tensor" if len(offenders) == 1 else "tensors"
            lines.append(
                "\n  ".join([f"{len(offenders)} {noun} {kind}:", *offenders[:shown], *more])
            )
    return "\n".join(lines)


def _pattern(skip: Skip) -> re.Pattern[str]:
    known = {"{L}": "(?P<L>[0-9]+)", "{E}": "[0-9]+", "{*}": ".+"}
    return re.compile(
        "".join(
            known.get(part) or re.escape(part) for part in re.split(r"(\{[LE*]\})", skip.pattern)
        )
    )


def _runs(ids: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (row, first id, count) for each run of consecutive ids."""
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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
