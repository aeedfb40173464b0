"""The processes of a benchmark: their groups, agreements and shared clocks.

One job of all GPUs measures every number of ranks: with 4 processes, Parallel(2) makes two groups
of two, which work at the same time.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

import moezoo
import moezoo.loaders.expert_parallel
from moezoo import Parallel
from moezoo.causal_lm import MoECausalLM
from moezoo.parallel.mesh import Mesh, join
from moezoo.parallel.placement import Placement
from moezoo.parallel.sharding import dispatcher_of, slots_of

Row = dict[str, Any]
PATIENCE = timedelta(seconds=60)
"""Seconds until ranks that do not reach the end of a section are given up."""


class Job:
    """This process's view of the job.

    `left` are the seconds until the section at work has to end. `small` is for a CPU, where every
    section is gone through with models of a few kilobytes, to try it out.
    """

    def __init__(self, device: torch.device, *, small: bool, seconds: float) -> None:
        self.device = device
        self.small = small
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.on_gpu = device.type == "cuda"
        self._end = time.perf_counter() + seconds
        self._hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._meshes: dict[int, Mesh] = {}
        # Communicators take memory of the GPU for good: one for each number of ranks is enough.
        moezoo.loaders.expert_parallel.join = self._join

    @property
    def sizes(self) -> list[int]:
        """Return the sizes of expert groups: 1, 2, 4, .. as far as they divide the job."""
        return [n for n in (1, 2, 4, 8) if self.world_size % n == 0]

    def mesh(self, size: int, **options: Any) -> Mesh:
        return self._join(self.parallel(size, **options))

    def parallel(self, size: int, **options: Any) -> Parallel:
        return Parallel(size, timeout=300, **options)

    def _join(self, parallel: Parallel, device: object = None) -> Mesh:
        size = parallel.expert_parallel_size
        if size not in self._meshes:
            self._meshes[size] = join(self.parallel(size), self.device)
        mesh = copy(self._meshes[size])
        mesh.parallel = parallel
        return mesh

    def make(
        self, config: PreTrainedConfig, size: int = 0, *, eplb: Any = None, **options: Any
    ) -> MoECausalLM:
        """Make a model with random weights, the same on all ranks, whole or over `size` ranks."""
        quantization = options.pop("quantization", None)
        dtype = options.pop("dtype", torch.bfloat16)
        torch.manual_seed(0)
        return moezoo.from_config(
            config,
            dtype=dtype,
            device=self.device,
            quantization=quantization,
            parallel=self.parallel(size, **options) if size else None,
            eplb=eplb,
        )

    def redispatch(self, model: MoECausalLM, **options: Any) -> None:
        """Change the options of `Parallel` by which tokens of a divided model travel."""
        assert model.mesh is not None
        mesh = copy(model.mesh)
        mesh.parallel = replace(mesh.parallel, **options)
        dispatcher = dispatcher_of(mesh, slots_of(model.decoder, model.mesh, None))
        model.decoder.dispatcher = dispatcher
        for moe in model.decoder.moe_layers.values():
            moe.dispatcher = dispatcher

    def placement_file(self, name: str, placement: Placement) -> Path:
        """Return one placement file for all ranks."""
        file = Path(gettempdir()) / f"moezoo-placement-{name}.json"
        if self.rank == 0:
            placement.save(file)
        self.together()
        return file

    @contextmanager
    def until(self, seconds: float) -> Iterator[None]:
        """Limit the block to the given seconds."""
        whole = self._end
        self._end = min(whole, time.perf_counter() + seconds)
        try:
            yield
        finally:
            self._end = whole

    @property
    def left(self) -> float:
        return self._end - time.perf_counter()

    def has(self, seconds: float) -> bool:
        """Whether rank 0 has that much time left; all ranks get the same answer."""
        flag = torch.tensor([self.left >= seconds], dtype=torch.int32, device=self.device)
        dist.broadcast(flag, 0)
        return bool(flag.item())

    def succeeded(self, error: str | None) -> list[str]:
        """Return the errors of all ranks in a section that every rank has left."""
        found: list[str | None] = [None] * self.world_size
        dist.all_gather_object(found, error, group=self._hosts)
        return [text for text in found if text is not None]

    def largest(self, number: float) -> float:
        """Return the largest value of all ranks."""
        own = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(own, dist.ReduceOp.MAX)
        return own.item()

    def difference(self, actual: Tensor, expected: Tensor) -> float:
        """Return the relative difference, the largest of all ranks."""
        return self.largest(((actual - expected).norm() / expected.norm()).item())

    def same(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0)
        return tensor

    def together(self) -> None:
        dist.barrier()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Free memory that nothing uses any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        """Return the seconds of one of several successive calls, on this rank."""
        if not self.on_gpu:
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - begin) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls

    def mark(self) -> Any:
        """Return a point in time: on a GPU, when all that was launched has ended."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, marks: list[Any]) -> Tensor:
        """Return the seconds from each mark to the next, fp64, on the slowest rank."""
        self.synchronize()
        pairs = itertools.pairwise(marks)
        if self.on_gpu:
            times = [1e-3 * first.elapsed_time(second) for first, second in pairs]
        else:
            times = [second - first for first, second in pairs]
        return self.slowest(torch.tensor(times, dtype=torch.float64))

    def slowest(self, times: Tensor) -> Tensor:
        """Return for each of the times [n] the largest of all ranks."""
        times = times.to(self.device)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        return times.cpu()

    def median(self, run: Callable[[], object], *, repeats: int = 3, calls: int = 4) -> float:
        """Return the median seconds of a call on the slowest rank."""
        (seconds,) = self.alternately({"": run}, repeats=repeats, calls=calls).values()
        return seconds

    def alternately(
        self, runs: dict[str, Callable[[], object]], *, repeats: int = 5, calls: int = 4
    ) -> dict[str, float]:
        """Return the median seconds of each call on the slowest rank.

        The calls take turns in each round, so that a GPU that gets warm is as warm for all.
        """
        repeats, calls = (1, 1) if self.small else (repeats, calls)
        for run in runs.values():
            run()
        self.synchronize()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                self.together()
                times[name].append(self.seconds(run, calls))
        return {name: self.largest(statistics.median(taken)) for name, taken in times.items()}

    def recorded(self, run: Callable[[], object], launches: int) -> Callable[[], object]:
        """Return a CUDA graph of that many launches; on a CPU a function that makes the calls."""
        with torch.inference_mode():
            for _ in range(2):
                run()
            if not self.on_gpu:
                return lambda: [run() for _ in range(launches)]
            graph = torch.cuda.CUDAGraph()
            # The threads that watch over collectives ask for events meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for _ in range(launches):
                    run()
        return graph.replay

    def replayed(self, run: Callable[[], object], launches: int = 20) -> float:
        """Return the seconds of one of many launches in a CUDA graph."""
        launches = 1 if self.small else launches
        return self.median(self.recorded(run, launches), calls=1) / launches

    def wire_bytes_per_second(self, size: int, nbytes: int = 1 << 28) -> float:
        """Return the bytes per second that a rank sends to its group while it receives as many."""
        nbytes = 1 << 16 if self.small else nbytes
        mesh = self.mesh(size)
        rows = torch.randn(size, nbytes // 4 // size, device=self.device)
        run = lambda: mesh.all_to_all(rows, "measuring the wire").wait()  # noqa: E731
        return nbytes * (size - 1) / size / self.median(run)
