"""Overridden routing, for experiments: experts that are forced, banned or favoured, and another k.

Legend: T tokens, E experts, K experts per token.
"""

import math
import operator
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moezoo.layers.moe.layer import BiasedLogits, BiasedRoute, FusedMoE

OUT_OF_REACH = 1e30
"""A number that decides the choice when it is added to a score or subtracted from it; finite, as
inf - inf is NaN."""

MARGIN = 1e-3
"""How far a forced expert's logit is above the token's best one, relative to that if it is beyond
1, so that it cannot lose a tie."""


class RoutingOverride:
    """A layer's route with changed choices: assign it to `FusedMoE.reroute`.

    Args:
        force: experts that every token chooses. Their logit is the token's best plus `MARGIN`, so
            they weigh as much as its favourite would have.
        ban: experts that no token chooses.
        bias: numbers that are added to the logits of experts, so to choice and weight.
        k: number of experts a token chooses, by default the route's.

    Raises:
        ValueError: an argument is of another type, there is no such expert, too few are left to
            choose from, or the forced ones are of more groups than the route chooses.
    """

    def __init__(
        self,
        layer: FusedMoE,
        *,
        force: Collection[int] = (),
        ban: Collection[int] = (),
        bias: Mapping[int, float] | None = None,
        k: int | None = None,
    ) -> None:
        force, ban, bias = _indices("force", force), _indices("ban", ban), _biases(bias or {})
        keywords = layer.router.keywords
        self.k = keywords["k"] if k is None else _integer("k", k)
        self._fn = partial(layer.router, k=self.k)
        num_groups, topk_groups = keywords.get("num_groups", 1), keywords.get("topk_groups", 1)
        num_choices = len(layer.gate)
        _validate(num_choices, force, ban, bias, self.k, num_groups, topk_groups)
        device = layer.gate.device

        def marked(experts: Collection[int]) -> Tensor:
            mask = torch.zeros(num_choices, dtype=torch.bool)
            mask[list(experts)] = True
            return mask

        addend = torch.zeros(num_choices)
        for expert, value in bias.items():
            addend[expert] = value
        addend[marked(ban)] = -OUT_OF_REACH
        self._addend = addend.to(device)
        self._forced = marked(force).to(device) if force else None
        # A correction bias is added after the scores are computed, and could outweigh the logits.
        steer = torch.zeros(num_choices)
        steer[marked(force)], steer[marked(ban)] = OUT_OF_REACH, -OUT_OF_REACH
        self._steer = steer.to(device)
        self._route = layer.route

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Route logits [T, E] to topk_weights [T, K] fp32 and topk_ids [T, K] int32."""
        logits = logits.float() + self._addend
        if isinstance(self._route, BiasedLogits):
            logits = logits + self._route.bias.float()
        if self._forced is not None:
            best = logits.amax(-1, keepdim=True)
            logits = torch.where(self._forced, best + MARGIN * best.abs().clamp(min=1.0), logits)
        if isinstance(self._route, BiasedRoute):
            return self._fn(logits, correction_bias=self._route.correction_bias + self._steer)
        return self._fn(logits)


def routing_overrides(
    with_experts: Mapping[int, FusedMoE], layers: Collection[int] | None, **options: Any
) -> dict[FusedMoE, RoutingOverride]:
    """Make an override for each of `layers`, by default all in `with_experts`.

    `options` are those of `RoutingOverride`.

    Raises ValueError for arguments that do not fit, where a layer has no experts, or where routing
    is overridden already.
    """
    chosen = with_experts.keys() if layers is None else _indices("layers", layers)
    if missing := sorted(set(chosen) - with_experts.keys()):
        raise ValueError(
            f"layers: layer {missing[0]} has no experts; those with experts are "
            f"{', '.join(map(str, with_experts))}"
        )
    if any(layer.reroute is not None for layer in with_experts.values()):
        raise ValueError("the routing is changed already; undo() that first")
    return {with_experts[i]: RoutingOverride(with_experts[i], **options) for i in chosen}


class OverriddenRouting:
    """Overrides that are in force until `undo` or the end of a `with` block.

    Args:
        overrides: the override of each layer.
        changed: is called when they come into force, and when they are undone.
    """

    def __init__(
        self, overrides: Mapping[FusedMoE, RoutingOverride], changed: Callable[[], None]
    ) -> None:
        self._overrides, self._changed = overrides, changed
        for layer, override in overrides.items():
            layer.reroute = override
        changed()

    def undo(self) -> None:
        """Let the layers route as before; a second call changes nothing more."""
        for layer, override in self._overrides.items():
            if layer.reroute is override:
                layer.reroute = None
        self._overrides = {}
        self._changed()

    def __enter__(self) -> "OverriddenRouting":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _integer(name: str, given: Any) -> int:
    try:
        return operator.index(given)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {given!r}") from None


def _indices(name: str, given: Collection[int]) -> list[int]:
    if isinstance(given, str | bytes) or not isinstance(given, Collection):
        raise ValueError(f"{name} must be a list of indices, such as [3], got {given!r}")
    return [_integer(f"each index in {name}", index) for index in given]


def _biases(given: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise ValueError(f"bias must map experts to numbers, such as {{3: 1.5}}, got {given!r}")
    bias = {}
    for expert, value in given.items():
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isnan(number):
            raise ValueError(f"bias of expert {expert!r} must be a number, got {value!r}")
        bias[_integer("each expert in bias", expert)] = number
    return bias


def _validate(
    num_experts: int,
    force: Collection[int],
    ban: Collection[int],
    bias: Mapping[int, float],
    k: int,
    num_groups: int,
    topk_groups: int,
) -> None:
    for name, experts in (("force", force), ("ban", ban), ("bias", bias)):
        for expert in experts:
            if not 0 <= expert < num_experts:
                raise ValueError(
                    f"{name}: there is no expert {expert}, only 0 to {num_experts - 1}"
                )
    if both := set(force) & (set(ban) | set(bias)):
        raise ValueError(f"expert {min(both)} is forced, so it can be neither banned nor biased")
    if both := set(ban) & set(bias):
        raise ValueError(f"expert {min(both)} is banned, so it can have no bias")
    size = num_experts // num_groups
    left = sorted(
        (sum(e not in ban for e in range(g * size, (g + 1) * size)) for g in range(num_groups)),
        reverse=True,
    )
    most = sum(left[:topk_groups])
    if not 1 <= k <= most:
        where = f" in its {topk_groups} groups" if num_groups > 1 else ""
        raise ValueError(f"k is {k}, and a token has {most} experts to choose from{where}")
    if len(set(force)) > k:
        raise ValueError(f"{len(set(force))} experts are forced, and a token has k = {k}")
    if len({expert // size for expert in force}) > topk_groups:
        raise ValueError(
            f"the forced experts are of {len({expert // size for expert in force})} groups, and a "
            f"token takes those of {topk_groups}"
        )
