"""Section load: a checkpoint of several files, divided while it is read, beside one GPU that reads
all of it.

The experts of Qwen3-30B-A3B with random weights, LAYERS layers of them, written to a folder for the
time of the section and therefore in the page cache. One GPU reads while the others wait. Seconds
are those of the slowest rank, from the call on.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from load import write_checkpoint

import moezoo
from over_ranks.job import Job, Row

LAYERS, REPEATS = 8, 2


def load(job: Job) -> Iterator[Row]:
    shared = [tempfile.mkdtemp(prefix="moezoo-load-") if job.rank == 0 else None]
    dist.broadcast_object_list(shared, 0)
    folder = Path(str(shared[0]))
    try:
        begin = time.perf_counter()
        write_checkpoint(
            folder,
            1 if job.small else LAYERS,
            num_experts=8 if job.small else 128,
            part=(job.rank, job.world_size),
        )
        job.together()
        written = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for ranks in [0, *reversed(job.sizes)]:
            if not job.has(8):
                return
            runs = [timed(job, folder, ranks) for _ in range(REPEATS)]
            yield {
                "ranks": ranks,
                "checkpoint_bytes": size,
                "seconds_to_write": written,
                "seconds": [job.largest(seconds) for seconds, _ in runs],
                "bytes_read": [int(n) for n in everywhere(job, runs[-1][1])],
            }
    finally:
        job.together()
        if job.rank == 0:
            shutil.rmtree(folder)


def timed(job: Job, folder: Path, ranks: int) -> tuple[float, int]:
    """Return the seconds and the bytes that this process read; none if another reads alone."""
    job.release()
    job.together()
    before, begin = bytes_read(), time.perf_counter()
    if ranks or job.rank == 0:
        model = moezoo.from_pretrained(
            folder,
            device=job.device,
            parallel=job.parallel(ranks) if ranks else None,
            progress=False,
        )
        job.synchronize()
        del model
    seconds, read = time.perf_counter() - begin, bytes_read() - before
    job.together()
    return (seconds, read) if ranks or job.rank == 0 else (0.0, 0)


def bytes_read() -> int:
    with open("/proc/self/io") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def everywhere(job: Job, number: int) -> list[int]:
    found: list[int] = [0] * job.world_size
    dist.all_gather_object(found, number)
    return found
