"""The moves of experts when a layer's map changes.

Legend: L MoE layers, E experts (logical), P physical experts in slots, R ranks; rank r has P / R
slots from r * P / R on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from moezoo.errors import ExpertMapError


def keep_slots(old: Tensor, new: Tensor, num_ranks: int) -> Tensor:
    """Return the new map, int64 [L, P], with each rank's experts reordered to keep their slots.

    An expert that stays on its rank stays in its slot; new ones take the other slots.
    """
    _check(old, new, num_ranks)
    size = old.shape[1] // num_ranks
    kept = new.clone().view(-1, size)
    before = old.reshape(-1, size)
    for rank in (kept != before).any(1).nonzero()[:, 0].tolist():
        coming = kept[rank].tolist()
        slots: list[int | None] = []
        for expert in before[rank].tolist():
            stays = expert in coming
            if stays:
                coming.remove(expert)
            slots.append(expert if stays else None)
        arrivals = iter(coming)
        kept[rank] = torch.tensor([next(arrivals) if slot is None else slot for slot in slots])
    return kept.view_as(new)


@dataclass(frozen=True)
class Move:
    """The move of an expert from a slot of the old map to slots of one rank in the new map."""

    expert: int
    source: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class LayerMoves:
    """All moves of a layer; all of them read the weights as they were before the first one."""

    slots_per_rank: int
    local: tuple[Move, ...]
    """Moves between slots of one rank."""
    rounds: tuple[tuple[Move, ...], ...]
    """Moves between ranks. In a round a rank sends at most one expert and receives at most one; a
    rank that needs an expert in several slots receives it once."""

    def rank_of(self, slot: int) -> int:
        return slot // self.slots_per_rank

    def all(self) -> Iterator[Move]:
        """Return all moves, those within ranks first."""
        return chain(self.local, *self.rounds)


def plan_moves(old: Tensor, new: Tensor, num_ranks: int) -> LayerMoves:
    """Return the moves from one map of a layer, int64 [P], to another; the same on every rank.

    Slots that keep their expert take no part. Experts are planned in the order of their ids: the
    ranks that have an expert send it to those that need it, each to the same number of them, the
    first senders perhaps to one more.

    Raises ExpertMapError for maps of different sizes, or an expert that no old slot holds.
    """
    _check(old[None], new[None], num_ranks)
    size = len(old) // num_ranks
    before, after = old.tolist(), new.tolist()
    holders: dict[int, dict[int, int]] = {}
    for slot, expert in enumerate(before):
        holders.setdefault(expert, {}).setdefault(slot // size, slot)
    needed: dict[int, dict[int, list[int]]] = {}
    for slot, expert in enumerate(after):
        if before[slot] != expert:
            needed.setdefault(expert, {}).setdefault(slot // size, []).append(slot)

    local: list[Move] = []
    remote: list[Move] = []
    for expert in sorted(needed):
        if expert not in holders:
            raise ExpertMapError(f"expert {expert} is in no slot of the old map")
        senders = list(holders[expert].values())
        receivers = []
        for rank, targets in needed[expert].items():
            if rank in holders[expert]:
                local.append(Move(expert, holders[expert][rank], tuple(targets)))
            else:
                receivers.append(tuple(targets))
        each, more = divmod(len(receivers), len(senders))
        coming = iter(receivers)
        for i, sender in enumerate(senders):
            remote += [
                Move(expert, sender, targets) for targets in islice(coming, each + (i < more))
            ]
    return LayerMoves(size, tuple(local), _rounds(remote, size))


def _rounds(moves: list[Move], size: int) -> tuple[tuple[Move, ...], ...]:
    """Put each move into the first round in which its sender and receiver are free."""
    rounds: list[list[Move]] = []
    sending: list[set[int]] = []
    receiving: list[set[int]] = []
    for move in moves:
        sender, receiver = move.source // size, move.targets[0] // size
        at = 0
        while at < len(rounds) and (sender in sending[at] or receiver in receiving[at]):
            at += 1
        if at == len(rounds):
            rounds.append([])
            sending.append(set())
            receiving.append(set())
        rounds[at].append(move)
        sending[at].add(sender)
        receiving[at].add(receiver)
    return tuple(map(tuple, rounds))


def experts_received(old: Tensor, new: Tensor, num_ranks: int) -> Tensor:
    """Return how many experts each rank receives from others between two maps: int64 [L, R]."""
    _check(old, new, num_ranks)
    num_experts = int(torch.maximum(old.max(), new.max())) + 1
    held_old, held_new = (
        torch.zeros(len(slots), num_ranks, num_experts, dtype=torch.bool).scatter_(
            2, slots.view(len(slots), num_ranks, -1), True
        )
        for slots in (old, new)
    )
    return (held_new & ~held_old).sum(-1)


def _check(old: Tensor, new: Tensor, num_ranks: int) -> None:
    if old.shape != new.shape or old.ndim != 2 or old.shape[1] % num_ranks:
        raise ExpertMapError(
            f"maps must have the same layers and slots, divided over {num_ranks} ranks, got "
            f"{list(old.shape)} and {list(new.shape)}"
        )
