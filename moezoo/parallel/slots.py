"""Where the experts of a model are: slots, those of rank 0 first, and who takes which replica.

Legend: T tokens, K experts per token, L MoE layers, E experts, P slots (E and redundant ones), R
ranks, X the most replicas of an expert.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise

import torch
from torch import Tensor

from moezoo.errors import ExpertMapError
from moezoo.parallel.eplb.state import choose_replicas, replica_maps
from moezoo.parallel.placement import STRATEGIES, Placement, experts_of_rank


@dataclass(frozen=True)
class Slots:
    """The expert of each slot in each MoE layer, and the slots of each rank."""

    num_experts: int
    layers: tuple[int, ...]
    """The decoder's layers that have experts, [L]."""
    bounds: tuple[int, ...]
    """[R + 1]: slots bounds[r] to bounds[r + 1] are rank r's."""
    physical_to_logical_map: Tensor
    """int64 [L, P]."""

    @classmethod
    def of(
        cls,
        placement: str | os.PathLike[str] | Sequence[Sequence[int]],
        num_experts: int,
        layers: Sequence[int],
        num_ranks: int,
    ) -> "Slots":
        """By a strategy of `experts_of_rank`, or by a placement file.

        Raises ExpertMapError for what does not fit the model or the ranks, OSError without a file.
        """
        if isinstance(placement, os.PathLike) or (
            isinstance(placement, str) and placement not in STRATEGIES
        ):
            if not os.path.exists(placement):
                raise ExpertMapError(
                    f"placement is {os.fspath(placement)!r}, expected "
                    f"{' or '.join(map(repr, STRATEGIES))}, a list of experts for each rank, or "
                    "the path of a placement file"
                )
            return cls.placed(Placement.load(placement), num_experts, layers, num_ranks)
        ranks = [experts_of_rank(num_experts, num_ranks, r, placement) for r in range(num_ranks)]
        bounds = [0]
        for experts in ranks:
            bounds.append(bounds[-1] + len(experts))
        slots = torch.tensor([expert for experts in ranks for expert in experts])
        return cls(num_experts, tuple(layers), tuple(bounds), slots.repeat(len(layers), 1))

    @classmethod
    def placed(
        cls, placement: Placement, num_experts: int, layers: Sequence[int], num_ranks: int
    ) -> "Slots":
        """Raises ExpertMapError unless it was made for such a model on so many ranks."""
        placement.check_model(num_experts, layers, num_ranks)
        slots = placement.physical_to_logical_map
        size = slots.shape[1] // num_ranks
        bounds = tuple(range(0, size * num_ranks + 1, size))
        return cls(num_experts, tuple(layers), bounds, slots)

    def of_rank(self, rank: int) -> dict[int, list[int]]:
        """Layer of the decoder -> the experts of this rank, in the order of its rows."""
        held = self.physical_to_logical_map[:, self.bounds[rank] : self.bounds[rank + 1]]
        return dict(zip(self.layers, held.tolist(), strict=True))

    @property
    def num_redundant(self) -> int:
        return self.physical_to_logical_map.shape[1] - self.num_experts

    @property
    def fingerprint(self) -> str:
        """What tells other maps from this one, for messages too."""
        described = repr((self.layers, self.bounds, self.physical_to_logical_map.tolist()))
        sizes = "+".join(str(b - a) for a, b in pairwise(self.bounds))
        return f"slots {sizes} of hash {sha256(described.encode()).hexdigest()[:12]}"


class ReplicaChoice:
    """The slots that a layer's tokens go to, by the order of its experts: an even choice of
    replicas.

    Args:
        slots: int64 [P], the expert of each slot.
        seed: another one for each rank, so that ranks do not choose the same replica at a time;
            the same one for ranks that have the same tokens, as those must choose alike.
    """

    def __init__(self, slots: Tensor, num_experts: int, *, seed: int, device: torch.device) -> None:
        replicas, counts = replica_maps(slots[None].to(device), num_experts)
        self._replicas, self._counts = replicas[0], counts[0]
        self._turn = torch.full((1,), seed * 997, dtype=torch.int64, device=device)
        self._several = len(slots) > num_experts

    def __call__(self, topk_ids: Tensor) -> Tensor:
        """topk_ids int [T, K] -> slots int32 [T, K]; -1 stays -1."""
        if self._several:
            slots = choose_replicas(topk_ids, self._replicas, self._counts, self._turn)
            self._turn += 1
            return slots
        return torch.where(topk_ids < 0, -1, self._replicas[topk_ids.clamp(min=0), 0]).int()
