"""The slots of a model's experts: which slot holds which expert, and which rank has which slots.

Legend: L MoE layers, E experts, P slots (E and redundant ones), R ranks.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise

import torch
from torch import Tensor

from moezoo.errors import ExpertMapError
from moezoo.parallel.placement import STRATEGIES, Placement, Strategy, experts_of_rank


@dataclass(frozen=True)
class Slots:
    """The expert of each slot in each MoE layer, and the slots of each rank, rank 0's first."""

    num_experts: int
    layers: tuple[int, ...]
    """Indices of the decoder's MoE layers, [L]."""
    bounds: tuple[int, ...]
    """Rank r has slots bounds[r] to bounds[r + 1]; [R + 1]."""
    physical_to_logical_map: Tensor
    """The expert of each slot, int64 [L, P]."""

    @classmethod
    def of(
        cls,
        placement: Strategy | os.PathLike[str] | Placement,
        num_experts: int,
        layers: Sequence[int],
        num_ranks: int,
    ) -> "Slots":
        """Return the slots of a strategy of `experts_of_rank`, of a placement, or of its file.

        Raises ExpertMapError for what does not fit the model or the ranks, OSError without a file.
        """
        if isinstance(placement, os.PathLike) or (
            isinstance(placement, str) and placement not in STRATEGIES
        ):
            if not os.path.exists(placement):
                raise ExpertMapError(
                    f"placement is {os.fspath(placement)!r}, expected "
                    f"{' or '.join(map(repr, STRATEGIES))}, a list of experts for each rank, or "
                    "the path of a placement file, and there is no such file"
                )
            placement = Placement.load(placement)
        if isinstance(placement, Placement):
            placement.check_model(num_experts, layers, num_ranks)
            maps = placement.physical_to_logical_map
            size = maps.shape[1] // num_ranks
            even = tuple(range(0, size * num_ranks + 1, size))
            return cls(num_experts, tuple(layers), even, maps)
        ranks = [experts_of_rank(num_experts, num_ranks, r, placement) for r in range(num_ranks)]
        bounds = [0]
        for experts in ranks:
            bounds.append(bounds[-1] + len(experts))
        slots = torch.tensor([expert for experts in ranks for expert in experts])
        return cls(num_experts, tuple(layers), tuple(bounds), slots.repeat(len(layers), 1))

    def of_rank(self, rank: int) -> dict[int, list[int]]:
        """Return a rank's experts in the order of its rows, by index of the decoder's layer."""
        held = self.physical_to_logical_map[:, self.bounds[rank] : self.bounds[rank + 1]]
        return dict(zip(self.layers, held.tolist(), strict=True))

    @property
    def num_redundant(self) -> int:
        """Number of slots beyond one for each expert."""
        return self.physical_to_logical_map.shape[1] - self.num_experts

    @property
    def fingerprint(self) -> str:
        """A short text that differs for other maps, also for error messages."""
        described = repr((self.layers, self.bounds, self.physical_to_logical_map.tolist()))
        sizes = "+".join(str(b - a) for a, b in pairwise(self.bounds))
        return f"slots {sizes} of hash {sha256(described.encode()).hexdigest()[:12]}"
