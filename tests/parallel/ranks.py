"""Work for several processes, as torchrun would start them: gloo, on the CPU."""

import io
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.distributed import TCPStore

_CONTEXT = multiprocessing.get_context("forkserver")
# Once for all tests of a process: to import torch takes seconds.
_CONTEXT.set_forkserver_preload(
    ["moezoo.loaders.load", "moezoo.loaders.make", "small_models", "pytest"]
)


def run(
    num_ranks: int,
    work: Callable[..., Any],
    *args: Any,
    timeout: float = 90,
    never: Collection[int] = (),
) -> list[Any]:
    """What work(rank, *args) returns on each rank. A rank that raises gives its exception, one that
    dies None, and so do those that `never` end by themselves.

    Raises AssertionError where one is not done in time.
    """
    # Held here, as torchrun does: no other process can take the port in between.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(num_ranks):
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_rank, args=(rank, num_ranks, store.port, theirs, work, args)
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        found = _received(pipes, timeout, never)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return found


def _received(pipes: list[Any], timeout: float, never: Collection[int]) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    end = time.monotonic() + timeout
    waiting = {pipe for rank, pipe in enumerate(pipes) if rank not in never}
    while waiting:
        for pipe in wait(list(waiting), timeout=0.5):
            waiting.discard(pipe)
            with suppress(EOFError, ConnectionError):
                octets = io.BytesIO(pipe.recv_bytes())
                results[pipes.index(pipe)] = torch.load(octets, weights_only=False)
        late = [pipes.index(pipe) for pipe in waiting]
        assert not late or time.monotonic() < end, f"ranks {late} were not done in {timeout} s"
    return results


def results(num_ranks: int, work: Callable[..., Any], *args: Any, timeout: float = 90) -> list[Any]:
    """The same, where no rank may fail."""
    found = run(num_ranks, work, *args, timeout=timeout)
    for rank, result in enumerate(found):
        if isinstance(result, Exception):
            raise AssertionError(f"rank {rank} failed") from result
    return found


def die() -> None:
    """End this process as a crash would."""
    os.kill(os.getpid(), signal.SIGKILL)


def _rank(
    rank: int, num_ranks: int, port: int, pipe: Any, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh buffers are NaN
    try:
        result = work(rank, *args)
    except Exception as error:
        error.add_note(traceback.format_exc())
        result = error
    octets = io.BytesIO()
    torch.save(result, octets)
    pipe.send_bytes(octets.getvalue())  # not send, which leaves tensors in this process
    pipe.recv_bytes()  # until the end: others may wait for what this one has sent
