"""Timing of short launches by CUDA graphs whose replays take turns."""

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

MAX_LAUNCHES = 48
"""Most launches in one graph; they should take GRAPH_SECONDS, so that its start does not count."""
GRAPH_SECONDS = 2e-3
MIN_REPLAYS = 5
PAUSE = 4.0
"""Pause before a replay, as a multiple of the longer of that replay and the one before."""

Key = TypeVar("Key", bound=Hashable)


class Graph:
    """A CUDA graph of `calls` in turn, once or several times.

    Their kernels must have been compiled. What they read is kept alive by the graph. Graphs of one
    pool share memory: the result of one is valid until another is replayed.
    """

    def __init__(self, calls: Sequence[Callable[[], Tensor]], pool: Any = None) -> None:
        self.calls, self.pool = calls, pool
        self._capture(1)
        rounds = _rounds(self.seconds / len(calls), len(calls))
        if rounds > 1:
            self._capture(rounds)
        self.launches = rounds * len(calls)

    def _capture(self, rounds: int) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            for call in [*self.calls] * rounds:
                # One result at a time, so that a graph needs no more memory than a launch.
                self.out = call()
        # A pool ends with its last graph, so the one before goes only now.
        self.graph = graph
        self.replay()
        self.seconds = self.replay()

    def replay(self) -> float:
        """Replay the graph and return the seconds it took."""
        return seconds_of(self.graph.replay, on_gpu=True)


class Calls:
    """`calls` in turn without a GPU, timed by the clock."""

    def __init__(self, calls: Sequence[Callable[[], Tensor]]) -> None:
        self.calls, self.launches = calls, len(calls)
        self.seconds = self.replay()

    def replay(self) -> float:
        return seconds_of(self._run, on_gpu=False)

    def _run(self) -> None:
        for call in self.calls:
            self.out = call()


def seconds_of(run: Callable[[], object], *, on_gpu: bool) -> float:
    """Return the seconds of `run` and the work that it queues: by CUDA events, or by the clock."""
    if not on_gpu:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def in_turns(timed: Mapping[Key, Graph | Calls], budget_ms: float) -> dict[Key, list[float]]:
    """Return the seconds of the replays of each graph, about budget_ms in all for each.

    A GPU lowers its clock where products draw more power than it may, and stays there for a while:
    on an H100 a kernel takes up to a fifth longer after one that drew much than after one that did
    not. So the replays take turns, each after a pause.
    """
    turns = {key: _replays(each.seconds, budget_ms) for key, each in timed.items()}
    samples: dict[Key, list[float]] = {key: [] for key in timed}
    before = 0.0
    for turn in range(max(turns.values(), default=0)):
        for key, each in timed.items():
            if turn < turns[key]:
                if isinstance(each, Graph):
                    time.sleep(PAUSE * max(before, each.seconds))
                before = each.replay()
                samples[key].append(before)
    return samples


def _rounds(seconds: float, num_sets: int) -> int:
    """Return how often a graph cycles through the sets, for launches of about `seconds`."""
    return max(1, min(MAX_LAUNCHES // num_sets, math.ceil(GRAPH_SECONDS / (seconds * num_sets))))


def _replays(seconds: float, budget_ms: float) -> int:
    return max(MIN_REPLAYS, min(50, int(budget_ms * 1e-3 / seconds)))
