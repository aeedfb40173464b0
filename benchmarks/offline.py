"""Section offline: tokens a second of many prompts of mixed lengths, until the last has ended.

Prompts are random tokens, as many of each length between two bounds; each has its own limit of new
tokens, and nothing ends one before. `moezoo.generate` has one limit for all, so what it is made of
runs here: an engine that is sized as it sizes its own, and the `Batcher` with requests. Making the
engine and capturing its steps is part of the time; compiling kernels is not.

transformers' `generate` does a prompt and a few steps of one static batch, of prompts near the
median length. From that follows what all of them would take, sorted by length, each batch until its
longest row has ended; steps do not grow longer in this, which is in its favour. Its continuous
batching, what `generate_batch` runs, gets a share of the prompts, with their own limits, and is
stopped after --peer-seconds: the tokens that came until then count. What did not end in time says
so with "cut".
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from machine import synchronize
from roofline import static_batch_seconds
from subject import Clock, Row, Subject, greedy, release, spread
from torch import nn

from moezoo.generation.continuous import Batcher, Request
from moezoo.generation.engine import CHUNK_TOKENS, Engine
from moezoo.generation.graphs import BATCH_SIZES
from moezoo.generation.memory import rows_and_pages_that_fit
from moezoo.generation.pages import PAGE_SIZE, num_pages
from moezoo.generation.prompts import Chunk
from moezoo.generation.texts import MAX_CONTEXT, context_length

SEED = 4
PROMPTS = {"cuda": 512, "cpu": 12}
PROMPT_TOKENS = {"cuda": (64, 2048), "cpu": (8, 48)}
NEW_TOKENS = {"cuda": (16, 512), "cpu": (4, 16)}
ROWS = {"cuda": 256, "cpu": 8}
"""Most prompts at once: the defaults of `moezoo.generate`."""
STATIC_BATCHES = {"cuda": (32, 64), "cpu": (4,)}
PEER_STEPS = 8
PEER_PROMPTS = 64
COMPILED_CHUNKS = (64, 256, 1024, 4096, CHUNK_TOKENS)


@dataclass(frozen=True)
class Workload:
    """Prompts, and the number of new tokens for each."""

    prompts: list[list[int]]
    limits: list[int]

    @classmethod
    def draw(
        cls,
        number: int,
        prompt_tokens: tuple[int, int],
        new_tokens: tuple[int, int],
        vocabulary: int,
    ) -> "Workload":
        """Draw the same prompts each time; a smaller `number` gives the first of them."""
        lengths, limits, tokens = (random.Random(f"{SEED} {what}") for what in ("n", "m", "ids"))
        return cls(
            [
                [tokens.randrange(1, vocabulary) for _ in range(lengths.randint(*prompt_tokens))]
                for _ in range(number)
            ],
            [limits.randint(*new_tokens) for _ in range(number)],
        )

    def first(self, number: int) -> "Workload":
        return Workload(self.prompts[:number], self.limits[:number])

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]


class CountedEngine(Engine):
    """An engine that adds up how long captures take."""

    capture_seconds = 0.0

    def _capture(self, *args: Any) -> Any:
        start = time.perf_counter()
        captured = super()._capture(*args)
        self.capture_seconds += time.perf_counter() - start
        return captured


def section(subject: Subject, args: argparse.Namespace) -> Iterator[Row]:
    kind = subject.device.type
    number = args.prompts or PROMPTS[kind]
    bounds = PROMPT_TOKENS[kind], NEW_TOKENS[kind]
    workload = Workload.draw(number, *bounds, subject.model.config.vocab_size)
    row = subject.row("offline", prompts=number, prompt_tokens=bounds[0], new_tokens=bounds[1])
    row |= {"input_tokens": sum(workload.lengths), "output_tokens": sum(workload.limits)}
    row["contenders"] = found = {}
    run = partial(continuous, subject, workload, min(ROWS[kind], number))
    if kind == "cuda":
        subject.attempt(row, "compiling ahead", partial(compile_ahead, subject))
    results = {"moezoo": subject.attempt(row, "moezoo", run)}
    for batch in STATIC_BATCHES[kind]:
        name = f"transformers_static_{batch}"
        run = partial(static_batches, subject.twin, workload, min(batch, number))
        results[name] = subject.attempt(row, name, run)
    run = partial(their_batching, subject, workload.first(PEER_PROMPTS), args.peer_seconds)
    results["transformers_generate_batch"] = subject.attempt(
        row, "transformers_generate_batch", run
    )
    found.update({name: result for name, result in results.items() if result is not None})
    for name, key in (
        ("transformers_static", "times_static"),
        ("transformers_generate_batch", "times_generate_batch"),
    ):
        peers = [c["output_tokens_per_second"] for n, c in found.items() if n.startswith(name)]
        if peers and max(peers) > 0 and "moezoo" in found:
            row[key] = found["moezoo"]["output_tokens_per_second"] / max(peers)
    yield row


def speeds(input_tokens: int, output_tokens: int, seconds: float) -> dict[str, float]:
    return {
        "seconds": seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (input_tokens + output_tokens) / seconds,
    }


@torch.inference_mode()
def compile_ahead(subject: Subject) -> None:
    """Run steps of all sizes and prompts of several sizes once, on a separate engine."""
    engine = Engine(
        subject.model.decoder,
        num_rows=ROWS["cuda"],
        context=max(CHUNK_TOKENS, context_length(subject.model) or MAX_CONTEXT),
        pages=num_pages(CHUNK_TOKENS),
    )
    engine.assign(0, range(engine.pages))
    for size in COMPILED_CHUNKS:
        engine.prefill([Chunk(0, [1] * size)])
    for size in BATCH_SIZES:
        if size <= engine.num_rows:
            engine._step(size, engine.greedy)
    torch.cuda.synchronize()


def continuous(subject: Subject, workload: Workload, rows: int) -> dict[str, Any]:
    """Measure moezoo's continuous batching."""
    model = subject.model
    context = context_length(model) or MAX_CONTEXT
    synchronize(subject.device)
    start = time.perf_counter()
    rows, pages = rows_and_pages_that_fit(
        model.decoder, num_rows=rows, context=context, chunk=CHUNK_TOKENS, cache_bytes=None
    )
    engine = CountedEngine(
        model.decoder, num_rows=rows, context=context, pages=pages, chunk=CHUNK_TOKENS
    )
    batcher = Batcher(engine, engine.greedy, ends=set())
    given = zip(workload.prompts, workload.limits, strict=True)
    requests = [Request(i, prompt, limit) for i, (prompt, limit) in enumerate(given)]
    finished = 0
    for request in batcher.run(iter(requests)):
        if request.error is not None:
            raise RuntimeError(request.error)
        assert len(request.tokens) == request.limit
        finished += 1
        if subject.left() <= 0:
            break
    synchronize(subject.device)
    seconds = time.perf_counter() - start
    begun = [request for request in requests if request.tokens]
    inputs = sum(len(request.prompt) for request in begun)
    outputs = sum(len(request.tokens) for request in begun)
    return {
        **speeds(inputs, outputs, seconds),
        "rows": rows,
        "cache_tokens": pages * PAGE_SIZE,
        "finished": finished,
        "cut": finished < len(requests),
        "capture_seconds": engine.capture_seconds,
        "graphs": len(engine._graphs),
    }


def static_batches(twin: nn.Module, workload: Workload, batch: int) -> dict[str, Any]:
    """Measure a few steps of a batch in transformers' `generate`; extrapolate to all batches."""
    lengths = workload.lengths
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    middle = (len(order) - batch) // 2
    prompts = [workload.prompts[i] for i in order[middle : middle + batch]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=twin.device)
    mask = torch.tensor(
        [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=twin.device
    )
    clock = Clock()
    greedy(twin, ids, PEER_STEPS, attention_mask=mask, streamer=clock)()
    steps = spread(b - a for a, b in itertools.pairwise(clock.times[2:]))
    token_seconds = (clock.times[1] - clock.times[0]) / ids.numel()
    seconds = static_batch_seconds(
        lengths,
        workload.limits,
        batch,
        token_seconds=token_seconds,
        step_seconds=steps["median"],
    )
    return {
        **speeds(sum(lengths), sum(workload.limits), seconds),
        "extrapolated": True,
        "batch": batch,
        "prompt_token_seconds": token_seconds,
        "step_seconds": steps,
    }


def their_batching(subject: Subject, workload: Workload, limit: float) -> dict[str, Any]:
    """Measure what `generate_batch` runs, with each prompt's own limit, up to `limit` seconds."""
    from transformers.generation.continuous_batching.utils import WorkloadHints

    if subject.left() < limit:
        raise TimeoutError(f"time budget: {subject.left():.0f} s were left")
    twin = subject.twin
    config = deepcopy(twin.generation_config)
    config.max_new_tokens, config.do_sample = max(workload.limits), False
    config.eos_token_id, config.pad_token_id = -1, 0
    hints = WorkloadHints(max(workload.lengths), max(workload.limits), len(workload.prompts))
    release(subject.device)
    began = time.perf_counter()
    attention = twin.config._attn_implementation
    try:
        with twin.continuous_batching_context_manager(
            generation_config=config, block=True, timeout=30, workload_hints=hints
        ) as manager:
            start = time.perf_counter()
            try:
                come, finished = collected(manager, workload, start + limit)
            finally:
                seconds = time.perf_counter() - start
                manager.stop(block=True, timeout=30, hard_stop=True)
    finally:
        if twin.config._attn_implementation != attention:
            twin.set_attn_implementation(attention)
    outputs = sum(come.values())
    if not outputs:
        raise RuntimeError(f"no token within {seconds:.0f} s")
    inputs = sum(len(workload.prompts[int(i)]) for i, number in come.items() if number)
    return {
        **speeds(inputs, outputs, seconds),
        "prompts": len(workload.prompts),
        "finished": finished,
        "cut": finished < len(workload.prompts),
        "start_seconds": start - began,
    }


def collected(manager: Any, workload: Workload, end: float) -> tuple[dict[str, int], int]:
    """Return the tokens that each request has by `end`, and how many requests have ended."""
    come: dict[str, int] = {}
    finished = 0
    for i, (prompt, limit) in enumerate(zip(workload.prompts, workload.limits, strict=True)):
        manager.add_request(prompt, str(i), max_new_tokens=limit, streaming=True, eos_token_id=-1)
    while finished < len(workload.prompts) and time.perf_counter() < end:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                break
            continue
        if result.error is not None:
            raise RuntimeError(str(result.error))
        come[result.request_id] = len(result.generated_tokens)
        finished += result.is_finished()
    return come, finished


def figures(row: Row) -> list[str]:
    """Return the cells of a row of the table, in the order of COLUMNS."""
    found = row["contenders"]
    static = [c for name, c in found.items() if "_static_" in name]
    best = max(static, key=lambda c: c["output_tokens_per_second"], default=None)
    shown = (found.get("moezoo"), best, found.get("transformers_generate_batch"))
    return [
        *(row["case"], str(row["prompts"])),
        *("" if c is None else f"{c['output_tokens_per_second']:,.0f}" for c in shown),
        *(
            f"{row[key]:.1f}" if key in row else ""
            for key in ("times_static", "times_generate_batch")
        ),
        "" if shown[0] is None else f"{shown[0]['total_tokens_per_second']:,.0f}",
        "cut" if shown[0] is not None and shown[0]["cut"] else "",
    ]


COLUMNS = (
    *("", "prompts", "moezoo out tok/s", "generate, best static", "generate_batch"),
    *("ratio", "ratio", "moezoo in + out tok/s", ""),
)
