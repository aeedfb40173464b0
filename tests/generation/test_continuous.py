"""Continuous batching against transformers' greedy `generate`, prompt by prompt, in fp32."""

import random
from functools import cache
from typing import NamedTuple

import pytest
import torch
from configurations import CONFIGURATIONS, reference
from transformers import GenerationConfig, PreTrainedModel

import moezoo
from moezoo.generation import continuous
from moezoo.generation.continuous import Batcher, Request
from moezoo.generation.engine import Engine
from moezoo.generation.graphs import batch_size
from moezoo.generation.memory import rows_and_pages_that_fit
from moezoo.generation.paged import ring_pages, token_bytes
from moezoo.generation.pages import PAGE_SIZE
from moezoo.generation.sampling import Sampler, uniforms

CONTEXT = 512


class Pair(NamedTuple):
    ours: PreTrainedModel
    theirs: PreTrainedModel

    def written(self, prompt, new, ends=()):
        """What transformers writes after the prompt, up to its end-of-text token."""
        return list(self._written(tuple(prompt), new, frozenset(ends)))

    @cache  # noqa: B019
    def _written(self, prompt, new, ends):
        with torch.inference_mode():
            out = self.theirs.generate(
                torch.tensor([prompt]),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=list(ends) or None,
            )
        tokens = out[0, len(prompt) :].tolist()
        return tokens[: next((i for i, token in enumerate(tokens) if token in ends), None)]

    def engine(self, *, rows=3, chunk=16, pages=None):
        return Engine(self.ours.decoder, num_rows=rows, context=CONTEXT, pages=pages, chunk=chunk)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_pair(folder, model_type, name, *, device="cpu", **more):
    config = CONFIGURATIONS[model_type][name] | {"max_position_embeddings": CONTEXT} | more
    theirs = reference(model_type, config)
    theirs.save_pretrained(folder)
    ours = moezoo.from_pretrained(folder, dtype=torch.float32, device=device, progress=False)
    return Pair(ours, theirs)


@pytest.fixture(scope="module", params=DEVICES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    return make_pair(folder, "qwen3_moe", "wide-heads", device=request.param)


def tokens(num_tokens, seed=0):
    draw = random.Random(seed)
    return [draw.randrange(1, 61) for _ in range(num_tokens)]


def prompts_of(*lengths):
    return [tokens(length, seed) for seed, length in enumerate(lengths)]


def requests_of(prompts, limits):
    return [Request(i, p, n) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]


def run(engine, requests, **options):
    """All of them, each finished once; those in the order in which they finished."""
    options = {"ends": set()} | options
    batcher = Batcher(engine, options.pop("sampler", engine.greedy), **options)
    finished = list(batcher.run(iter(requests)))
    assert sorted(request.index for request in finished) == sorted(r.index for r in requests)
    assert not batcher._rows
    assert not batcher._in_flight
    assert batcher._pages.num_available == batcher._pages.total
    return finished


class Calls:
    """What an engine's prefill was given."""

    def __init__(self, engine, monkeypatch):
        self.chunks = []
        prefill = engine.prefill
        monkeypatch.setattr(
            engine, "prefill", lambda chunks: self.chunks.append(list(chunks)) or prefill(chunks)
        )

    @property
    def num_tokens(self):
        return sum(len(chunk.tokens) for chunks in self.chunks for chunk in chunks)


class OutOfMemory:
    """Raises at the calls of these numbers; None is all of them."""

    def __init__(self, engine, name, monkeypatch, at, error=None):
        self.calls = 0
        self.raised = 0
        call = getattr(engine, name)

        def fails(*args):
            self.calls += 1
            if at is None or self.calls in at:
                self.raised += 1
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried")
            return call(*args)

        monkeypatch.setattr(engine, name, fails)


@pytest.mark.parametrize("chunk", [5, 16, 64, 200])
def test_prompts_longer_than_a_piece(pair, monkeypatch, chunk):
    prompts, limits = prompts_of(150, 3, 70, 1, 64, 129), (4, 9, 6, 3, 5, 1)
    engine = pair.engine(chunk=chunk)
    calls = Calls(engine, monkeypatch)
    requests = requests_of(prompts, limits)
    run(engine, requests)
    for request, prompt, limit in zip(requests, prompts, limits, strict=True):
        assert request.tokens == pair.written(prompt, limit)
        assert request.finish_reason == "length"
    assert calls.num_tokens == sum(map(len, prompts))
    assert max(sum(len(c.tokens) for c in chunks) for chunks in calls.chunks) <= chunk


def test_prompts_wait_for_pages(pair, monkeypatch):
    """Four pages, of which each prompt takes two or three, for eight rows."""
    prompts, limits = prompts_of(100, 120, 60, 130, 64, 65, 10), (20, 9, 10, 30, 5, 64, 1)
    engine = pair.engine(rows=8, pages=4, chunk=512)
    together = []
    step = engine.step
    monkeypatch.setattr(
        engine, "step", lambda batch, sampler: together.append(batch) or step(batch, sampler)
    )
    requests = requests_of(prompts, limits)
    run(engine, requests)
    assert [r.tokens for r in requests] == [
        pair.written(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)
    ]
    assert max(together) == 2


def test_shared_prefixes_are_computed_once(pair, monkeypatch):
    system = tokens(150, seed=50)
    prompts = [system + tokens(n, seed=n) for n in (5, 1, 30, 90, 12)]
    prompts += [system[:128], [*system[:64], 1], tokens(20), [*system[:70], *prompts[0]]]
    engine = pair.engine(rows=4, chunk=64)
    calls = Calls(engine, monkeypatch)
    requests = requests_of(prompts, [6] * len(prompts))
    run(engine, requests)
    assert [r.tokens for r in requests] == [pair.written(prompt, 6) for prompt in prompts]
    shared = [0, 128, 128, 128, 128, 64, 64, 0, 64]
    assert calls.num_tokens == sum(map(len, prompts)) - sum(shared)


def test_a_prefix_is_remembered_after_its_request_until_its_room_is_needed(pair, monkeypatch):
    prompt = tokens(140)
    engine = pair.engine(rows=1, pages=4, chunk=512)
    calls = Calls(engine, monkeypatch)
    prompts = [prompt, prompt, tokens(250, seed=1), prompt]
    requests = requests_of(prompts, [3] * 4)
    run(engine, requests)
    assert [sum(len(c.tokens) for c in chunks) for chunks in calls.chunks] == [140, 12, 250, 140]
    expected = pair.written(prompt, 3)
    assert [requests[i].tokens for i in (0, 1, 3)] == [expected] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_latents_share_prefixes_too(tmp_path, monkeypatch, device):
    pair = make_pair(tmp_path, "deepseek_v3", "groups", device=device)
    system = tokens(100)
    prompts = [system + tokens(n, seed=n) for n in (3, 8, 40)]
    engine = pair.engine(chunk=32)
    calls = Calls(engine, monkeypatch)
    requests = requests_of(prompts, [5] * 3)
    run(engine, requests)
    assert [r.tokens for r in requests] == [pair.written(prompt, 5) for prompt in prompts]
    assert calls.num_tokens == sum(map(len, prompts)) - 2 * 64


def test_what_can_never_fit_fails_alone(pair):
    prompts, limits = prompts_of(30, 100, 120, 5), (5, 200, 10, 124)
    engine = pair.engine(pages=2)
    requests = requests_of(prompts, limits)
    finished = run(engine, requests)
    assert [r.finish_reason for r in requests] == ["length", "error", "error", "length"]
    assert requests[1].error.startswith("299 tokens of prompt and completion do not fit the KV")
    assert "cache of 128" in requests[2].error
    assert requests[1].tokens == []
    assert finished[0] in requests[1:3], "it does not wait for the others"
    for i in (0, 3):
        assert requests[i].tokens == pair.written(prompts[i], limits[i])


def test_exactly_the_room_there_is(pair):
    """The last token is kept nowhere."""
    prompt = tokens(120)
    fits, does_not = requests_of([prompt, prompt], (9, 10))
    run(pair.engine(pages=2), [fits, does_not])
    assert fits.tokens == pair.written(prompt, 9)
    assert does_not.finish_reason == "error"


def test_end_of_text_tokens_end_requests_and_rows_go_to_others(pair):
    prompts = prompts_of(*range(3, 15))
    free = [pair.written(prompt, 12) for prompt in prompts]
    ends = {free[0][3], free[1][0], free[2][11]}
    requests = requests_of(prompts, [12] * len(prompts))
    finished = run(pair.engine(rows=4, chunk=30), requests, ends=ends)
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.tokens == pair.written(prompt, 12, ends)
        whole = len(request.tokens) == 12
        assert request.finish_reason == ("length" if whole else "stop")
    assert {len(request.tokens) for request in requests} >= {0, 12}
    assert [request.index for request in finished] != sorted(r.index for r in requests)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_one_token_each(pair, rows):
    """Rows are free again before the first step."""
    prompts = prompts_of(*[7] * 10)
    requests = requests_of(prompts, [1] * 10)
    run(pair.engine(rows=rows, chunk=64), requests)
    assert [r.tokens for r in requests] == [pair.written(prompt, 1) for prompt in prompts]


def test_the_caller_stops_requests(pair):
    prompts = prompts_of(4, 9, 6)
    requests = requests_of(prompts, [10] * 3)
    run(pair.engine(), requests, is_stopped=lambda r: len(r.tokens) == 2 + r.index)
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.tokens == pair.written(prompt, 10)[: 2 + request.index]
        assert request.finish_reason == "stop"


def test_rows_move_together(pair, monkeypatch):
    """The lowest rows end first, so that the others take their places with all that they have."""
    prompts = prompts_of(*range(20, 4, -1))
    limits = [1 + i for i in range(16)]
    engine = pair.engine(rows=16, chunk=300)
    batches, moved = [], []
    step, move = engine.step, engine.move
    monkeypatch.setattr(
        engine, "step", lambda batch, sampler: batches.append(batch) or step(batch, sampler)
    )
    monkeypatch.setattr(engine, "move", lambda *args: moved.append(args) or move(*args))
    config = GenerationConfig(do_sample=False, repetition_penalty=1.4)
    sampler = Sampler(config, num_rows=16, vocab_size=61, device=engine.device)
    requests = requests_of(prompts, limits)
    run(engine, requests, sampler=sampler)
    assert batches == sorted(batches, reverse=True)
    assert set(batches) == {batch_size(n) if engine.captures else n for n in range(1, 16)}
    assert moved
    for request, prompt, limit in zip(requests, prompts, limits, strict=True):
        with torch.inference_mode():
            out = pair.theirs.generate(
                torch.tensor([prompt]),
                max_new_tokens=limit,
                do_sample=False,
                repetition_penalty=1.4,
                pad_token_id=0,
            )
        assert request.tokens == out[0, len(prompt) :].tolist()


WINDOWS = {
    "mixtral-5": ("mixtral", "window", {}),
    "mixtral-70": ("mixtral", "window", {"sliding_window": 70}),
    "some-layers-5": ("qwen2_moe", "layer-types", {}),
    "some-layers-70": ("qwen2_moe", "layer-types", {"sliding_window": 70}),
    "sinks-70": ("gpt_oss", "windows-in-turn", {"sliding_window": 70}),
}


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module", params=WINDOWS)
def windowed(request, device, tmp_path_factory):
    model_type, name, more = WINDOWS[request.param]
    folder = tmp_path_factory.mktemp("window")
    return make_pair(folder, model_type, name, device=device, **more)


@pytest.mark.parametrize("chunk", [3, 40, 100, 512])
@pytest.mark.sampled(n=2)
def test_sliding_windows_over_contexts_of_many(windowed, chunk):
    """Rings wrap while prompts are read and while tokens are written, row by row elsewhere."""
    lengths, limits = (260, 4, 190, 120, 66, 1), (30, 70, 3, 12, 9, 70)
    prompts = [tokens(length, seed=length) for length in lengths]
    requests = requests_of(prompts, limits)
    run(windowed.engine(chunk=chunk), requests)
    for request, prompt, limit in zip(requests, prompts, limits, strict=True):
        assert request.tokens == windowed.written(prompt, limit)


def test_a_ring_has_the_window_and_a_piece_but_never_more_than_the_context(windowed):
    (window,) = {attn.window for attn in (x.attn for x in windowed.ours.decoder.layers)} - {None}
    engine = windowed.engine(rows=2, chunk=40, pages=1)
    pages = ring_pages(window, context=CONTEXT, chunk=40)
    assert pages * PAGE_SIZE <= window + 40 + 2 * PAGE_SIZE
    for layer, stored in zip(windowed.ours.decoder.layers, engine.cache.layers, strict=True):
        expected = 1 if layer.attn.window is None else 2 * pages
        assert len(stored.keys) == expected * PAGE_SIZE
    assert ring_pages(window, context=CONTEXT, chunk=8192) == CONTEXT // PAGE_SIZE


def test_room_for_windows(windowed):
    decoder = windowed.ours.decoder
    (window,) = {layer.attn.window for layer in decoder.layers} - {None}
    ring = token_bytes(decoder, window) * ring_pages(window, context=CONTEXT, chunk=40) * PAGE_SIZE
    page = token_bytes(decoder) * PAGE_SIZE

    def fit(cache_bytes):
        return rows_and_pages_that_fit(
            decoder, num_rows=10, context=CONTEXT, chunk=40, cache_bytes=cache_bytes
        )

    for cache_bytes in (ring + page, 3 * ring + page, 7 * ring + 5 * page, 100 * ring, None):
        rows, pages = fit(cache_bytes)
        engine = Engine(decoder, num_rows=rows, context=CONTEXT, pages=pages, chunk=40)
        assert engine.cache.nbytes <= (cache_bytes or 2**32)
        assert rows >= 1 and pages >= 1
    assert rows == 10
    assert pages == 10 * CONTEXT // PAGE_SIZE
    with pytest.raises(ValueError, match=rf"cache_bytes is {ring + page - 1}, but one prompt"):
        fit(ring + page - 1)


PLACES = [("prefill", 1), ("prefill", 3), ("step", 1), ("step", 4)]


def memory_case():
    prompts = prompts_of(90, 14, 33, 5, 120, 61, 8, 2)
    return prompts, (7, 20, 3, 11, 6, 1, 15, 9)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("name", "first"), PLACES)
def test_after_running_out_of_memory_all_goes_on(pair, monkeypatch, caplog, name, first, times):
    monkeypatch.setattr(continuous, "MIN_CHUNK", 8)
    prompts, limits = memory_case()
    engine = pair.engine(rows=6, chunk=64)
    failure = OutOfMemory(engine, name, monkeypatch, range(first, first + times))
    requests = requests_of(prompts, limits)
    run(engine, requests)
    assert failure.raised == times
    assert [r.tokens for r in requests] == [
        pair.written(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)
    ]
    assert {r.finish_reason for r in requests} == {"length"}
    (*_, message) = caplog.messages
    assert message.startswith("out of memory: going on with at most")


def test_out_of_memory_on_a_cpu_is_a_plain_error(pair, monkeypatch):
    prompts, limits = memory_case()
    engine = pair.engine(rows=6, chunk=64)
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    OutOfMemory(engine, "step", monkeypatch, [2], error)
    requests = requests_of(prompts, limits)
    run(engine, requests)
    assert requests[0].tokens == pair.written(prompts[0], limits[0])


def test_a_prompt_that_fails_to_fit_does_not_leave_the_rest_one_by_one(pair, monkeypatch):
    """Only the pieces get shorter where a piece was too long."""
    monkeypatch.setattr(continuous, "MIN_CHUNK", 8)
    engine = pair.engine(rows=6, chunk=128)
    OutOfMemory(engine, "prefill", monkeypatch, [1, 2])
    batches = []
    step = engine.step
    monkeypatch.setattr(
        engine, "step", lambda batch, sampler: batches.append(batch) or step(batch, sampler)
    )
    prompts = prompts_of(128, *[6] * 12)
    requests = requests_of(prompts, [12] * 13)
    run(engine, requests)
    assert max(batches) == 6


@pytest.mark.parametrize("sampled", [False, True])
def test_out_of_memory_changes_no_draw(pair, monkeypatch, sampled):
    prompts, limits = memory_case()
    config = GenerationConfig(
        do_sample=sampled, temperature=0.9, top_k=30, top_p=0.95, repetition_penalty=1.2
    )
    config.typical_p = 1.0
    found = []
    for at in ([], [5, 9]):
        engine = pair.engine(rows=4, chunk=64)
        OutOfMemory(engine, "step", monkeypatch, at)
        sampler = Sampler(
            config, num_rows=4, vocab_size=61, device=engine.device, steps=max(limits)
        )
        requests = [
            Request(i, prompt, limit, uniforms(4, i, limit) if sampled else ())
            for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        run(engine, requests, sampler=sampler)
        found.append([request.tokens for request in requests])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["prefill", "step"])
def test_out_of_memory_without_end_is_an_error_and_nothing_finished_is_lost(
    pair, monkeypatch, name
):
    monkeypatch.setattr(continuous, "MIN_CHUNK", 8)
    prompts = prompts_of(5, 40, 60, 12)
    engine = pair.engine(rows=3, chunk=64)
    # the first prompt needs one token, and has it before the first step
    requests = requests_of(prompts, (1, 8, 8, 8))
    if name == "prefill":
        requests = requests[1:]
    failure = OutOfMemory(engine, name, monkeypatch, None)
    batcher = Batcher(engine, engine.greedy, ends=set())
    finished = []
    with pytest.raises(torch.OutOfMemoryError, match="Tried"):
        for request in batcher.run(iter(requests)):
            finished.append(request.index)
    assert finished == ([] if name == "prefill" else [0])
    assert failure.raised < 10


def test_out_of_memory_after_the_last_row_has_ended_is_no_error(pair, monkeypatch):
    """Its end is read after memory ran out for a step that it did not need."""
    engine = pair.engine(rows=1, chunk=16)
    monkeypatch.setattr(continuous, "MIN_CHUNK", 16)
    OutOfMemory(engine, "step", monkeypatch, [1])
    prompts = prompts_of(5, 9)
    ends = set(pair.written(prompts[0], 1))
    requests = requests_of(prompts, [6, 6])
    run(engine, requests, ends=ends)
    assert requests[0].tokens == []
    assert requests[1].tokens == pair.written(prompts[1], 6, ends)


def test_pieces_never_grow(pair, monkeypatch):
    """The rings of sliding windows have room for the pieces that were asked for."""
    engine = pair.engine(rows=4, chunk=16)
    OutOfMemory(engine, "step", monkeypatch, [2])
    calls = Calls(engine, monkeypatch)
    run(engine, requests_of(prompts_of(50, 30, 70, 8), [6] * 4))
    assert max(sum(len(c.tokens) for c in chunks) for chunks in calls.chunks) <= 16


def test_other_errors_are_raised(pair, monkeypatch):
    engine = pair.engine()
    OutOfMemory(engine, "step", monkeypatch, [1], RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run(engine, requests_of(prompts_of(5), [4]))


def test_requests_are_read_as_they_are_needed(pair):
    read = []

    def source():
        for request in requests_of(prompts_of(*[6] * 30), [2 + i % 7 for i in range(30)]):
            read.append(request.index)
            yield request

    engine = pair.engine(rows=3)
    batcher = Batcher(engine, engine.greedy, ends=set())
    finished = batcher.run(source())
    assert read == []
    for number, _ in enumerate(finished, start=1):
        assert len(read) <= number + 2 * 3 + 1
    assert read == list(range(30))


def test_a_run_that_is_left_halfway_leaves_the_engine_as_it_was(pair):
    prompts = prompts_of(90, 14, 33, 5, 120)
    engine = pair.engine(rows=3, pages=6)
    for limits in ((1, 30, 30, 30, 30), (30, 2, 30, 30, 30)):
        halfway = Batcher(engine, engine.greedy, ends=set()).run(iter(requests_of(prompts, limits)))
        next(halfway)
        halfway.close()
    requests = requests_of(prompts[::-1], [9] * 5)
    run(engine, requests)
    assert [r.tokens for r in requests] == [pair.written(prompt, 9) for prompt in prompts[::-1]]


@pytest.mark.parametrize("seed", range(4))
def test_anything_at_once(pair, monkeypatch, seed):
    """Shared prefixes, few pages, ends, limits and failures, drawn at random."""
    monkeypatch.setattr(continuous, "MIN_CHUNK", 8)
    draw = random.Random(seed)
    prefixes = [tokens(n, seed=100 + n) for n in (0, 64, 70, 130)]
    prompts = [
        draw.choice(prefixes) + tokens(draw.choice((1, 5, 20, 64)), seed=draw.randrange(6))
        for _ in range(20)
    ]
    limits = [draw.choice((1, 2, 7, 15)) for _ in prompts]
    ends = {pair.written(prompts[0], 5)[-1]}
    engine = pair.engine(
        rows=draw.choice((1, 4, 7)), pages=draw.choice((5, 9, 30)), chunk=draw.choice((40, 300))
    )
    OutOfMemory(engine, "prefill", monkeypatch, [draw.randrange(1, 9)])
    OutOfMemory(engine, "step", monkeypatch, draw.sample(range(1, 20), 2))
    requests = requests_of(prompts, limits)
    run(engine, requests, ends=ends)
    for request, prompt, limit in zip(requests, prompts, limits, strict=True):
        assert request.tokens == pair.written(prompt, limit, ends)
