"""Section decode: steps of whole models in CUDA graphs, over ranks and on one GPU.

Qwen3-30B-A3B in bf16 and STACK layers of DeepSeek-V3 in block fp8, from CONTEXT / 2 tokens on. With
all_gather the rows are the same on all ranks, with all_to_all each rank has as many of its own.
Logits of a step, in which all ranks have the same rows, are first compared with one GPU's.
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
COMPARED = 8
"""Rows."""
TOLERANCE = 0.2
"""Relative, of logits of 48 layers in bf16 whose routers meet near ties."""
SPARE_BYTES = 4 << 30
"""Beside the cache, for graphs and activations."""
CASES = {
    "qwen3-30b-a3b": (partial(qwen3, 48), None),
    f"deepseek-v3, {STACK} layers, fp8": (partial(deepseek_v3, STACK), "fp8_w8a8"),
}


def decode(job: Job) -> Iterator[Row]:
    several = [size for size in reversed(job.sizes) if size > 1]
    ways = [(0, ""), *((n, d) for n in several for d in ("all_to_all", "all_gather"))]
    for case in CASES:
        expected: Tensor | None = None
        for size, dispatch in ways:
            if not job.has(15):
                return
            row, logits = of_model(job, case, size, dispatch)
            if expected is None:
                expected = logits
            row["logit_difference"] = job.difference(logits, expected)
            job.release()
            yield row


def of_model(job: Job, case: str, size: int, dispatch: str) -> tuple[Row, Tensor]:
    make, quantization = CASES[case]
    options = {"dispatch": dispatch} if size else {}
    model = job.make(make(small=job.small), size, quantization=quantization, **options)
    rows = rows_with_room(job, token_bytes(model.decoder))
    steps = Steps(job, model, rows=rows[-1], context=CONTEXT)
    steps.begin(COMPARED, alike=True)
    logits = steps.step()[:COMPARED].float().cpu()
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
    return row, logits


def rows_with_room(job: Job, bytes_of_token: int) -> list[int]:
    """Of ROWS, those whose cache fits beside the model on every rank."""
    if not job.on_gpu:
        return list(ROWS[:2])
    job.release()
    free = -job.largest(-torch.cuda.mem_get_info(job.device)[0]) - SPARE_BYTES
    of_row = num_pages(CONTEXT) * PAGE_SIZE * bytes_of_token
    return [number for number in ROWS if number <= COMPARED or number * of_row <= free]
