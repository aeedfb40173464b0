"""Placements of experts: which rank, and which of its slots, holds which expert.

Legend: E experts (logical), R ranks, L MoE layers, P physical experts: E and the redundant ones, in
slots; rank r has P / R slots from r * P / R on.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from moezoo.errors import ExpertMapError

STRATEGIES = ("linear", "round_robin")
"""`linear` gives a rank consecutive experts, `round_robin` every R-th expert."""

FORMAT, VERSION = "moezoo-placement", 1

Strategy = str | Sequence[Sequence[int]]
"""One of `STRATEGIES`, or a list of each rank's experts, in the order of its rows."""


def is_strategy(value: object) -> TypeGuard[Strategy]:
    """Whether a value is a strategy's name, or lists of whole numbers."""
    if isinstance(value, str):
        return value in STRATEGIES
    return isinstance(value, Sequence) and all(
        isinstance(experts, Sequence) and all(type(expert) is int for expert in experts)
        for experts in value
    )


def experts_of_rank(num_experts: int, ep_size: int, ep_rank: int, strategy: Strategy) -> list[int]:
    """Return the experts of one rank, in the order of its rows.

    The first E mod R ranks hold one more than the others, which hold none if R is above E.

    Raises:
        ExpertMapError: a size below 1, a rank that does not exist, an unknown strategy, or lists
            that do not hold every expert on exactly one rank.
    """
    if num_experts < 1 or ep_size < 1:
        raise ExpertMapError(
            f"there must be an expert and a rank or more, got {num_experts} experts, "
            f"{ep_size} ranks"
        )
    if not 0 <= ep_rank < ep_size:
        raise ExpertMapError(f"rank {ep_rank} is not one of the {ep_size} ranks")
    if not isinstance(strategy, str):
        _check_custom(num_experts, ep_size, strategy)
        return list(strategy[ep_rank])
    if strategy == "round_robin":
        return list(range(ep_rank, num_experts, ep_size))
    if strategy == "linear":
        base, rem = divmod(num_experts, ep_size)
        first = ep_rank * base + min(ep_rank, rem)
        return list(range(first, first + base + (ep_rank < rem)))
    raise ExpertMapError(
        f"placement is {strategy!r}, expected {' or '.join(map(repr, STRATEGIES))}, or a list of "
        "experts for each rank"
    )


def expert_map(
    num_experts: int, ep_size: int, ep_rank: int, strategy: Strategy = "linear"
) -> tuple[int, Tensor | None]:
    """Return the number of a rank's experts, and the row of each expert on it, int32 [E], or -1.

    The map is None for a single rank that holds all experts in order. Raises what
    `experts_of_rank` raises.
    """
    held = experts_of_rank(num_experts, ep_size, ep_rank, strategy)
    if ep_size == 1 and held == list(range(num_experts)):
        return num_experts, None
    rows = torch.full((num_experts,), -1, dtype=torch.int32)
    rows[torch.tensor(held, dtype=torch.int64)] = torch.arange(len(held), dtype=torch.int32)
    return len(held), rows


def _check_custom(num_experts: int, ep_size: int, ranks: Sequence[Sequence[int]]) -> None:
    if len(ranks) != ep_size:
        raise ExpertMapError(
            f"the placement lists experts for {len(ranks)} ranks, and there are {ep_size}"
        )
    holder: dict[int, int] = {}
    for rank, experts in enumerate(ranks):
        for expert in experts:
            if not 0 <= expert < num_experts:
                raise ExpertMapError(
                    f"the placement puts expert {expert} on rank {rank}, and there are experts "
                    f"0 to {num_experts - 1}"
                )
            if expert in holder:
                raise ExpertMapError(
                    f"the placement puts expert {expert} on rank {holder[expert]} and on rank "
                    f"{rank}; copies of experts are for eplb=, with a placement file"
                )
            holder[expert] = rank
    if len(holder) < num_experts:
        missing = sorted(set(range(num_experts)) - holder.keys())
        raise ExpertMapError(f"the placement puts experts {missing} on no rank")


def initial_map(
    num_experts: int, num_redundant: int, num_ranks: int, strategy: Strategy = "linear"
) -> Tensor:
    """Return the expert of each slot, int64 [P], before any load is known.

    A named strategy lays out experts 0 to E - 1, and then the redundant ones from expert 0 on, over
    the ranks; lists give the experts of each rank themselves, copies included.

    Raises ExpertMapError where P does not divide by R, or lists do not hold every expert or not
    P / R for each rank.
    """
    num_physical = num_experts + num_redundant
    if num_experts < 1 or num_ranks < 1 or num_redundant < 0:
        raise ExpertMapError(
            f"there must be an expert and a rank or more, got {num_experts} experts, "
            f"{num_redundant} redundant ones, {num_ranks} ranks"
        )
    if num_physical % num_ranks:
        raise ExpertMapError(
            f"{num_experts} experts and {num_redundant} redundant ones do not divide over "
            f"{num_ranks} ranks; {num_redundant + -num_physical % num_ranks} redundant ones would"
        )
    if isinstance(strategy, str):
        slots = list(
            chain.from_iterable(
                experts_of_rank(num_physical, num_ranks, rank, strategy)
                for rank in range(num_ranks)
            )
        )
        return torch.tensor(slots, dtype=torch.int64) % num_experts
    sizes = [len(experts) for experts in strategy]
    if sizes != [num_physical // num_ranks] * num_ranks:
        raise ExpertMapError(
            f"each of {num_ranks} ranks must list {num_physical // num_ranks} experts, got {sizes}"
        )
    slots_ = torch.tensor([*chain.from_iterable(strategy)], dtype=torch.int64)
    check_map(slots_[None], num_experts, "the placement")
    return slots_


def check_map(physical_to_logical_map: Tensor, num_experts: int, name: str) -> None:
    """Raise ExpertMapError unless each layer of a map int64 [L, P] has a slot for every expert."""
    if physical_to_logical_map.numel() == 0:
        raise ExpertMapError(f"{name} has no slots")
    low, high = (int(x) for x in physical_to_logical_map.aminmax())
    if low < 0 or high >= num_experts:
        raise ExpertMapError(
            f"{name} has expert {low if low < 0 else high} in a slot, and there are experts 0 to "
            f"{num_experts - 1}"
        )
    held = torch.zeros(len(physical_to_logical_map), num_experts, dtype=torch.bool)
    held.scatter_(1, physical_to_logical_map.cpu(), True)
    if not held.all():
        layer, expert = (~held).nonzero()[0].tolist()
        raise ExpertMapError(f"{name} has no slot for expert {expert} in MoE layer {layer}")


@dataclass(frozen=True)
class Placement:
    """The content of a placement file: the expert of each slot in each MoE layer of a model.

    Raises ExpertMapError for slots that do not divide over the ranks, an expert without a slot, and
    a map that has not a row for each layer.
    """

    num_experts: int
    num_ranks: int
    layers: tuple[int, ...]
    """Indices of the decoder's MoE layers, [L]."""
    physical_to_logical_map: Tensor
    """The expert of each slot, int64 [L, P]."""

    def __post_init__(self) -> None:
        slots = self.physical_to_logical_map
        if slots.ndim != 2 or len(slots) != len(self.layers):
            raise ExpertMapError(
                f"the map must have a row for each of the {len(self.layers)} layers, got "
                f"{list(slots.shape)}"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise ExpertMapError(f"layers must ascend, got {list(self.layers)}")
        if self.num_ranks < 1 or slots.shape[1] % self.num_ranks:
            raise ExpertMapError(
                f"{slots.shape[1]} slots do not divide over {self.num_ranks} ranks"
            )
        check_map(slots, self.num_experts, "the placement")

    @property
    def num_redundant(self) -> int:
        """Number of slots beyond one for each expert."""
        return self.physical_to_logical_map.shape[1] - self.num_experts

    def check_model(self, num_experts: int, layers: Sequence[int], num_ranks: int) -> None:
        """Raise ExpertMapError unless the placement is for such a model on so many ranks."""
        for what, placed, there in (
            ("experts", self.num_experts, num_experts),
            ("ranks", self.num_ranks, num_ranks),
            ("MoE layers", list(self.layers), list(layers)),
        ):
            if placed != there:
                raise ExpertMapError(
                    f"the placement is for {what}: {placed}, and the model runs with {there}; plan "
                    "it anew with moezoo eplb plan"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the placement as JSON, with one line per layer."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "num_experts": self.num_experts,
            "num_ranks": self.num_ranks,
            "layers": list(self.layers),
        }
        rows = ",\n  ".join(json.dumps(row) for row in self.physical_to_logical_map.tolist())
        text = json.dumps(head)[:-1] + f',\n "physical_to_logical_map": [\n  {rows}\n]}}\n'
        Path(path).write_text(text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Placement":
        """Read a placement file.

        Raises ExpertMapError, naming the file, for anything else; OSError without a file.
        """
        try:
            record = json.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise ExpertMapError(f"{path} is not JSON: {error}") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ExpertMapError(
                f'{path} has no "format": "{FORMAT}"; moezoo eplb plan writes placements'
            )
        if record.get("version") != VERSION:
            raise ExpertMapError(
                f"{path} has version {record.get('version')!r}, and this moezoo reads {VERSION}; "
                "plan it anew with moezoo eplb plan"
            )
        try:
            return cls(
                _number(record, "num_experts"),
                _number(record, "num_ranks"),
                tuple(_numbers(record["layers"], "layers")),
                torch.tensor(
                    [
                        _numbers(row, "physical_to_logical_map")
                        for row in record["physical_to_logical_map"]
                    ],
                    dtype=torch.int64,
                ),
            )
        except KeyError as error:
            raise ExpertMapError(f"{path} has no {error}") from None
        except (TypeError, ValueError) as error:
            raise ExpertMapError(f"{path}: {error}") from error
        except ExpertMapError as error:
            reason = str(error).removeprefix("Expert map mismatch: ")
            raise ExpertMapError(f"{path}: {reason}") from None


def _number(record: dict[str, Any], name: str) -> int:
    return _numbers([record[name]], name)[0]


def _numbers(values: Any, name: str) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{name} must be whole numbers, got {str(values)[:60]}")
    return values
