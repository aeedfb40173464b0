"""Keeps ranks evenly loaded while a model runs, or says that they are not.

Legend: T tokens, K experts per token, L MoE layers, E experts (logical), P physical experts in
slots, S slots of a rank, R ranks.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from moezoo.parallel.mesh import Mesh
from moezoo.parallel.slots import Slots

_log = logging.getLogger(__name__)

WATCHED_STEPS = 100
"""The window where nothing is balanced."""


@dataclass(frozen=True)
class Report:
    """What an interval's loads were like."""

    step: int
    balancedness: float
    moved: int
    """Experts that ranks get from others."""


class Balancer:
    """Chooses a replica of each expert that a token chose, counts, and moves experts by the counts.

    The model calls `begin`, `physical_ids` for each MoE layer and `end_step`: every rank as often.
    Every `step_interval` steps loads are summed over ranks and the policy finds new maps. Weights
    travel to staging memory, some layers at a time. At a step's end ranks tell each other whether
    theirs are there; if so, each puts them into place with their maps at the end of the next step.
    All but that is done in the background; without `use_async` the step that is due does all.

    Args:
        slots: where experts are to begin with.
        layers: the tensors [S, ..] of each MoE layer's experts on this rank.
        options: None, or those that are not enabled: experts stay where they are, and ranks whose
            load stays uneven make a `LoadImbalanceWarning`.
        mesh: None is a process alone.
        num_groups: of neighbouring experts, for the published policy: see `rebalance_experts`.
    """

    def __init__(
        self,
        slots: Slots,
        layers: Sequence[Layer],
        *,
        options: EPLB | None,
        mesh: Mesh | None = None,
        num_groups: int = 1,
    ) -> None:
        if options is None:
            options = EPLB(enabled=False, window_size=WATCHED_STEPS)
        self._options = options
        self._mesh = None if mesh is None or mesh.ep_size == 1 else mesh
        self._rank, self._num_ranks = (0, 1) if mesh is None else (mesh.ep_rank, mesh.ep_size)
        self._nodes = {"num_groups": num_groups, "num_nodes": 1 if mesh is None else mesh.num_nodes}
        if options.policy == "least_movement":
            self._nodes = {}  # to it all ranks are alike
        self._channels = None if self._mesh is None else Channels.open(self._mesh)
        device = layers[0][0].device
        # Ranks that have the same tokens must choose the same replicas.
        alike = mesh is None or mesh.parallel.dispatch == "all_gather"
        self.state = EPLBState(
            slots.physical_to_logical_map,
            slots.num_experts,
            num_ranks=self._num_ranks,
            bounds=slots.bounds,
            window_size=options.window_size,
            step_interval=options.step_interval,
            seed=0 if alike else self._rank,
            device=device,
        )
        self._maps = slots.physical_to_logical_map.cpu().clone()
        """The state's, for the host."""
        self._real: Tensor | None = None
        self._dummy = False
        self._steps = 0
        self._watch = None if options.enabled else ImbalanceWatch()
        self._transfer: Transfer | None = None
        if options.enabled:
            self._transfer = Transfer(
                layers, None if self._channels is None else self._channels.weights
            )
        self._background = Background(device) if options.use_async else None
        self._task: Future[Report | None] | None = None
        self._vote: Vote | None = None
        self._waves: deque[list[Switch]] = deque()
        """Those of a rebalance that are to come; the first is on its way."""

    def begin(self, real: Tensor | None) -> None:
        """A step begins; real is bool [T], False at padding, or None without any."""
        self._real = real

    def physical_ids(self, layer: int, topk_ids: Tensor) -> Tensor:
        """The slots int32 [T, K] where the tokens of topk_ids int [T, K] go, which are counted."""
        return self.state.choose_(layer, topk_ids, self._real)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Steps within do nobody's work, and their tokens are forgotten at their end."""
        self._dummy = True
        try:
            yield
        finally:
            self._dummy = False

    @torch.inference_mode()
    def end_step(self, *, dummy: bool = False) -> None:
        """A step has ended, on this rank one without tokens if it is a dummy.

        Raises what stopped a rebalance, `RankError` where it was another rank; weights and maps
        then still belong together.
        """
        self.state.end_step_(dummy=dummy or self._dummy)
        self._steps += 1
        if self._task is None and self.state.is_due:
            self.state.rebalance_begins_()
            loads = HostCopies(self.state.logical_load(), self.state.rank_load())
            self._task = self._start(partial(self._plan, loads, self._steps))
        while self._task is not None:
            if self._vote is not None:
                with self._named("agreeing on a switch of experts"):
                    agreed = self._vote.wait()
                self._vote = None
                if agreed:
                    self._task = self._finish(self._task.result())
                    continue
            ready = self._task.done()
            if ready:
                self._task.result()  # raises what went wrong
            group = None if self._channels is None else self._channels.votes
            with self._named("agreeing on a switch of experts"):
                self._vote = Vote(ready, group)
            if self._background is not None:
                return

    def _named(self, doing: str) -> AbstractContextManager[None]:
        return nullcontext() if self._mesh is None else self._mesh.named_faults(doing)

    def _start(self, work: Callable[[], Report | None]) -> Future[Report | None]:
        if self._background is not None:
            return self._background.start(work)
        done: Future[Report | None] = Future()
        done.set_result(work())
        return done

    def _plan(self, loads: HostCopies, step: int) -> Report | None:
        """Find the next maps, and fetch what their first wave needs."""
        load, rank_load = loads.wait()
        if self._channels is not None:
            with self._named("summing the load of experts"):
                for tensor in (load, rank_load):
                    dist.all_reduce(tensor, group=self._channels.plans)
        found = float(balancedness(rank_load))
        if self._transfer is None:
            return Report(step, found, 0)
        new = self._next_maps(load)
        self._waves = deque(plan_waves(self._maps, new, self._num_ranks))
        moved = int(experts_received(self._maps, new, self._num_ranks).sum())
        if self._waves:
            self._fetch()
        return Report(step, found, moved)

    def _next_maps(self, load: Tensor) -> Tensor:
        """int64 [L, P] for loads [L, E]: those that the first rank finds, on every one."""
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
            with self._named("agreeing on the map of experts"):
                dist.broadcast(new, group=self._channels.plans, group_src=0)
        return new

    def _fetch(self) -> None:
        assert self._transfer is not None
        with self._named("moving experts"):
            self._transfer.fetch(self._waves[0])

    def _finish(self, report: Report | None) -> Future[Report | None] | None:
        """Every rank has what it waited for: put it into place, and go on to what comes next."""
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
        return self._start(self._fetch) if self._waves else None

    def _say(self, report: Report) -> None:
        if self._rank:
            return
        _log.info(
            "step %d: balancedness %.3f over the last %d steps, %d experts move",
            *(report.step, report.balancedness),
            *(min(report.step, self._options.window_size), report.moved),
        )
        if self._watch is not None:
            self._watch(report.balancedness)
