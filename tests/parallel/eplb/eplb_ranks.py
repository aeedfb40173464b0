"""Processes that are the ranks of a job, for tests."""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import Queue

from moezoo.parallel.mesh import Mesh, Parallel, join

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "moezoo.loaders.load", "moezoo.parallel.mesh"])


class Died(Exception):
    """What a rank gives that ended without a result."""


def run_ranks(
    num_ranks: int, fn: Callable[..., Any], *args: Any, parallel: Parallel, wait: float = 120
) -> list[Any]:
    """What `fn(mesh, *args)` returns on each rank, or the exception that it raises."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    queue = _context.Queue()
    processes = [
        _context.Process(
            target=_rank,
            args=(rank, num_ranks, store.port, queue, parallel, fn, args),
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    outcomes: list[Any] = [Died("no result")] * num_ranks
    end = time.monotonic() + wait
    try:
        while time.monotonic() < end:
            alive = any(process.is_alive() for process in processes)
            try:
                rank, outcome = queue.get(timeout=0.1)
                outcomes[rank] = pickle.loads(outcome)
            except Empty:
                if not alive:
                    break
    finally:
        for process in processes:
            process.kill()
    return outcomes


def results(outcomes: list[Any]) -> list[Any]:
    """The same, without an exception among them."""
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, BaseException):
            raise AssertionError(f"rank {rank} failed") from outcome
    return outcomes


def _rank(
    rank: int,
    num_ranks: int,
    port: int,
    queue: "Queue[Any]",
    parallel: Parallel,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        outcome = fn(join(parallel, "cpu"), *args)
    except Exception as error:
        error.add_note(traceback.format_exc())
        outcome = error
    queue.put((rank, pickle.dumps(outcome)))  # not by torch's shared memory, which ends with us
    queue.close()
    queue.join_thread()


__all__ = ["Died", "Mesh", "Parallel", "results", "run_ranks"]
