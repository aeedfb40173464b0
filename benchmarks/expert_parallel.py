"""Experts over several GPUs: what they compute, and how long layers, steps and loading take.

    torchrun --nproc-per-node 4 benchmarks/expert_parallel.py [--model FOLDER ..] [--section ..]

One job measures every number of ranks that divides it. The sections, in over_ranks/, say what they
do: correctness and generation (trained checkpoints, and a few layers of Qwen3-30B-A3B), decode,
eplb, layer, load and pack. Each gets a share of the time that is left, and ends early without more.
Without a GPU the same is gone through with very small models, to try the script.

Rank 0 writes expert_parallel_<ranks>x_<device>.json after each row; with --add the sections that
are there and not measured now are kept. expert_parallel_tables.py makes tables of it. The run ends
with status 1 where results are wrong or a section fails.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist
from expert_parallel_tables import lines
from machine import describe, result_path, write_result
from over_ranks.balance import eplb
from over_ranks.correctness import correctness, generation, wrong
from over_ranks.decode import decode
from over_ranks.decode import is_wrong as decode_is_wrong
from over_ranks.job import Job, Row
from over_ranks.layer import layer
from over_ranks.loading import load
from over_ranks.pack import pack

SHARES = {
    "correctness": 85,
    "generation": 25,
    "decode": 100,
    "eplb": 75,
    "layer": 75,
    "load": 30,
    "pack": 5,
}
"""Section -> its share of the time: about the seconds that it takes on 4 GPUs."""


def main() -> None:
    args = parsed()
    begin = time.perf_counter()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    job = Job(device, small=not on_gpu, seconds=args.time_budget)
    benchmark = f"expert_parallel{'' if on_gpu else '_small'}_{job.world_size}x"
    path = result_path(benchmark, device)
    result: dict[str, Any] = json.loads(path.read_text()) if args.add and path.exists() else {}
    result |= describe(device) | {"ranks": job.world_size}
    result.setdefault("section_seconds", {})
    result.setdefault("wire_bytes_per_second", {})
    for size in job.sizes[1:]:
        result["wire_bytes_per_second"][str(size)] = job.wire_bytes_per_second(size)
    sections: dict[str, Callable[[], Iterator[Row]]] = {
        "correctness": partial(correctness, job, args.model),
        "generation": partial(generation, job, args.model),
        "decode": partial(decode, job),
        "eplb": partial(eplb, job),
        "layer": partial(layer, job),
        "load": partial(load, job),
        "pack": partial(pack, job),
    }
    asked = [name for name in SHARES if name in args.section]
    failed = []
    for i, name in enumerate(asked):
        section_begin = time.perf_counter()
        rows: list[Row] = []
        error = None
        try:
            with job.until(job.left * SHARES[name] / sum(SHARES[other] for other in asked[i:])):
                for row in sections[name]():
                    rows.append(row)
                    result[name] = rows
                    result["section_seconds"][name] = time.perf_counter() - section_begin
                    if job.rank == 0:
                        write_result(benchmark, device, result)
        except Exception as caught:  # where all ranks meet it the other sections go on
            traceback.print_exc()
            error = f"rank {job.rank}: {type(caught).__name__}: {str(caught)[:300]}"
        errors = job.succeeded(error)
        job.release()
        failed += [f"{name}: {text}" for text in errors]
        failed += [f"{name}: wrong: {row}" for row in rows if is_wrong(name, row)]
        if job.rank == 0:
            took = time.perf_counter() - section_begin
            print(f"\n{name}, {took:.0f} s, after {time.perf_counter() - begin:.0f} s")
            print("\n".join(lines(name, rows)), flush=True)
    if job.rank == 0:
        print("\n".join([*failed, f"written to {path}"]))
    dist.destroy_process_group()
    if failed:
        sys.exit(1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--section", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--model", nargs="+", type=Path, default=[], help="trained checkpoints")
    parser.add_argument("--add", action="store_true", help="to the results that are there")
    parser.add_argument("--time-budget", type=float, default=400, metavar="SECONDS")
    return parser.parse_args()


def is_wrong(section: str, row: Row) -> bool:
    if section == "decode":
        return decode_is_wrong(row)
    return section in ("correctness", "generation") and wrong(section, row)


if __name__ == "__main__":
    main()
