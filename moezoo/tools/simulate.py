"""Simulation of how balanced expert-parallel ranks are under recorded or synthetic loads.

A step is a forward pass. Each expert's tokens are split evenly over its replicas, as replica choice
does it, and a pass takes as long as its busiest rank, layer by layer.

Legend: S steps, L MoE layers, E experts (logical), P physical experts in slots, R ranks, N
rebalances.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moezoo.parallel.eplb.movement import experts_received
from moezoo.parallel.eplb.state import balancedness, rebalanced
from moezoo.parallel.placement import initial_map


@dataclass(frozen=True)
class Setting:
    """Setting of a simulation. Without an interval the first, linear map stays."""

    num_ranks: int
    num_redundant: int
    window: int = 1000
    interval: int | None = 3000
    policy: str = "default"


@dataclass(frozen=True)
class Simulation:
    """Result of simulating a setting."""

    setting: Setting
    steps: Tensor
    """Balancedness of each step, fp64 [S]."""
    rebalanced_at: tuple[int, ...]
    """Steps before which the map changed."""
    moved: tuple[float, ...]
    """Share of slots whose expert had to be received from another rank, for each rebalance."""
    num_slots: int
    """Slots of all layers together."""

    @property
    def first_map(self) -> Tensor:
        """Return the balancedness before the first rebalance."""
        return self.steps[: self.rebalanced_at[0] if self.rebalanced_at else None]

    @property
    def settled(self) -> Tensor:
        """Return the balancedness from the first rebalance on, or of all steps if there is none."""
        return self.steps[self.rebalanced_at[0] if self.rebalanced_at else 0 :]


def simulate(loads: Tensor, setting: Setting) -> Simulation:
    """Simulate a setting over loads [S, L, E], the tokens of each expert in each step.

    Rebalances see the `window` steps before them; the first is due after a quarter of the interval,
    the others an interval apart. Raises `ExpertMapError` where the slots do not divide over the
    ranks, ValueError for other invalid settings.
    """
    if loads.ndim != 3 or 0 in loads.shape:
        raise ValueError(f"loads must be [S, L, E], none of them 0, got {list(loads.shape)}")
    if setting.window < 1 or (setting.interval is not None and setting.interval < 1):
        raise ValueError(f"window and interval must be at least 1, got {setting}")
    loads = loads.double()
    num_steps, num_layers, num_experts = loads.shape
    slots = initial_map(num_experts, setting.num_redundant, setting.num_ranks)
    slots = slots.expand(num_layers, -1).clone()
    due = [*rebalances(num_steps, setting.interval), num_steps]
    balance = [balancedness(rank_loads(loads[: due[0]], slots, setting.num_ranks))]
    moved = []
    for start, end in pairwise(due):
        seen = loads[max(0, start - setting.window) : start].sum(0)
        new = rebalanced(seen, slots, num_ranks=setting.num_ranks, policy=setting.policy)
        received = experts_received(slots, new, setting.num_ranks)
        moved.append(float(received.sum()) / slots.numel())
        slots = new
        balance.append(balancedness(rank_loads(loads[start:end], slots, setting.num_ranks)))
    return Simulation(setting, torch.cat(balance), tuple(due[:-1]), tuple(moved), slots.numel())


def rebalances(num_steps: int, interval: int | None) -> list[int]:
    """Return the steps before which a rebalance is due."""
    if interval is None:
        return []
    return list(range(max(1, interval // 4), num_steps, interval))


def rank_loads(loads: Tensor, slots: Tensor, num_ranks: int) -> Tensor:
    """Return the loads of ranks, fp64 [S, L, R], from loads [S, L, E] under one map [L, P].

    An expert's tokens are split evenly over its replicas.
    """
    counts = torch.zeros(loads.shape[1:], dtype=torch.float64)
    counts.scatter_add_(1, slots, torch.ones(slots.shape, dtype=torch.float64))
    of_slot = (loads / counts).gather(2, slots.expand(len(loads), -1, -1))
    return of_slot.unflatten(-1, (num_ranks, -1)).sum(-1)


def zipf_loads(
    num_steps: int,
    num_layers: int,
    num_experts: int,
    *,
    exponent: float = 1.0,
    half_life: float | None = None,
    tokens: int = 32768,
    seed: int = 0,
) -> Tensor:
    """Return synthetic loads by Zipf's law, fp64 [S, L, E], whose popular experts change over time.

    An expert that a share u of all experts surpasses gets a load of (E u + 1/2) ** -exponent, about
    what the expert of that rank has. How popular it is follows a normal score that drifts without
    jumps: after `half_life` steps it correlates with what it was by 1/2; None keeps it. A step has
    `tokens` routed ones in a layer (a token counts for each expert that it goes to), with the
    scatter of random draws.
    """
    if half_life is not None and not half_life > 0:
        raise ValueError(f"half_life must be positive, got {half_life}")
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(num_layers, num_experts, generator=generator, dtype=torch.float64)

    # To begin with each rank is taken once, in random order.
    order = torch.rand(num_layers, num_experts, generator=generator).argsort(1)
    score = torch.special.ndtri((order.double() + 0.5) / num_experts)
    keep = 1.0 if half_life is None else 0.5 ** (1 / half_life)
    steps = []
    for _ in range(num_steps):
        surpassed_by = torch.special.ndtr(-score)
        expected = (num_experts * surpassed_by + 0.5) ** -exponent
        expected *= tokens / expected.sum(1, keepdim=True)
        steps.append((expected + expected.sqrt() * normal()).round().clamp(min=0))
        score = keep * score + math.sqrt(1 - keep**2) * normal()
    return torch.stack(steps)
