"""The ranks of a job, their process groups, and the collectives between them.

Legend: R ranks of an expert group.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from moezoo.device import device_of
from moezoo.errors import ExpertMapError, RankError
from moezoo.parallel.faults import RankWatch
from moezoo.parallel.placement import STRATEGIES, is_strategy
from moezoo.version import __version__

# Its name in torch 2.13, which warns of the one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_START = 300.0
"""Seconds within which all ranks must have started: imports are slow where many read one disk."""

DISPATCHES = ("all_to_all", "all_gather")


@dataclass(frozen=True)
class Parallel:
    """How experts are divided over the processes that torchrun started.

    Args:
        expert_parallel_size: ranks that share one set of experts. With more processes than that,
            there are several such groups, replicas of each other: ranks 0 to n - 1, then the next.
        placement: "linear" gives a rank neighbours, "round_robin" every n-th expert; or the experts
            of each rank, or the path of a placement file.
        dispatch: "all_to_all": each rank has tokens of its own, and sends each of them to the ranks
            that have experts of it. "all_gather": all ranks of a group have the same tokens, and
            each works on its experts' share of them.
        timeout: seconds after which ranks that wait for one that died or hangs raise `RankError`.
        capacity: for "all_to_all", the most tokens of a rank in a forward pass: buffers are then of
            this size always, the host waits for no counts, and a step can be captured.
        chunks: parts in which the tokens of a layer travel, each while experts work on another.
        wire: "model" sends tokens in the model's dtype, "fp8" to experts in block fp8 with a scale
            for 128 numbers ("all_to_all").

    Raises ValueError for what is none of these.
    """

    expert_parallel_size: int
    placement: str | os.PathLike[str] | Sequence[Sequence[int]] = "linear"
    dispatch: str = "all_to_all"
    timeout: float = 60.0
    capacity: int | None = None
    chunks: int = 1
    wire: str = "model"
    all2all_backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("expert_parallel_size", "capacity", "chunks"):
            value = getattr(self, name)
            if not (value is None and name == "capacity") and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}, expected a whole number above 0")
        for name, known in (("dispatch", DISPATCHES), ("wire", ("model", "fp8"))):
            if getattr(self, name) not in known:
                expected = " or ".join(map(repr, known))
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")
        if not isinstance(self.timeout, int | float) or not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout is {self.timeout!r}, expected seconds above 0")
        if self.dispatch == "all_gather":
            for name, unset in (("capacity", None), ("wire", "model")):
                if getattr(self, name) != unset:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is for dispatch='all_to_all': with "
                        "'all_gather' no tokens travel, and no host waits"
                    )
        if self.capacity is not None and self.chunks > 1:
            raise ValueError(
                "capacity and chunks exclude each other: few tokens travel in one part"
            )
        if self.all2all_backend is not None:
            raise ValueError(
                f"all2all_backend={self.all2all_backend!r} is not in this release: tokens travel "
                "through torch.distributed; leave it None"
            )
        if not isinstance(self.placement, str | os.PathLike):
            if not is_strategy(self.placement):
                named = " or ".join(map(repr, STRATEGIES))
                raise ValueError(
                    f"placement is {self.placement!r}, expected {named}, a list of experts for "
                    "each rank, or the path of a placement file"
                )
            ranks = tuple(tuple(experts) for experts in self.placement)
            object.__setattr__(self, "placement", ranks)

    @property
    def placement_file(self) -> str | None:
        """The path of the placement file, or None."""
        if isinstance(self.placement, str | os.PathLike) and self.placement not in STRATEGIES:
            return os.fspath(self.placement)
        return None


class Mesh:
    """This process's place among the ranks of the job, and its collectives. Made by `join`.

    `rank` is the place in the job. `group_ranks` are the job's ranks in this rank's expert group,
    and `ep_rank` is its place among them; `group` is their process group, and `hosts` another one
    that does not go through GPUs. `num_nodes` is the number of hosts over which an expert group is
    divided evenly, 1 where it is not.
    """

    def __init__(self, parallel: Parallel, device: torch.device) -> None:
        self.parallel = parallel
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.ep_size = parallel.expert_parallel_size
        self.ep_rank = self.rank % self.ep_size
        first = self.rank - self.ep_rank
        self.group_ranks = range(first, first + self.ep_size)
        on_host = _int("LOCAL_WORLD_SIZE", self.world_size)
        self.num_nodes = self.ep_size // on_host if self.ep_size % on_host == 0 else 1
        store = _get_default_store()
        # Ranks make their meshes in the same order, so the numbers agree.
        number = store.add(f"moezoo/meshes/{self.rank}", 1)
        own = PrefixStore(f"moezoo/{number}", store.clone())  # type: ignore[attr-defined]
        self.watch = RankWatch(own, self.rank, self.world_size, timeout=parallel.timeout)
        self.agree(
            {"moezoo": __version__, "torch": torch.__version__, "device": device.type}
            | {f"Parallel.{f.name}": getattr(parallel, f.name) for f in fields(parallel)}
        )
        # A rank that went on and failed before all had connected to it would fail them here.
        doing = "making the process groups"
        with self.together(doing), self.watch.named(doing):
            self.group = self.hosts = self._own_group("gloo")
            if device.type == "cuda":
                self.group = self._own_group("nccl")
        if device.type == "cuda" and self.ep_size > 1:
            self.watch.end_if_kept_waiting(self.group_ranks)

    def _own_group(self, backend: str) -> dist.ProcessGroup:
        """Make the process groups of all expert groups, as every rank must; return this rank's."""
        # NCCL ends the process without naming a rank: the watch must be earlier.
        patience = 1.5 if backend == "nccl" else 1.0
        groups = [
            dist.new_group(
                list(range(first, first + self.ep_size)),
                timeout=timedelta(seconds=patience * self.parallel.timeout),
                backend=backend,
            )
            for first in range(0, self.world_size, self.ep_size)
        ]
        return groups[self.rank // self.ep_size]

    def agree(self, facts: Mapping[str, object]) -> None:
        """Raise ExpertMapError, on every rank, unless all ranks give the same facts."""
        texts = self.watch.exchange(
            "comparing versions and options", json.dumps(facts, default=str, sort_keys=True)
        )
        first, *others = map(json.loads, texts)
        for rank, theirs in enumerate(others, 1):
            for name in first.keys() | theirs.keys():
                if first.get(name) != theirs.get(name):
                    raise ExpertMapError(
                        f"{name} is {first.get(name)} on rank 0 and {theirs.get(name)} on rank "
                        f"{rank}; start all ranks with the same program, packages and files"
                    )

    def together(self, doing: str) -> AbstractContextManager[None]:
        """Return a context that ends when all ranks have finished its block.

        If one rank fails, the others raise RankError.
        """
        return self.watch.together(doing)

    def leave(self) -> None:
        """End the job, on every rank; torch.distributed cannot be used any more."""
        self.watch.leave()
        dist.destroy_process_group()

    def named_faults(self, doing: str) -> AbstractContextManager[None]:
        """Return a context that turns errors of torch.distributed into RankErrors.

        They name the ranks of this group that are gone or behind.
        """
        return self.watch.named(doing, self.group_ranks)

    def fault(self, doing: str, error: RuntimeError) -> RankError:
        """Return the RankError that `named_faults` raises for an error."""
        return self.watch.fault(doing, error, self.group_ranks)

    def all_to_all(
        self,
        rows: Tensor,
        doing: str,
        *,
        sent: Sequence[int] | None = None,
        received: Sequence[int] | None = None,
    ) -> "Pending[Tensor]":
        """Exchange rows [S, W] for [S', W]: send `sent` of them to each rank of the group, in order
        of ranks, and receive `received` from each; the same number for all ranks where None."""
        size = len(rows) if received is None else sum(received)
        result = rows.new_empty(size, *rows.shape[1:])
        sizes = None if received is None else list(received), None if sent is None else list(sent)
        return self._begin(
            doing, dist.all_to_all_single, result, _octets(result), _octets(rows), *sizes
        )

    def all_gather(self, rows: Tensor, doing: str) -> "Pending[Tensor]":
        """Gather rows [C, W], as many on every rank, from all ranks: [R * C, W]."""
        result = rows.new_empty(self.ep_size * len(rows), *rows.shape[1:])
        return self._begin(doing, _all_gather, result, _octets(result), _octets(rows))

    def all_reduce(self, tensor: Tensor, doing: str) -> "Pending[Tensor]":
        """Sum `tensor` over the group, in place; all ranks get the same bits."""
        return self._begin(doing, dist.all_reduce, tensor, tensor)

    def broadcast(self, tensor: Tensor, doing: str) -> "Pending[Tensor]":
        """Overwrite `tensor`, which is contiguous, by that of the group's first rank."""
        return self._begin(doing, dist.broadcast, tensor, _octets(tensor), src=self.group_ranks[0])

    def numbers(self, own: Sequence[int], doing: str) -> list[list[int]]:
        """Gather numbers, as many on every rank, from all ranks of the group; without GPUs."""
        mine = torch.tensor(own, dtype=torch.int64)
        result = mine.new_empty(self.ep_size * len(own))
        self.watch.begins(doing)
        with self.named_faults(doing):
            _all_gather(result, mine, group=self.hosts)
        return result.view(self.ep_size, -1).tolist()

    def exchange(
        self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]], doing: str
    ) -> "Pending[list[Tensor]]":
        """Send tensors of bytes to ranks of the group, by their places in it, and receive others.

        Tensors between the same two ranks arrive in order. All ranks call it, also those with
        nothing to send or receive.
        """
        self.watch.begins(doing)
        operations = [
            dist.P2POp(kind, tensor, group=self.group, group_peer=peer)
            for kind, tensors in ((dist.isend, sent), (dist.irecv, received))
            for tensor, peer in tensors
        ]
        with self.named_faults(doing):
            works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(self, works, doing, [tensor for tensor, _ in received], sent)

    def _begin(
        self, doing: str, collective: Any, result: Tensor, *args: Any, **options: Any
    ) -> "Pending[Tensor]":
        self.watch.begins(doing)
        # Not `named_faults`: a context manager takes as long as some of these launches.
        try:
            work = collective(*args, group=self.group, async_op=True, **options)
        except RuntimeError as error:
            raise self.fault(doing, error) from error
        return Pending(self, (work,), doing, result, args)


Result = TypeVar("Result")


class Pending(Generic[Result]):
    """A collective that has been started."""

    def __init__(
        self, mesh: Mesh, works: Sequence[Any], doing: str, result: Result, held: object
    ) -> None:
        self._mesh, self._works, self._doing, self._result = mesh, works, doing, result
        self._held = held  # tensors that the collective reads and writes until it is done

    def wait(self) -> Result:
        """Wait for the result and return it; on a GPU only the current stream waits."""
        works, self._works = self._works, ()
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._mesh.fault(self._doing, error) from error
        self._held = None
        return self._result


def join(parallel: Parallel, device: torch.device | str | None = None) -> Mesh:
    """Join the job as one of its ranks; initialises torch.distributed if that is not done.

    The device is by default, and for "cuda", the GPU with this process's number on its host
    (LOCAL_RANK).

    Raises ExpertMapError where the number of processes is no multiple of the expert-parallel size,
    or versions or options differ between ranks, RankError where a rank does not come, and
    ValueError for a device that does not exist.
    """
    device = _device_of_rank(device)
    world_size = dist.get_world_size() if dist.is_initialized() else _int("WORLD_SIZE", 1)
    if world_size % parallel.expert_parallel_size:
        raise ExpertMapError(
            f"expert_parallel_size is {parallel.expert_parallel_size}, and there "
            f"{'is 1 process' if world_size == 1 else f'are {world_size} processes'}: start them "
            f"with torchrun --nproc-per-node {parallel.expert_parallel_size}, or a multiple of it"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _initialise(parallel, device)
    return Mesh(parallel, device)


def _initialise(parallel: Parallel, device: torch.device) -> None:
    options: dict[str, Any] = {
        "backend": "nccl" if device.type == "cuda" else "gloo",
        "timeout": timedelta(seconds=max(parallel.timeout, _START)),
    }
    if device.type == "cuda":
        options["device_id"] = device
    if "RANK" in os.environ:
        dist.init_process_group(**options)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(store=store, rank=0, world_size=1, **options)


def _device_of_rank(device: torch.device | str | None) -> torch.device:
    asked = None if device is None else torch.device(device)
    if asked is None:
        asked = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.type == "cuda" and asked.index is None and "LOCAL_RANK" in os.environ:
        place, number = _int("LOCAL_RANK", 0), torch.cuda.device_count()
        if 0 < number <= place:
            raise ValueError(
                f"process {place} of this host has no GPU of its own, as there are {number}: start "
                "as many processes as GPUs, or give them all device 'cpu'"
            )
        asked = torch.device("cuda", place)
    return device_of(asked)


def _int(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default))


def _octets(tensor: Tensor) -> Tensor:
    """Return a view as bytes, since not every backend supports every dtype."""
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)
