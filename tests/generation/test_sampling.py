"""The engine's sampler against transformers' processors and warpers."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from moezoo.assets import tiny_model
from moezoo.generation.sampling import Sampler, SeededDraw, invert, uniforms, warpers

VOCABULARY = 50
SETTINGS = {
    "plain": {"top_k": 0},
    "default-top-k": {},
    "temperature": {"temperature": 0.6, "top_k": 0},
    "hot": {"temperature": 3.0, "top_k": 0},
    "top-k": {"top_k": 5},
    "top-k-1": {"top_k": 1},
    "top-k-all": {"top_k": 500},
    "top-p": {"top_p": 0.7, "top_k": 0},
    "top-p-0": {"top_p": 0.0, "top_k": 0},
    "min-p": {"min_p": 0.2, "top_k": 0},
    "penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6, "top_k": 0},
    "all": {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
    },
}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_model())


def resolved(model, **settings):
    """A config with every field set, as `offline.generate` has it."""
    unset = {"temperature": None, "top_k": None, "top_p": None, "do_sample": True}
    config, _ = model._prepare_generation_config(GenerationConfig(**unset | settings))
    return config


def theirs(model, config):
    """transformers' own list for these settings."""
    return model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")


def sampler(config, rows, steps=None):
    return Sampler(
        config, num_rows=rows, vocab_size=VOCABULARY, device=torch.device("cpu"), steps=steps
    )


def logits_and_prompts(rows, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, VOCABULARY, generator=generator)
    return logits, torch.randint(VOCABULARY, (rows, 6), generator=generator)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_warpers_are_those_of_transformers_in_their_order(model, name):
    config = resolved(model, **SETTINGS[name])
    expected = [p for p in theirs(model, config) if "Penalty" not in type(p).__name__]
    found = warpers(config, torch.device("cpu"))
    assert [type(warper) for warper in found] == [type(warper) for warper in expected]
    assert {type(p) for p in theirs(model, config)} <= set(Sampler.PROCESSORS)


@pytest.mark.parametrize("name", SETTINGS)
def test_seeded_draws_are_those_from_the_scores_of_transformers(model, name):
    rows, steps = 7, 12
    config = resolved(model, **SETTINGS[name])
    ours = sampler(config, rows, steps)
    processors = theirs(model, config)
    _, sequences = logits_and_prompts(rows)
    streams = [uniforms(3, row, steps) for row in range(rows)]
    for row in range(rows):
        ours.start(row, sequences[row].tolist(), streams[row])
    for step in range(steps):
        logits, _ = logits_and_prompts(rows, seed=step + 1)
        scores = processors(sequences, logits)
        numbers = torch.tensor([stream[step] for stream in streams], dtype=torch.float64)
        expected = invert(scores, numbers)
        tokens = ours(logits, slice(0, rows))
        assert tokens.tolist() == expected.tolist()
        assert torch.isfinite(scores.gather(1, tokens[:, None])).all()
        sequences = torch.cat((sequences, tokens[:, None]), 1)


def test_seeded_draws_are_those_of_the_other_path(model):
    """`SeededDraw` is what goes through `model.generate`."""
    rows, steps = 5, 8
    config = resolved(model, temperature=0.8, top_k=20, top_p=0.9)
    ours = sampler(config, rows, steps)
    _, sequences = logits_and_prompts(rows)
    table = torch.tensor([uniforms(9, row, steps) for row in range(rows)], dtype=torch.float64)
    draw = SeededDraw(config, table, prompt_length=sequences.shape[1])
    for row in range(rows):
        ours.start(row, sequences[row].tolist(), table[row].tolist())
    for step in range(steps):
        logits, _ = logits_and_prompts(rows, seed=step + 1)
        tokens = ours(logits, slice(0, rows))
        assert tokens.tolist() == draw(sequences, logits).argmax(-1).tolist()
        sequences = torch.cat((sequences, tokens[:, None]), 1)


@pytest.mark.parametrize("penalty", [1.0, 1.7, 0.6])
def test_greedy_with_a_penalty(model, penalty):
    rows = 6
    config = resolved(model, do_sample=False, repetition_penalty=penalty)
    ours = sampler(config, rows)
    processors = theirs(model, config)
    _, sequences = logits_and_prompts(rows)
    for row in range(rows):
        ours.start(row, sequences[row].tolist(), ())
    for step in range(20):
        logits, _ = logits_and_prompts(rows, seed=step // 2, scale=1.0)
        expected = processors(sequences, logits).argmax(-1)
        tokens = ours(logits, torch.arange(rows))
        assert tokens.tolist() == expected.tolist()
        sequences = torch.cat((sequences, tokens[:, None]), 1)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("name", ["plain", "temperature", "top-k", "top-p", "min-p", "all"])
def test_many_draws_follow_the_distribution(model, name, seeded):
    """Chi-square over the tokens that transformers leaves, of 20,000 draws."""
    rows = 20_000
    config = resolved(model, **SETTINGS[name])
    logits, prompt = logits_and_prompts(1)
    chances = theirs(model, config)(prompt, logits).softmax(-1)[0].double()
    ours = sampler(config, rows, steps=1 if seeded else None)
    if ours.seen is not None:
        ours.seen[:, prompt[0]] = True
    if ours.uniforms is not None:
        numbers = [uniforms(0, row, 1) for row in range(rows)]
        ours.uniforms.copy_(torch.tensor(numbers, dtype=torch.float64))
    torch.manual_seed(0)
    counts = ours(logits.expand(rows, -1), slice(0, rows)).bincount(minlength=VOCABULARY)
    assert counts[chances == 0].sum() == 0
    # Tokens that are too rare for the statistic count together.
    common = chances * rows >= 10
    expected = torch.cat((chances[common], chances[~common].sum()[None])) * rows
    found = torch.cat((counts[common], counts[~common].sum()[None]))
    kept = expected > 0
    chi_square = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_torch_s_seed_decides_draws_without_a_seed(model):
    config = resolved(model, top_k=0)
    logits, _ = logits_and_prompts(30)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(sampler(config, 30)(logits, slice(0, 30)).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_rows_do_not_know_of_each_other(model):
    """Rows begin at other times, and are called in any order and company."""
    config = resolved(model, **SETTINGS["all"])
    rows, steps = 4, 6
    logits, prompts = logits_and_prompts(rows)
    streams = [uniforms(1, row, steps) for row in range(rows)]
    alone = {}
    for row in range(rows):
        one = sampler(config, rows, steps)
        one.start(2, prompts[row].tolist(), streams[row])
        at = torch.tensor([2])
        alone[row] = [one(logits[row : row + 1] + step, at).item() for step in range(steps)]
    ours = sampler(config, rows, steps)
    together = {row: [] for row in range(rows)}
    for now in range(rows + steps):
        if now < rows:
            ours.start(now, prompts[now].tolist(), streams[now])
        active = [row for row in reversed(range(rows)) if 0 <= now - row < steps]
        if not active:
            continue
        given = torch.stack([logits[row] + (now - row) for row in active])
        for row, token in zip(active, ours(given, torch.tensor(active)).tolist(), strict=True):
            together[row].append(token)
    assert together == alone


def test_a_row_goes_on_where_it_was(model):
    """After running out of memory a row begins again with the tokens that it has."""
    config = resolved(model, **SETTINGS["all"])
    steps = 6
    logits, prompt = logits_and_prompts(1)
    stream = uniforms(1, "a", steps)
    whole = sampler(config, 2, steps)
    whole.start(0, prompt[0].tolist(), stream)
    expected = [whole(logits, slice(0, 1)).item() for _ in range(steps)]
    again = sampler(config, 2, steps)
    again.start(1, list(range(VOCABULARY)), uniforms(2, "b", steps))  # what was there before
    again(logits, slice(1, 2))
    again.start(1, [*prompt[0].tolist(), *expected[:2]], stream, step=2)
    assert [again(logits, slice(1, 2)).item() for _ in range(2, steps)] == expected[2:]


def test_state_changes_in_place_and_of_the_rows_asked_only(model):
    """As a CUDA graph needs it."""
    config = resolved(model, **SETTINGS["all"])
    ours = sampler(config, 5, steps=4)
    state = ours.state()
    assert all(x.shape[0] == 5 for x in state)
    places = [x.data_ptr() for x in state]
    before = [x.clone() for x in state]
    logits, prompts = logits_and_prompts(5)
    ours(logits[:2], slice(1, 3))
    ours(logits[:2], torch.tensor([1, 2]))
    assert [x.data_ptr() for x in ours.state()] == places
    assert ours.step[:, 0].tolist() == [0, 2, 2, 0, 0]
    for old, new in zip(before, ours.state(), strict=True):
        assert torch.equal(old[[0, 3, 4]], new[[0, 3, 4]])
    ours.start(4, prompts[4].tolist(), uniforms(0, 0, 4))
    assert [x.data_ptr() for x in ours.state()] == places


def test_more_steps_than_numbers_end_with_the_last(model):
    """Rows that nobody waits for go on until their end is read."""
    ours = sampler(resolved(model, top_k=0), 1, steps=2)
    ours.start(0, [], uniforms(0, 0, 2))
    logits, _ = logits_and_prompts(1)
    drawn = [ours(logits, slice(0, 1)).item() for _ in range(4)]
    assert drawn[1] == drawn[2] == drawn[3]


def test_a_stream_depends_on_seed_and_id():
    assert uniforms(1, "a", 5) == uniforms(1, "a", 9)[:5]
    streams = [uniforms(seed, id, 3) for seed in (0, 1) for id in (0, 1, "0", "1")]
    assert len({tuple(stream) for stream in streams}) == len(streams)
    assert all(0 <= number < 1 for stream in streams for number in stream)
