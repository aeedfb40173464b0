"""Keeps ranks evenly loaded while a model runs, or says that they are not.

Legend: T tokens, K experts per token, L MoE layers, E experts (logical), P physical experts in
slots, R ranks.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moezoo.device import HostCopies
from moezoo.parallel.eplb.background import Background
from moezoo.parallel.eplb.channels import Channels, Vote
from moezoo.parallel.eplb.movement import experts_received
from moezoo.parallel.eplb.options import EPLB
from moezoo.parallel.eplb.state import EPLBState, ImbalanceWatch, balancedness, rebalanced
from moezoo.parallel.eplb.transfer import Layer, Switch, Transfer, plan_waves

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What a rebalance found."""

    step: int
    balancedness: float
    moved: int
    """Experts that ranks get from others."""


class Balancer:
    """Chooses a replica of each expert that a token chose, counts, and moves experts by the counts.

    The model calls `begin`, `physical_ids` for each MoE layer and `end_step`, on every rank as
    often. Every `step_interval` steps loads are summed over ranks and the policy finds new maps;
    weights travel to staging memory, some layers at a time; once all ranks have theirs, which they
    tell each other at a step's end, each puts them into place with their maps at the end of the
    next. All of that but the last is done by a thread in the background; without `use_async` the
    step that is due waits for the whole.

    Args:
        physical_to_logical_map: int64 [L, P] to begin with, the same on every rank.
        layers: the tensors [P / R, ..] of each MoE layer's experts on this rank.
        channels: of the R ranks; None is a process alone.
        replicated: every rank has all tokens, and so must choose the same replicas.
        num_groups: of neighbouring experts, and `num_nodes` of ranks: see `rebalance_experts`.
    """

    def __init__(
        self,
        physical_to_logical_map: Tensor,
        num_experts: int,
        layers: Sequence[Layer],
        *,
        options: EPLB,
        channels: Channels | None = None,
        replicated: bool = False,
        num_groups: int = 1,
        num_nodes: int = 1,
    ) -> None:
        self._options = options
        self._channels = channels
        self._rank, self._num_ranks = 0, 1
        if channels is not None:
            self._rank, self._num_ranks = channels.votes.rank(), channels.votes.size()
        self._nodes = {"num_groups": num_groups, "num_nodes": num_nodes}
        self._device = layers[0][0].device
        self.state = EPLBState(
            physical_to_logical_map,
            num_experts,
            num_ranks=self._num_ranks,
            window_size=options.window_size,
            step_interval=options.step_interval,
            seed=0 if replicated else self._rank,
            device=self._device,
        )
        self._maps = self.state.physical_to_logical_map.cpu().clone()
        """The state's, for the host."""
        self._real: Tensor | None = None
        self._steps = 0
        self._transfer: Transfer | None = None
        self._watch: ImbalanceWatch | None = None
        if options.enabled:
            self._transfer = Transfer(layers, None if channels is None else channels.weights)
        else:
            self._watch = ImbalanceWatch()
        self._background = Background(self._device) if options.use_async else None
        self._task: Future[Report | None] | None = None
        self._vote: Vote | None = None
        self._waves: deque[list[Switch]] = deque()
        """Those to come of a rebalance; the first is on its way."""

    def begin(self, real: Tensor | None) -> None:
        """A step begins; real is bool [T], False at padding, or None without any."""
        self._real = real

    def physical_ids(self, layer: int, topk_ids: Tensor) -> Tensor:
        """The slots int32 [T, K] where the tokens of topk_ids int [T, K] go, which are counted."""
        return self.state.choose_(layer, topk_ids, self._real)

    @torch.inference_mode()
    def end_step(self, *, dummy: bool = False) -> None:
        """A step has ended, on this rank one without tokens if it is a dummy.

        Raises what stopped a rebalance; maps and weights are then those of the last step.
        """
        self.state.end_step_(dummy=dummy)
        self._steps += 1
        if self._task is None and self.state.is_due:
            self.state.rebalance_begins_()
            loads = HostCopies(self.state.logical_load(), self.state.rank_load())
            self._task = self._start(partial(self._plan, loads, self._steps))
        while self._task is not None:
            if self._vote is not None:
                agreed = self._vote.wait()
                self._vote = None
                if agreed:
                    self._task = self._finish(self._task.result())
                    continue
            if self._task.done():
                self._task.result()  # raises what went wrong
            self._vote = Vote(self._task.done(), self._channels and self._channels.votes)
            if self._background is not None:
                return

    def _start(self, work: Callable[[], Report | None]) -> Future[Report | None]:
        if self._background is not None:
            return self._background.start(work)
        done: Future[Report | None] = Future()
        done.set_result(work())
        return done

    def _plan(self, loads: HostCopies, step: int) -> Report | None:
        """Find the next maps, and fetch what the first wave needs."""
        load, rank_load = loads.wait()
        if self._channels is not None:
            for tensor in (load, rank_load):
                dist.all_reduce(tensor, group=self._channels.plans)
        found = float(balancedness(rank_load))
        if self._transfer is None:
            return Report(step, found, 0)
        new = self._next_maps(load)
        self._waves = deque(plan_waves(self._maps, new, self._num_ranks))
        moved = int(experts_received(self._maps, new, self._num_ranks).sum())
        if self._waves:
            self._transfer.fetch(self._waves[0])
        return Report(step, found, moved)

    def _next_maps(self, load: Tensor) -> Tensor:
        """int64 [L, P] for loads [L, E]; those of the first rank, on every one."""
        new = self._maps.clone()
        if self._rank == 0:
            found = rebalanced(
                load,
                self._maps,
                num_ranks=self._num_ranks,
                policy=self._options.policy,
                **self._nodes,
            )
            loaded = load.sum(1) > 0
            new[loaded] = found[loaded]
        if self._channels is not None:
            dist.broadcast(new, group=self._channels.plans, group_src=0)
        return new

    def _finish(self, report: Report | None) -> Future[Report | None] | None:
        """All ranks have what was asked for: put it into place, and ask for what comes next."""
        if report is not None:
            self._say(report)
        if not self._waves:
            return None
        assert self._transfer is not None
        wave = self._waves.popleft()
        self._transfer.commit_(wave)
        for switch in wave:
            self.state.switch_layer_(switch.layer, switch.slots)
            self._maps[switch.layer] = switch.slots
        if not self._waves:
            return None
        return self._start(partial(self._transfer.fetch, self._waves[0]))

    def _say(self, report: Report) -> None:
        if self._rank == 0:
            _log.info(
                "step %d: balancedness %.3f over the last %d steps, %d experts move",
                *(report.step, report.balancedness),
                *(min(report.step, self._options.window_size), report.moved),
            )
        if self._watch is not None and self._rank == 0:
            self._watch(report.balancedness)
