"""`EPLB`: the user's options for expert-parallel load balancing."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Union

from moezoo.errors import ExpertMapError
from moezoo.parallel.eplb.state import POLICIES
from moezoo.parallel.placement import (
    STRATEGIES,
    Placement,
    Strategy,
    initial_map,
    is_strategy,
)
from moezoo.parallel.slots import Slots


@dataclass(frozen=True)
class EPLB:
    """Expert-parallel load balancing: busy experts are replicated, and experts change ranks.

    * `enabled`: False keeps every expert, replicas included, where it is at the start.
    * `num_redundant_experts`: number of slots of each MoE layer, on all ranks together, beyond one
      for each expert. The sum of both must divide over the ranks. A placement file has its own.
    * `window_size`: number of past steps whose loads decide. `step_interval`: steps between
      rebalances; the first comes after a quarter of it.
    * `use_async`: weights travel while the model runs; otherwise the model waits for them.
    * `expert_placement_strategy`: the initial layout, "linear", "round_robin", or a list of experts
      for each rank, replicas included; by default `Parallel.placement`, which it overrides.
    * `placement`: a file of `moezoo eplb plan`, or a `Placement`, to start with instead.
    * `policy`: "default" is the published algorithm, "least_movement" moves far fewer experts.

    Raises `ValueError` for unknown values, and for options that exclude each other.
    """

    enabled: bool = True
    num_redundant_experts: int = 0
    window_size: int = 1000
    step_interval: int = 3000
    use_async: bool = True
    expert_placement_strategy: Strategy | None = None
    placement: str | os.PathLike[str] | Placement | None = None
    policy: str = "default"

    def __post_init__(self) -> None:
        for name in ("enabled", "use_async"):
            value = getattr(self, name)
            if type(value) is not bool:
                raise ValueError(f"eplb: {name} is {value!r}, expected True or False")
        for name, least in (("num_redundant_experts", 0), ("window_size", 1), ("step_interval", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"eplb: {name} is {value!r}, expected a whole number, {least} or more"
                )
        if self.policy not in POLICIES:
            raise ValueError(
                f"eplb: policy is {self.policy!r}, expected {' or '.join(map(repr, POLICIES))}"
            )
        strategy, placement = self.expert_placement_strategy, self.placement
        if not (strategy is None or is_strategy(strategy)):
            raise ValueError(
                f"eplb: expert_placement_strategy is {strategy!r}, expected "
                f"{' or '.join(map(repr, STRATEGIES))}, or a list of experts for each rank"
            )
        if not (placement is None or isinstance(placement, str | os.PathLike | Placement)):
            raise ValueError(
                f"eplb: placement is {placement!r}, expected a file that moezoo eplb plan wrote"
            )
        if strategy is not None and placement is not None:
            raise ValueError(
                f"eplb: expert_placement_strategy={strategy!r} and placement={placement!r} both "
                "say where experts are to begin with: give one"
            )

    @classmethod
    def of(cls, eplb: Union[Mapping[str, object], "EPLB", None]) -> Union["EPLB", None]:
        """Return the options that a user gave as `eplb`: a dict of fields, an `EPLB`, or None.

        Raises `ValueError` for anything else, and for an unknown key.
        """
        if eplb is None or isinstance(eplb, EPLB):
            return eplb
        if not isinstance(eplb, Mapping):
            raise ValueError(
                f"eplb is {eplb!r}, expected a dict such as {{'num_redundant_experts': 16}}, or a "
                "moezoo.EPLB"
            )
        known = [field.name for field in fields(cls)]
        for key in eplb:
            if key not in known:
                raise ValueError(f"eplb has no {key!r}, expected some of {', '.join(known)}")
        return cls(**eplb)  # type: ignore[arg-type]

    def slots(
        self,
        num_experts: int,
        layers: Sequence[int],
        num_ranks: int,
        otherwise: Strategy | os.PathLike[str],
    ) -> Slots:
        """Return the initial slots of experts.

        `layers` are the indices of the decoder's MoE layers; `otherwise` is `Parallel.placement`,
        which applies where these options name none.

        Raises `ExpertMapError` for numbers that do not divide, and a placement that is not for
        such a model; `OSError` where its file cannot be read.
        """
        given = self.expert_placement_strategy if self.placement is None else self.placement
        chosen = otherwise if given is None else given
        if is_strategy(chosen) and (self.enabled or self.num_redundant_experts):
            first = initial_map(num_experts, self.num_redundant_experts, num_ranks, chosen)
            maps = first.repeat(len(layers), 1)
            chosen = Placement(num_experts, num_ranks, tuple(layers), maps)
        slots = Slots.of(chosen, num_experts, layers, num_ranks)
        if self.num_redundant_experts not in (0, slots.num_redundant):
            raise ExpertMapError(
                f"num_redundant_experts={self.num_redundant_experts} is asked for, and the "
                f"placement has {slots.num_redundant}; leave it out to take them"
            )
        return slots
