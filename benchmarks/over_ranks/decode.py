"""Section decode: steps of whole models in CUDA graphs, over ranks and on one GPU.

Qwen3-30B-A3B in bf16 and STACK layers of DeepSeek-V3 in block fp8, from CONTEXT / 2 tokens on. With
all_gather the rows are the same on all ranks, with all_to_all each rank has as many of its own.
Logits of a step, in which all ranks have the same rows, are first compared with one GPU's. Where
routers of many random layers meet near ties, rounding alone changes them much: how much is seen
from one GPU itself, which multiplies the same rows in tiles of other sizes when more come with
them.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from moezoo.generation.paged import token_bytes
from moezoo.generation.pages import PAGE_SIZE, num_pages
from over_ranks.job import Job, Row
from over_ranks.shapes import deepseek_v3, qwen3
from over_ranks.steps import Steps

ROWS = (1, 8, 32, 128)
CONTEXT = 512
STACK = 4
COMPARED, BESIDE = 8, 32
"""Rows that are compared, and rows in the step that shows the effect of rounding."""
TOLERANCE, LEAST_TOLERANCE = 1.5, 0.05
"""Allowed difference as a multiple of that of rounding, and a difference that is always allowed."""
SPARE_BYTES = 4 << 30
"""Bytes kept free beside the cache, for graphs and activations."""
CASES = {
    "qwen3-30b-a3b": (partial(qwen3, 48), None),
    f"deepseek-v3, {STACK} layers, fp8": (partial(deepseek_v3, STACK), "fp8_w8a8"),
}


def decode(job: Job) -> Iterator[Row]:
    several = [size for size in reversed(job.sizes) if size > 1]
    ways = [(0, ""), *((n, d) for n in several for d in ("all_to_all", "all_gather"))]
    for case in CASES:
        expected: Tensor | None = None
        rounding = 0.0
        for size, dispatch in ways:
            if not job.has(15):
                return
            row, logits, beside = of_model(job, case, size, dispatch)
            if expected is None:
                expected, rounding = logits, job.difference(beside, logits)
            row["logit_difference"] = job.difference(logits, expected)
            row["logit_difference_of_rounding"] = rounding
            job.release()
            yield row


def is_wrong(row: Row) -> bool:
    most = max(LEAST_TOLERANCE, TOLERANCE * row["logit_difference_of_rounding"])
    return not row["logit_difference"] <= most


def of_model(job: Job, case: str, size: int, dispatch: str) -> tuple[Row, Tensor, Tensor]:
    """Return a model's row, and logits of the first COMPARED rows, alone and among BESIDE rows."""
    make, quantization = CASES[case]
    options = {"dispatch": dispatch} if size else {}
    model = job.make(make(small=job.small), size, quantization=quantization, **options)
    rows = rows_with_room(job, token_bytes(model.decoder))
    steps = Steps(job, model, rows=rows[-1], context=CONTEXT)
    steps.begin(COMPARED, alike=True)
    logits = steps.step()[:COMPARED].float().cpu()
    steps.begin(min(BESIDE, rows[-1]), alike=True)
    beside = steps.step()[:COMPARED].float().cpu()
    row = {
        "case": case,
        "ranks": size,
        "dispatch": dispatch,
        "seconds": {},
        "tokens_per_second": {},
    }
    for number in rows:
        seconds = steps.seconds(number, alike=dispatch == "all_gather")
        row["seconds"][str(number)] = seconds
        together = number * size if dispatch == "all_to_all" else number
        row["tokens_per_second"][str(number)] = together / seconds
    return row, logits, beside


def rows_with_room(job: Job, bytes_of_token: int) -> list[int]:
    """Return the ROWS whose cache fits beside the model on every rank."""
    if not job.on_gpu:
        return list(ROWS[:2])
    job.release()
    free = -job.largest(-torch.cuda.mem_get_info(job.device)[0]) - SPARE_BYTES
    of_row = num_pages(CONTEXT) * PAGE_SIZE * bytes_of_token
    return [number for number in ROWS if number <= COMPARED or number * of_row <= free]
