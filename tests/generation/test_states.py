"""Layers with a state on the engine: rows begin, go on in chunks, move and end."""

import pytest
import torch
from configurations import CONFIGURATIONS, reference
from transformers import DynamicCache

import moezoo
from moezoo.generation.continuous import Batcher, Request
from moezoo.generation.engine import Engine
from moezoo.generation.keeper import EngineKeeper
from moezoo.generation.memory import rows_and_pages_that_fit
from moezoo.generation.paged import row_state_bytes, token_bytes
from moezoo.generation.pages import PAGE_SIZE
from moezoo.generation.prompts import Chunk, rectangles

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONTEXT = 256
NEW = 6
STATEFUL = {
    "qwen3_next": "one-in-four",
    "lfm2_moe": "biased",
    "granitemoehybrid": "unrotated",
    "kimi_linear": "one-in-four",
}


def token_ids(length, seed):
    return torch.randint(1, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=STATEFUL.items(), ids=STATEFUL)
def folder(request, tmp_path_factory):
    model_type, name = request.param
    config = CONFIGURATIONS[model_type][name] | {"max_position_embeddings": CONTEXT}
    path = tmp_path_factory.mktemp(model_type)
    reference(model_type, config).save_pretrained(path)
    return path


@pytest.fixture(params=DEVICES)
def model(request, folder):
    return moezoo.from_pretrained(folder, dtype=torch.float32, device=request.param, progress=False)


def alone(model, prompt, new=NEW):
    """What follows it on a cache of transformers."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        output = model(ids, use_cache=True)
        tokens = [output.logits[0, -1].argmax().item()]
        while len(tokens) < new:
            ids = torch.tensor([tokens[-1:]], device=model.device)
            output = model(ids, past_key_values=output.past_key_values)
            tokens.append(output.logits[0, -1].argmax().item())
    return tokens


def run(model, prompts, limits, *, rows=3, chunk=CONTEXT, pages=None):
    engine = Engine(model.decoder, num_rows=rows, context=CONTEXT, chunk=chunk, pages=pages)
    batcher = Batcher(engine, engine.greedy, ends=set())
    requests = [Request(i, p, n) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]
    list(batcher.run(iter(requests)))
    return [request.tokens for request in requests]


@pytest.mark.parametrize("chunk", [5, 64, 100, CONTEXT])
@pytest.mark.sampled(n=2)
def test_prompts_of_all_lengths_in_chunks(model, chunk):
    prompts = [token_ids(n, n) for n in (150, 1, 64, 7, 65, 128, 3, 90)]
    expected = [alone(model, prompt) for prompt in prompts]
    assert run(model, prompts, [NEW] * len(prompts), chunk=chunk) == expected


def test_rows_end_and_move_one_after_another(model):
    prompts = [token_ids(4 + n % 3, n) for n in range(12)]
    limits = [1 + 5 * n % 9 for n in range(12)]
    expected = [alone(model, p, n) for p, n in zip(prompts, limits, strict=True)]
    assert run(model, prompts, limits, rows=8) == expected
    assert run(model, prompts, limits, rows=5, pages=7) == expected


def test_prompts_that_begin_alike_are_computed_each(model):
    start = token_ids(2 * PAGE_SIZE, 1)
    prompts = [start + token_ids(n, n) for n in (3, 9)] + [start]
    expected = [alone(model, prompt) for prompt in prompts]
    assert run(model, prompts, [NEW] * 3, rows=1) == expected
    assert run(model, prompts, [NEW] * 3, rows=3) == expected


@pytest.mark.parametrize("model", DEVICES[1:], indirect=True)
@torch.inference_mode()
def test_a_row_that_has_no_tokens_yet_is_left_alone_by_steps(model):
    """Its prompt is half read when others take a step; on a CPU there are no such rows."""
    engine = Engine(model.decoder, num_rows=2, context=CONTEXT)
    prompts = token_ids(9, 1), token_ids(30, 2)
    for row in range(2):
        engine.assign(row, range(row * 4, row * 4 + 4))
    first = engine.prefill([Chunk(0, prompts[0])]).argmax(-1)
    engine.prefill([Chunk(1, prompts[1][:17])])
    engine.start([0], [9], first)
    engine.step(2, engine.greedy)
    second = engine.prefill([Chunk(1, prompts[1][17:], 17)]).argmax(-1)
    assert second.tolist() == alone(model, prompts[1], 1)
    engine.start([1], [30], second)
    engine.step(2, engine.greedy)
    assert engine.ids.tolist() == [alone(model, prompts[0], 3)[2], alone(model, prompts[1], 2)[1]]


@torch.inference_mode()
def test_rows_are_used_again_and_states_of_old_prompts_forgotten(model):
    keeper = EngineKeeper()
    for seed in range(3):
        with keeper.engine(model.decoder, 1, 100) as engine:
            engine.cache.states[0][0].fill_(torch.nan)
            logits = engine.prefill_all([token_ids(5, seed)])
        assert logits.argmax(-1).tolist() == alone(model, token_ids(5, seed), 1)


def test_generate_returns_a_cache_that_goes_on(model):
    ids = torch.tensor([token_ids(9, 1), token_ids(9, 2)], device=model.device)
    options = {"do_sample": False, "pad_token_id": 0}
    whole = model.generate(ids, max_new_tokens=8, **options)
    some = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **options)
    assert some.sequences.equal(whole[:, :12])
    rest = model.generate(
        some.sequences, past_key_values=some.past_key_values, max_new_tokens=5, **options
    )
    assert rest.equal(whole)


def test_memory_counts_the_states(model):
    decoder = model.decoder
    row, page = row_state_bytes(decoder), token_bytes(decoder) * PAGE_SIZE
    engine = Engine(decoder, num_rows=3, context=CONTEXT, pages=5)
    assert engine.cache.nbytes == 3 * row + 5 * page
    options = {"num_rows": 64, "context": CONTEXT, "chunk": CONTEXT}
    rows, pages = rows_and_pages_that_fit(decoder, cache_bytes=20 * row, **options)
    assert rows == 10
    assert rows * row + pages * page <= 20 * row
    with pytest.raises(ValueError, match=f"takes {row + page}"):
        rows_and_pages_that_fit(decoder, cache_bytes=row, **options)


def test_tokens_cannot_be_taken_back(model):
    ids = torch.tensor([token_ids(9, 1)], device=model.device)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=2, pad_token_id=0)


def test_a_cache_without_a_place_for_states(model):
    ids = torch.tensor([token_ids(9, 1)], device=model.device)
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(ids, past_key_values=DynamicCache())


def test_rectangles_hold_every_token_once():
    lengths = (150, 1, 64, 7, 65, 128, 200)
    chunks = [Chunk(row, [0] * n, 3 * (row % 2)) for row, n in enumerate(lengths)]
    found = rectangles(chunks, torch.device("cpu"))
    places = [r.places.flatten()[r.filled] for r in found]
    assert torch.cat(places).sort().values.equal(torch.arange(sum(lengths)))
    assert [r.rows.tolist() for r in found] == [[0, 6], [1, 2, 3], [4, 5]]
    assert [r.begins.tolist() for r in found] == [[True, True], [False, True, False], [True, False]]
    with pytest.raises(ValueError, match="two chunks of one row"):
        rectangles([Chunk(1, [0]), Chunk(1, [0], 1)], torch.device("cpu"))
