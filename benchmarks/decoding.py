"""Section decode: tokens a second once prompts are in the cache, beside what memory allows.

On a GPU moezoo's figure is the pace of `model.generate`, Python's part included: the time between
CUDA events at the start of its steps, over the last `--new-tokens` of them. Every row has `context`
tokens at the end. Where batch and prompt have more than COMPUTED_TOKENS tokens, the prompt is not
computed: its pages hold random numbers, and the row says so. The same steps are then timed without
the loop around them, graph after graph; what the loop takes on top of that, its own small kernels
included, is `gpu_idle_fraction`. At PEER_CONTEXT tokens the profiler says how long the GPU does
nothing between the last kernel of a step and the first of the next (`between_steps`). transformers'
figure is the median time between two tokens of its
`generate`, for a few tokens.

On a CPU both are timed over a whole call of `generate`, prompt included.

The roofline is the time in which the memory gives all that a step reads: the weights, of the
experts those that the rows chose in a step of that run, and the keys and values.
"""

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from roofline import dense_bytes, expert_bytes, expert_layers, kv_bytes
from subject import Clock, Row, Run, Subject, alternate, greedy, spread
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moezoo.generation.engine import Engine
from moezoo.generation.graphs import batch_size
from moezoo.generation.keeper import EngineKeeper
from moezoo.generation.paged import token_bytes
from moezoo.generation.pages import PAGE_SIZE, num_pages
from moezoo.layers.decoder import Decoder
from moezoo.layers.moe import FusedMoE
from moezoo.layers.moe.layer import Record

COMPUTED_TOKENS = 16384
LEAD = 16
"""Number of untimed steps before those that are timed."""
COUNTED_STEPS = 4
SPARE_BYTES = 2 * 2**30
"""Bytes kept free beside the cache, for graphs and activations."""
FIRST_KERNEL = "_step_inputs_kernel"
PEER_CONTEXT = 512
PEER_TOKENS = 8


class NoRoomError(Exception):
    """Raised where the cache does not fit the device."""


class WatchedEngine(Engine):
    """An engine that records a CUDA event at each step's start, and can skip computing prompts."""

    skips_prompts = False

    def __init__(self, decoder: Decoder, *, num_rows: int, context: int) -> None:
        super().__init__(decoder, num_rows=num_rows, context=context)
        self.events: list[torch.cuda.Event] = []

    def step(self, batch: int, sampler: Any = None) -> Tensor:
        self.events.append(_event())
        return super().step(batch, sampler)

    def prefill_all(self, prompts: Any) -> Tensor:
        if not self.skips_prompts:
            return super().prefill_all(prompts)
        weight = self.decoder.embed.weight
        return torch.randn(len(prompts), len(weight), dtype=weight.dtype, device=self.device)

    @torch.no_grad()
    def fill(self) -> None:
        for layer in self.cache.layers:
            for stored in layer:
                if stored is not None:
                    stored.normal_()

    def pace(self, steps: int) -> float:
        """Return the seconds per step, from start to start, of the last `steps`."""
        first, last = self.events[-1 - steps], self.events[-1]
        last.synchronize()
        return 1e-3 * first.elapsed_time(last) / steps


class OneEngine(EngineKeeper):
    """An engine keeper that returns this engine for every request."""

    def __init__(self, only: Engine) -> None:
        super().__init__()
        self.only = only

    def has_room(self, decoder: Decoder, rows: int, context: int) -> bool:
        return True

    @contextmanager
    def engine(self, decoder: Decoder, rows: int, context: int) -> Iterator[Engine]:
        assert self.only.num_rows == batch_size(rows) and self.only.context >= context
        yield self.only


def section(subject: Subject, args: argparse.Namespace) -> Iterator[Row]:
    cells = list(itertools.product(args.context, args.batch))
    on_gpu = subject.device.type == "cuda"
    rows = []
    for context, batch in cells:
        row = subject.row("decode", batch=batch, context=context, new_tokens=args.new_tokens)
        row |= {"seconds": {}, "tokens_per_second": {}}
        rows.append(row)
        if on_gpu:
            found = subject.attempt(row, "moezoo", partial(in_engine, subject, row))
            if found is not None:
                _add(row, "moezoo", found.pop("pace"))
                row |= found
        else:
            subject.attempt(row, "both", partial(whole_calls, subject, row))
    beside = [row for row in rows if on_gpu and row["context"] == PEER_CONTEXT]
    if beside:
        subject.attempt(beside[0], "warming transformers up", partial(warm, subject))
    for row in rows:
        if row in beside:
            seconds = subject.attempt(row, "transformers", partial(in_transformers, subject, row))
            if seconds is not None:
                _add(row, "transformers", seconds)
        ours, theirs = (row["tokens_per_second"].get(n) for n in ("moezoo", "transformers"))
        if ours and theirs:
            row["times_transformers"] = ours / theirs
        if ours and "roofline_tokens_per_second" in row:
            row["of_roofline"] = ours / row["roofline_tokens_per_second"]
        yield row


def _add(row: Row, name: str, seconds: dict[str, float]) -> None:
    """Add the seconds of a step to a cell."""
    row["seconds"][name] = seconds
    row["tokens_per_second"][name] = row["batch"] / seconds["median"]


def in_engine(subject: Subject, row: Row) -> dict[str, Any]:
    """Return the fields of a cell on a GPU; "pace" has moezoo's seconds per step."""
    model, batch, context, steps = subject.model, row["batch"], row["context"], row["new_tokens"]
    require_room(model.decoder, batch_size(batch), context)
    prompt = context - LEAD - steps
    engine = WatchedEngine(model.decoder, num_rows=batch_size(batch), context=context)
    engine.skips_prompts = batch * prompt > COMPUTED_TOKENS
    if engine.skips_prompts:
        engine.fill()
    model._engines = OneEngine(engine)
    try:
        generate = greedy(model, subject.draw(batch, prompt), LEAD + steps)
        generate()  # captures the step
        paces = []
        for _ in range(subject.repeats):
            engine.events.clear()
            generate()
            paces.append(engine.pace(steps))
        between = gaps(generate, steps) if context == PEER_CONTEXT else None
    finally:
        model._engines = EngineKeeper()
    # `generate` starts one step less than it has tokens, and the last step has no end.
    middle = context - 1.5 - steps / 2
    begin = int(middle - steps / 2)
    replays = [replay_seconds(engine, batch, begin, steps) for _ in range(subject.repeats)]
    restart(engine, batch, int(middle))
    found = {
        "pace": spread(paces),
        "seconds_are": "of a step of model.generate",
        "pages": "random" if engine.skips_prompts else "computed",
        "replay_seconds": spread(replays),
        "gpu_idle_fraction": max(0.0, 1 - min(replays) / min(paces)),
    }
    if between is not None:
        found["between_steps"] = between
    return found | bounds(subject, batch, middle, *hit(engine, batch))


def gaps(generate: Run, steps: int) -> dict[str, float]:
    """Return the idle seconds of the GPU before each of the last `steps`, by the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        generate()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    waits = []
    busy_until = events[0].time_range.start
    for event in events:
        if FIRST_KERNEL in event.name:
            waits.append(max(0.0, 1e-6 * (event.time_range.start - busy_until)))
        busy_until = max(busy_until, event.time_range.end)
    return spread(waits[-steps:])


def bounds(
    subject: Subject, batch: int, context: float, experts: float, num_hit: float
) -> dict[str, Any]:
    """Return the roofline of a step with `context` tokens a row and `experts` bytes of experts."""
    weights = dense_bytes(subject.model.decoder) + experts
    keys = batch * kv_bytes(subject.model.decoder, context)
    seconds = (weights + keys) / subject.ceilings.read_bytes_per_second
    return {
        "experts_hit": num_hit,
        "weight_bytes": weights,
        "kv_bytes": keys,
        "roofline_tokens_per_second": batch / seconds,
    }


def require_room(decoder: Decoder, rows: int, context: int) -> None:
    """Raise `NoRoomError`, with the bytes, if an engine's cache does not fit."""
    needed = rows * num_pages(context) * PAGE_SIZE * token_bytes(decoder)
    device = decoder.embed.weight.device
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free -= torch.cuda.memory_allocated(device) + SPARE_BYTES
    if needed > free:
        raise NoRoomError(
            f"a KV cache of {needed / 1e9:.1f} GB for {rows} x {context} tokens does not fit "
            f"{free / 1e9:.1f} GB"
        )


def restart(engine: Engine, batch: int, length: int) -> None:
    """Reset the rows to `length` tokens, each to go on from its last token."""
    engine.start(range(batch), [length] * batch, engine.ids[:batch].clone())


def replay_seconds(engine: Engine, batch: int, length: int, steps: int) -> float:
    """Return the seconds per step of greedy decoding from `length` tokens on; no token is read."""
    restart(engine, batch, length)
    begin = _event()
    for _ in range(steps):
        Engine.step(engine, engine.num_rows, engine.greedy)
    end = _event()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end) / steps


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@torch.inference_mode()
def hit(engine: Engine, batch: int) -> tuple[float, float]:
    """Return the bytes of experts that a step of the rows reads, and their number per layer.

    Both are means over a few steps, which are run without a graph.
    """
    nbytes = counted = 0
    layers = expert_layers(engine.decoder)

    def counting(layer: FusedMoE) -> Record:
        def record(topk_weights: Tensor, topk_ids: Tensor) -> None:
            nonlocal nbytes, counted
            number = len(topk_ids[:batch].unique())
            counted += number
            nbytes += number * expert_bytes(layer)

        return record

    for layer in layers:
        layer.record = counting(layer)
    try:
        for _ in range(COUNTED_STEPS):
            engine._step(batch, engine.greedy)
    finally:
        for layer in layers:
            layer.record = None
    return nbytes / COUNTED_STEPS, counted / COUNTED_STEPS / max(1, len(layers))


def warm(subject: Subject) -> None:
    greedy(subject.twin, subject.draw(1, PEER_CONTEXT - PEER_TOKENS), 2)()


def in_transformers(subject: Subject, row: Row) -> dict[str, float]:
    """Return the seconds per step of transformers' `generate` as it is."""
    ids = subject.draw(row["batch"], row["context"] - PEER_TOKENS)
    clock = Clock()
    greedy(subject.twin, ids, PEER_TOKENS, streamer=clock)()
    # The first comes of the prompt; the second finds caches and experts new.
    return spread(b - a for a, b in itertools.pairwise(clock.times[2:]))


def whole_calls(subject: Subject, row: Row) -> None:
    """Fill in a cell on a CPU, from whole calls of `generate`."""
    batch, new_tokens = row["batch"], row["new_tokens"]
    ids = subject.draw(batch, row["context"] - new_tokens)
    contenders: dict[str, Run] = {
        "moezoo": greedy(subject.model, ids, new_tokens),
        "transformers": greedy(subject.twin, ids, new_tokens),
    }
    taken = alternate(contenders, subject.repeats, subject.device)
    row["seconds_are"] = "of a call of generate, prompt included"
    row["seconds"] = taken
    row["tokens_per_second"] = {
        name: batch * new_tokens / seconds["median"] for name, seconds in taken.items()
    }
    engine = Engine(subject.model.decoder, num_rows=batch, context=row["context"])
    each = engine.pages // batch
    for index in range(batch):
        engine.assign(index, range(index * each, (index + 1) * each))
    first = engine.prefill_all(ids.tolist()).argmax(-1)
    engine.start(range(batch), [ids.shape[1]] * batch, first)
    middle = ids.shape[1] + new_tokens / 2
    row |= bounds(subject, batch, middle, *hit(engine, batch))


def figures(row: Row) -> list[str]:
    """Return the cells of a row of the table, in the order of COLUMNS."""
    speed, skipped = row["tokens_per_second"], row["skipped"]
    shown = [
        f"{speed[name]:,.1f}" if name in speed else "skipped" if name in skipped else ""
        for name in ("moezoo", "transformers")
    ]
    idle = row.get("gpu_idle_fraction")
    return [
        *(row["case"], str(row["batch"]), f"{row['context']:,}", *shown),
        f"{row['times_transformers']:.2f}" if "times_transformers" in row else "",
        f"{row['of_roofline']:.0%}" if "of_roofline" in row else "",
        "" if idle is None else f"{idle:.1%}",
        row.get("pages", ""),
    ]


COLUMNS = (
    *("", "batch", "context", "moezoo tok/s", "transformers tok/s", "ratio", "of roofline"),
    *("GPU idle", "pages"),
)
