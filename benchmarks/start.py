"""Section start: a fresh process, from the model in memory to the first token.

`section` runs this file as that process, once with Triton's cache as it is, which the other
sections have filled, and with --cold once more with an empty one. What is timed begins when
`from_config` has returned and ends when a streamer gets the first token of `generate`: kernels are
loaded or compiled, the cache is made, the prompt computed, the first step captured. After that the
capture of steps for 1 and 32 rows on an engine of their own is timed, each with the step that runs
before it so that nothing is left to compile.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CASES
from machine import synchronize
from subject import Clock, Row, greedy, reason, say

import moezoo
from moezoo.generation.engine import Engine

PROMPT = {"cuda": 512, "cpu": 32}
CAPTURED = (1, 32)
CONTEXT = 512


def section(case: str, args: argparse.Namespace, seconds: float) -> Iterator[Row]:
    """Yield the rows of a case from processes that get the given seconds; no model is held here."""
    end = time.perf_counter() + seconds
    for cache in ("warm", "cold") if args.cold else ("warm",):
        row: Row = {"section": "start", "case": case, "dtype": args.dtype, "triton_cache": cache}
        row["skipped"] = {}
        try:
            with tempfile.TemporaryDirectory() as folder:
                place = {"TRITON_CACHE_DIR": folder} if cache == "cold" else {}
                left = max(1.0, end - time.perf_counter())
                row |= fresh(case, args, os.environ | place, left)
        except Exception as error:
            row["skipped"]["moezoo"] = reason(error)
            say(f"{case}, start: skipped: {row['skipped']['moezoo']}")
        yield row


def fresh(
    case: str, args: argparse.Namespace, environment: dict[str, str], seconds: float
) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--case", case]
    command += ["--device", args.device, "--dtype", args.dtype]
    limit = seconds if math.isfinite(seconds) else None
    try:
        ended = subprocess.run(
            command, env=environment, timeout=limit, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"time budget: {seconds:.0f} s were left") from None
    if ended.returncode:
        raise RuntimeError(ended.stderr.strip().split("\n")[-1])
    return json.loads(ended.stdout.strip().split("\n")[-1])


def measure(case: str, dtype: str, device: torch.device) -> dict[str, Any]:
    """Measure the start; this runs in the fresh process."""
    begin = time.perf_counter()
    model = moezoo.from_config(CASES[case](), dtype=getattr(torch, dtype), device=device)
    model.generation_config.eos_token_id = None
    synchronize(device)
    there = time.perf_counter()
    ids = torch.randint(1, model.config.vocab_size, (1, PROMPT[device.type]), device=device)
    seconds = []
    for _ in range(2):
        clock = Clock()
        start = time.perf_counter()
        greedy(model, ids, 8, streamer=clock)()
        seconds.append(clock.times[1] - start)
    found: dict[str, Any] = {
        "prompt_tokens": ids.shape[1],
        "build_seconds": there - begin,
        "first_token_seconds": seconds[0],
        "first_token_seconds_of_the_second_call": seconds[1],
    }
    if device.type == "cuda":
        found["capture_seconds"] = {
            str(rows): capture_seconds(model, rows, device) for rows in CAPTURED
        }
    return found


def capture_seconds(model: Any, rows: int, device: torch.device) -> float:
    engine = Engine(model.decoder, num_rows=rows, context=CONTEXT)
    each = engine.pages // rows
    for row in range(rows):
        engine.assign(row, range(row * each, (row + 1) * each))
    tokens = torch.ones(rows, dtype=torch.int64, device=device)
    engine.start(range(rows), [1] * rows, tokens)
    synchronize(device)
    start = time.perf_counter()
    engine.step(rows, engine.greedy)
    synchronize(device)
    return time.perf_counter() - start


def figures(row: Row) -> list[str]:
    """Return the cells of a row of the table, in the order of COLUMNS."""
    captures = row.get("capture_seconds", {})
    return [
        *(row["case"], row["triton_cache"]),
        f"{row['first_token_seconds']:.2f}" if "first_token_seconds" in row else "skipped",
        *(f"{captures[str(n)]:.2f}" if str(n) in captures else "" for n in CAPTURED),
    ]


COLUMNS = ("", "Triton cache", "first token s", *(f"capture {n} s" for n in CAPTURED))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    given = parser.parse_args()
    print(json.dumps(measure(given.case, given.dtype, torch.device(given.device))))
