"""Balances the load of ranks while a model runs, or warns that it is uneven.

Legend: T tokens, K experts per token, L MoE layers, E experts (logical), P physical experts in
slots, S slots of a rank, R ranks.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from moezoo.device import HostCopies
from moezoo.parallel.eplb.channels import Channels, Vote
from moezoo.parallel.eplb.movement import experts_received
from moezoo.parallel.eplb.options import EPLB
from moezoo.parallel.eplb.pace import Pace
from moezoo.parallel.eplb.state import EPLBState, ImbalanceWatch, balancedness, rebalanced
from moezoo.parallel.eplb.transfer import Layer, Transfer, Wave, plan_waves
from moezoo.parallel.mesh import Mesh, Pending
from moezoo.parallel.slots import Slots

_log = logging.getLogger(__name__)

WATCHED_STEPS = 100
"""Window and interval, in steps, where load is watched but not balanced."""


WORKED, NAP = 0.5e-3, 10
"""After so many seconds of work the background thread sleeps NAP times as long, since the thread
that launches the model's kernels cannot run while it runs Python."""


@dataclass(frozen=True)
class Plan:
    """The result of a rebalance: the balancedness of an interval's loads, and what is to move."""

    step: int
    balancedness: float
    moved: int
    """Number of experts that ranks receive from others."""
    waves: list[Wave]


class Balancer:
    """Chooses a replica for each expert that a token chose, counts load, and moves experts by it.

    The model calls `begin`, `physical_ids` for each MoE layer and `end_step`, equally often on all
    ranks. Every `step_interval` steps loads are summed over ranks and the policy finds new maps, in
    the background. When all ranks have them, weights travel to staging memory, some layers at a
    time and a piece per step, and all ranks copy them into place, with their maps, at the end of
    the same step. Pieces are small enough to take little of a step's time, as measured on the first
    rank. Without `use_async` all this happens in the step that is due.

    Args:
        slots: the initial placement of experts.
        layers: the tensors [S, ..] of each MoE layer's experts on this rank.
        options: if None or not enabled, experts stay where they are, and load that stays uneven
            gives a `LoadImbalanceWarning`.
        mesh: the ranks; None for a single process.
        num_groups: number of groups of neighbouring experts for the published policy, see
            `rebalance_experts`.
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
            options = EPLB(enabled=False, window_size=WATCHED_STEPS, step_interval=WATCHED_STEPS)
        self._options = options
        self._mesh = None if mesh is None or mesh.ep_size == 1 else mesh
        self._rank, self._num_ranks = (0, 1) if mesh is None else (mesh.ep_rank, mesh.ep_size)
        self._nodes = {"num_groups": num_groups, "num_nodes": 1 if mesh is None else mesh.num_nodes}
        if options.policy == "least_movement":
            self._nodes = {}  # this policy does not know nodes
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
        """A copy of the state's maps on the host."""
        self._bounds = slots.bounds
        self._real: Tensor | None = None
        self._dummy = False
        self._steps = 0
        self._watch = None if options.enabled else ImbalanceWatch()
        self._transfer = Transfer(layers, self._mesh) if options.enabled else None
        self._pace = Pace()
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="moezoo-eplb") if options.use_async else None
        )
        self._plan: Future[Plan] | None = None
        """The plan of the rebalance, until all ranks have it."""
        self._vote: Vote | None = None
        self._waves: deque[Wave] = deque()
        """Waves that are still to be switched; the first one is being sent."""
        self._piece: Pending[list[Tensor]] | None = None
        """The piece that was posted at the end of the step before."""

    def begin(self, real: Tensor | None) -> None:
        """Begin a step; real is bool [T], False at padding, or None without padding."""
        self._real = real

    def physical_ids(self, layer: int, topk_ids: Tensor) -> Tensor:
        """Choose slots int32 [T, K] for topk_ids int [T, K], and count their tokens."""
        return self.state.choose_(layer, topk_ids, self._real)

    def held(self, layer: int) -> list[dict[int, int]]:
        """Return each rank's experts in an MoE layer, as of now, with their rows.

        A replicated expert counts for the first rank only that has it.
        """
        found: set[int] = set()
        ranks = []
        slots = self._maps[layer].tolist()
        for first, stop in pairwise(self._bounds):
            rows = {e: row for row, e in reversed([*enumerate(slots[first:stop])])}
            ranks.append({e: row for e, row in rows.items() if e not in found})
            found.update(rows)
        return ranks

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Return a context whose steps do not count towards the load, such as those of captures."""
        self._dummy = True
        try:
            yield
        finally:
            self._dummy = False

    @torch.inference_mode()
    def end_step(self, *, dummy: bool = False) -> None:
        """End a step; `dummy` if this rank had no tokens in it.

        Raises the error that stopped a rebalance, `RankError` if another rank caused it. Weights
        and maps are then still consistent.
        """
        self.state.end_step_(dummy=dummy or self._dummy)
        self._steps += 1
        self._pace.step()
        if self._plan is None and not self._waves and self.state.is_due:
            self.state.rebalance_begins_()
            loads = HostCopies(self.state.logical_load(), self.state.rank_load())
            self._plan = self._start(partial(self._find, loads, self._steps, self._step_budget()))
        while self._plan is not None or self._waves:
            if self._plan is not None:
                self._agree(self._plan)
            else:
                self._move()
            if self._thread is not None:
                return

    def _step_budget(self) -> float:
        """Return the number of bytes that may be sent at the end of a step."""
        if self._transfer is None or self._thread is None:
            return math.inf  # nothing is sent, or everything at once
        return self._pace.bytes_in_a_share(self._transfer.bytes_per_second())

    def _named(self, doing: str) -> AbstractContextManager[None]:
        return nullcontext() if self._mesh is None else self._mesh.named_faults(doing)

    def _start(self, work: Callable[[], Plan]) -> Future[Plan]:
        if self._thread is not None:
            return self._thread.submit(work)
        done: Future[Plan] = Future()
        done.set_result(work())
        return done

    @torch.inference_mode()
    def _find(self, loads: HostCopies, step: int, in_a_share: float) -> Plan:
        """Find what should move, in pieces of about `in_a_share` bytes; without the GPU."""
        load, rank_load = loads.wait()
        if self._channels is not None:
            with self._named("summing the load of experts"):
                for tensor in (load, rank_load):
                    dist.all_reduce(tensor, group=self._channels.plans)
        found = float(balancedness(rank_load))
        if self._transfer is None:
            return Plan(step, found, 0, [])
        new = self._next_maps(load)
        rest = self._naps()
        planned = plan_waves(self._maps, new, self._num_ranks, between=rest)
        total = self._transfer.bytes_sent(planned)
        size = torch.tensor(self._pace.piece_bytes(in_a_share, total, self._options.step_interval))
        self._take_from_first_rank(size)
        waves = []
        for switches in planned:
            waves.append(self._transfer.wave(switches, int(size)))
            rest()
        moved = int(experts_received(self._maps, new, self._num_ranks).sum())
        return Plan(step, found, moved, waves)

    def _agree(self, plan: Future[Plan]) -> None:
        """Start on the plan in the step in which ranks learn that all of them have it."""
        if self._voted():
            self._plan = None
            self._report(plan.result())
            self._waves.extend(plan.result().waves)
            if self._waves:
                self._move()
            return
        ready = plan.done()
        if ready:
            plan.result()  # raises the error of the background thread
        self._ask(ready)

    def _move(self) -> None:
        """Post the next piece, or switch the layers whose pieces have all arrived; the same on
        every rank."""
        assert self._transfer is not None
        wave = self._waves[0]
        if self._piece is not None:
            self._piece.wait()
            self._piece = None
        if self._voted():
            layers = [switch.layer for switch in wave.switches]
            slots = torch.stack([switch.slots for switch in wave.switches])
            # First, as it may run out of memory: maps and weights are then still consistent.
            self.state.switch_layers_(layers, slots)
            self._transfer.commit_(wave)
            self._maps[layers] = slots
            self._waves.popleft()
        elif wave.pieces:
            self._piece = self._transfer.post(wave, wave.pieces.popleft())
        else:
            # All ranks vote before any of them switches, so that none does if one is gone.
            self._ask(True)

    def _ask(self, yes: bool) -> None:
        group = None if self._channels is None else self._channels.votes
        with self._named("agreeing on a switch of experts"):
            self._vote = Vote(yes, group)

    def _voted(self) -> bool:
        """Return whether all ranks voted yes in the vote under way; False without a vote."""
        vote, self._vote = self._vote, None
        if vote is None:
            return False
        with self._named("agreeing on a switch of experts"):
            return vote.wait()

    def _next_maps(self, load: Tensor) -> Tensor:
        """Return the first rank's new maps, int64 [L, P], for loads [L, E]."""
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
        self._take_from_first_rank(new)
        return new

    def _take_from_first_rank(self, tensor: Tensor) -> None:
        """Overwrite a tensor by the first rank's."""
        if self._channels is not None:
            with self._named("agreeing on the map of experts"):
                dist.broadcast(tensor, group=self._channels.plans, group_src=0)

    def _naps(self) -> Callable[[], None]:
        """Return what the background thread calls between layers, to sleep now and then."""
        if self._thread is None:
            return lambda: None
        began = time.thread_time()

        def rest() -> None:
            nonlocal began
            worked = time.thread_time() - began
            if worked > WORKED:
                time.sleep(NAP * worked)
                began = time.thread_time()

        return rest

    def _report(self, plan: Plan) -> None:
        if self._rank:
            return
        _log.info(
            "step %d: balancedness %.3f over the last %d steps, %d experts move",
            *(plan.step, plan.balancedness),
            *(min(plan.step, self._options.window_size), plan.moved),
        )
        if self._watch is not None:
            self._watch(plan.balancedness)
