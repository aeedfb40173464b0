"""Starts a program in several processes on this host, as torchrun does."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moezoo.errors import RankError


def launch(num_processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` in `num_processes` processes, and return the exit code: 0,
    or that of the first one that failed. The others are then ended.

    Raises RankError where a signal ended that one. Where a signal ended this process, raises
    KeyboardInterrupt for SIGINT and SystemExit, with 128 and the signal's number, for others.
    """
    for name in ("agent.server.api", "multiprocessing.api"):
        # They log every signal, in addition to what the ranks say.
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    # Processes that each use every core would slow each other down.
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        run_id=module,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: _order(item[1]))
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        raise RankError(f"rank {rank} was ended by {name}") from error
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise SystemExit(128 + error.sigval) from error
    return 0


def _order(failure: ProcessFailure) -> tuple[int, int]:
    """Return a sort key that puts the cause of a failure before its consequences.

    Earlier failures come first. Within one second a rank that was ended by a signal comes before
    ranks that failed because it was gone; but SIGABRT is how NCCL and gloo end a rank that misses
    another one, and SIGTERM how the remaining ranks are ended.
    """
    late = {-signal.SIGABRT: 2, -signal.SIGTERM: 3}
    return failure.timestamp, late.get(failure.exitcode, int(failure.exitcode >= 0))
