"""Placements for recorded loads, and simulations that compare ways to balance experts.

Legend: S steps, L MoE layers, E experts, R ranks.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from moezoo.errors import ExpertMapError
from moezoo.parallel.eplb import balancedness, rebalanced
from moezoo.parallel.placement import Placement, initial_map
from moezoo.tools.routing import RoutingTrace
from moezoo.tools.simulate import Setting, Simulation, rank_loads, simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plan:
    """A placement of experts, and how balanced it makes the loads it was computed from."""

    placement: Placement
    linear: float
    """Balancedness of each expert once, in order; NaN if experts do not divide over the ranks."""
    planned: float


def plan(
    trace: RoutingTrace,
    num_ranks: int,
    num_redundant: int,
    *,
    policy: str = "default",
    num_groups: int = 1,
    num_nodes: int = 1,
) -> Plan:
    """Compute a placement of a recorded model's experts for its recorded loads.

    Raises ExpertMapError or ValueError for numbers that do not divide, and a trace without tokens.
    """
    if num_groups % num_nodes:
        raise ValueError(
            f"{num_groups} groups of experts do not divide over {num_nodes} nodes; without groups "
            "give one node"
        )
    load = trace.expert_load
    num_layers, num_experts = load.shape
    if not load.sum():
        raise ValueError("the trace has no tokens: there is nothing to plan for")
    first = initial_map(num_experts, num_redundant, num_ranks).expand(num_layers, -1)
    slots = rebalanced(
        load,
        first,
        num_ranks=num_ranks,
        policy=policy,
        num_groups=num_groups,
        num_nodes=num_nodes,
    )

    def balance(slots: Tensor) -> float:
        return float(balancedness(rank_loads(load[None], slots, num_ranks))[0])

    linear = float("nan")
    if num_experts % num_ranks == 0:
        linear = balance(initial_map(num_experts, 0, num_ranks).expand(num_layers, -1))
    placement = Placement(num_experts, num_ranks, trace.layers, slots)
    return Plan(placement, linear, balance(slots))


@dataclass(frozen=True)
class Comparison:
    """Results of simulations over the same loads."""

    simulations: tuple[Simulation, ...]
    skipped: tuple[str, ...]
    """Reasons why settings were left out."""
    expert_bytes: int | None = None
    """Bytes of one expert in one layer; None if unknown."""
    loads: Mapping[str, Any] = field(default_factory=dict)
    """Description of where the loads come from."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of the table as types that JSON has."""
        rows = []
        for simulation in self.simulations:
            settled = simulation.settled
            row = asdict(simulation.setting) | {
                "balancedness": float(settled.mean()),
                "balancedness_lowest": float(settled.min()),
                "balancedness_of_the_first_map": float(simulation.first_map.mean()),
                "balancedness_after_each_rebalance": [
                    float(simulation.steps[step]) for step in simulation.rebalanced_at
                ],
                "rebalances": len(simulation.rebalanced_at),
                "moved": list(simulation.moved),
            }
            if self.expert_bytes is not None:
                each = self.expert_bytes * simulation.num_slots
                row["moved_bytes"] = [round(moved * each) for moved in simulation.moved]
            rows.append(row)
        return {"loads": dict(self.loads), "simulations": rows, "skipped": list(self.skipped)}

    def __rich__(self) -> Table:
        caption = "first, later: experts received by a rebalance, of all slots"
        if self.expert_bytes is not None:
            caption += f"; an expert has {self.expert_bytes:,} bytes"
        table = Table(
            title="Balancedness (mean rank load over highest) from the first rebalance on"
            if any(simulation.moved for simulation in self.simulations)
            else "Balancedness (mean rank load over highest), without a rebalance",
            caption=caption,
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        for name in ("GPUs", "copies", "every", "window"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("policy", no_wrap=True)
        for name in ("mean", "lowest", "first", "later"):
            table.add_column(name, justify="right", no_wrap=True)
        for simulation in self.simulations:
            setting, settled, moved = simulation.setting, simulation.settled, simulation.moved
            never = setting.interval is None
            table.add_row(
                str(setting.num_ranks),
                str(setting.num_redundant),
                "never" if never else str(setting.interval),
                "" if never else str(setting.window),
                "" if never else setting.policy,
                f"{settled.mean():.3f}",
                f"{settled.min():.3f}",
                f"{moved[0]:.0%}" if moved else "" if never else "none",
                f"{sum(moved[1:]) / len(moved[1:]):.1%}" if moved[1:] else "",
            )
        return table

    def plot(self) -> "Figure":
        """Return a matplotlib figure of the balancedness of each setting, step by step."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 1 + 3 * len(self._panels())), layout="constrained")
        axes = figure.subplots(len(self._panels()), 1, squeeze=False, sharex=True)[:, 0]
        for ax, ((ranks, redundant), simulations) in zip(axes, self._panels().items(), strict=True):
            for simulation in simulations:
                setting = simulation.setting
                label = "never rebalanced"
                if setting.interval is not None:
                    label = f"{setting.policy}, every {setting.interval}, window {setting.window}"
                ax.plot(simulation.steps.numpy(), label=label, linewidth=0.8)
            ax.set(ylabel="balancedness", ylim=(0, 1.02))
            ax.set_title(f"{ranks} GPUs, {redundant} redundant experts")
            ax.grid(alpha=0.3)
            ax.legend(fontsize="small", loc="lower right")
        axes[-1].set_xlabel("step")
        return figure

    def _panels(self) -> dict[tuple[int, int], list[Simulation]]:
        panels: dict[tuple[int, int], list[Simulation]] = {}
        for simulation in self.simulations:
            key = simulation.setting.num_ranks, simulation.setting.num_redundant
            panels.setdefault(key, []).append(simulation)
        return panels


def compare(
    loads: Tensor,
    *,
    num_ranks: Iterable[int],
    num_redundant: Iterable[int],
    windows: Sequence[int] | None,
    intervals: Sequence[int],
    policies: Iterable[str],
    expert_bytes: int | None = None,
) -> Comparison:
    """Simulate every combination of settings over loads [S, L, E].

    Each number of ranks and of redundant experts is simulated without rebalances too. Windows are
    by default as long as the interval. Settings whose experts do not divide over the ranks are left
    out. Raises ValueError for invalid settings, or if none is left.
    """
    ways: list[tuple[int, int, str] | None] = [None]
    for interval, policy in product(intervals, policies):
        ways += [(window, interval, policy) for window in windows or [interval]]
    simulations, skipped = [], []
    for ranks, redundant in product(num_ranks, num_redundant):
        try:
            initial_map(loads.shape[-1], redundant, ranks)
        except ExpertMapError as error:
            skipped.append(str(error).removeprefix("Expert map mismatch: "))
            continue
        for way in ways:
            if way is None:
                setting = Setting(ranks, redundant, interval=None)
            else:
                setting = Setting(ranks, redundant, *way)
            simulations.append(simulate(loads, setting))
    if not simulations:
        raise ValueError("nothing to simulate: " + "; ".join(skipped))
    return Comparison(tuple(simulations), tuple(skipped), expert_bytes)


def read_history(path: str | os.PathLike[str]) -> tuple[Tensor, RoutingTrace]:
    """Return the loads [S, L, E] of a trace's forward passes, and the trace.

    Raises ValueError for a file that is not a trace, or has a single pass.
    """
    trace = RoutingTrace.load(path)
    loads = trace.load_history
    if len(loads) < 2:
        raise ValueError(
            f"{path} has {len(loads)} forward passes; record more prompts, or let them go on "
            "(--max-new-tokens)"
        )
    return loads, trace
