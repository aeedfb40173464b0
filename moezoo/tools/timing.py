"""Timing of short launches: CUDA graphs, and several that take turns."""

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

MAX_LAUNCHES = 48
"""In one graph; together they should take GRAPH_SECONDS, so that its own start does not count."""
GRAPH_SECONDS = 2e-3
MIN_REPLAYS = 5
PAUSE = 4.0
"""Before a replay, as a multiple of its length or of the one before, whichever is longer."""

Key = TypeVar("Key", bound=Hashable)


class Graph:
    """One CUDA graph that goes through `calls` in turn, once or several times.

    What they launch must have been compiled. What they read lives as long as the graph. Graphs of
    one pool share memory: the result of one is there until another is replayed.
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
        """Its seconds."""
        return seconds_of(self.graph.replay, on_gpu=True)


class Calls:
    """The same without a GPU."""

    def __init__(self, calls: Sequence[Callable[[], Tensor]]) -> None:
        self.calls, self.launches = calls, len(calls)
        self.seconds = self.replay()

    def replay(self) -> float:
        return seconds_of(self._run, on_gpu=False)

    def _run(self) -> None:
        for call in self.calls:
            self.out = call()


def seconds_of(run: Callable[[], object], *, on_gpu: bool) -> float:
    """Between events around `run`, whose work has ended when this returns; or by the clock."""
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
    """The seconds of replays, for about budget_ms each.

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
    """How often the sets are gone through in a graph, for launches that take about `seconds`."""
    return max(1, min(MAX_LAUNCHES // num_sets, math.ceil(GRAPH_SECONDS / (seconds * num_sets))))


def _replays(seconds: float, budget_ms: float) -> int:
    return max(MIN_REPLAYS, min(50, int(budget_ms * 1e-3 / seconds)))
