"""Log-probabilities against transformers' model: its logits, text by text, and its loss."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moezoo
from moezoo.assets import tiny_model
from moezoo.generation import score as scoring
from moezoo.generation.texts import Prompt

TEXTS = [
    "Once upon a time there was a little dog.",
    "He said: come here!",
    "One day a girl called Anna went to the market, and it rained, so she went home again.",
    "It",
]


@pytest.fixture(scope="module")
def model():
    return moezoo.from_pretrained(tiny_model(), dtype=torch.float32, device="cpu", progress=False)


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model())


def expected(reference, ids):
    with torch.inference_mode():
        logits = reference(torch.tensor([ids])).logits[0]
    return logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).flatten()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_of_every_text(model, reference, tokenizer, batch_size):
    scores = list(moezoo.score(model, tokenizer, TEXTS, batch_size=batch_size))
    assert [score.id for score in scores] == [0, 1, 2, 3]
    for text, score in zip(TEXTS, scores, strict=True):
        ids = tokenizer(text).input_ids
        assert score.token_ids == tuple(ids)
        assert math.isnan(score.logprobs[0])
        wanted = expected(reference, ids)
        torch.testing.assert_close(torch.tensor(score.logprobs[1:]), wanted, atol=1e-4, rtol=0)
        assert score.logprob == pytest.approx(wanted.sum().item(), abs=1e-3)


def test_perplexity_is_transformers_loss(model, reference, tokenizer):
    (score,) = moezoo.score(model, tokenizer, [" ".join(TEXTS)])
    ids = torch.tensor([score.token_ids])
    with torch.inference_mode():
        loss = reference(ids, labels=ids).loss.item()
    assert math.log(score.perplexity) == pytest.approx(loss, abs=1e-4)
    (single,) = moezoo.score(model, tokenizer, [[5]])
    assert math.isnan(single.perplexity) and single.logprob == 0.0


def test_logits_are_made_in_chunks(model, tokenizer, monkeypatch):
    whole = list(moezoo.score(model, tokenizer, TEXTS))
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 3 * len(TEXTS) * model.config.vocab_size)
    for score, other in zip(moezoo.score(model, tokenizer, TEXTS), whole, strict=True):
        assert score.logprobs[1:] == pytest.approx(other.logprobs[1:], abs=1e-5)


def test_a_completion_is_scored_by_its_own_tokens(model, reference, tokenizer):
    prompts = ["Once upon a time", {"id": "dog", "prompt": "The dog"}]
    completions = list(moezoo.generate(model, tokenizer, prompts, max_new_tokens=5))
    scores = list(moezoo.score(model, tokenizer, completions))
    assert [score.id for score in scores] == [0, "dog"]
    for completion, score in zip(completions, scores, strict=True):
        ids = [*tokenizer(completion.prompt).input_ids, *completion.token_ids]
        assert score.token_ids == tuple(ids)
        assert score.num_prompt_tokens == completion.num_prompt_tokens
        wanted = expected(reference, ids)[completion.num_prompt_tokens - 1 :]
        assert score.logprob == pytest.approx(wanted.sum().item(), abs=1e-3)


def test_prompt_and_completion_are_one_text(model, reference, tokenizer):
    record = {"id": "x", "prompt": TEXTS[0], "completion": " It barked."}
    (score,) = moezoo.score(model, tokenizer, [record])
    ids = tokenizer(TEXTS[0] + " It barked.").input_ids
    before = len(tokenizer(TEXTS[0]).input_ids)
    assert (score.id, score.token_ids, score.num_prompt_tokens) == ("x", tuple(ids), before)
    wanted = expected(reference, ids)[before - 1 :]
    assert score.perplexity == pytest.approx(wanted.mean().neg().exp().item(), rel=1e-4)


def test_a_completion_of_nothing(model, tokenizer):
    """All its tokens are scored, after the token that an empty prompt becomes."""
    (completion,) = moezoo.generate(model, tokenizer, [""], max_new_tokens=4, do_sample=False)
    record = {"prompt": "", "completion": completion.text}
    from_text, expected = moezoo.score(model, tokenizer, [record, completion])
    assert from_text.token_ids == expected.token_ids and from_text.num_prompt_tokens == 1
    assert from_text.logprobs[1:] == pytest.approx(expected.logprobs[1:], abs=1e-5)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a"], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (["a", 3], {}, "text 1: expected a text, a mapping, token ids or a Completion"),
        ([[]], {}, "text 0 has no tokens"),
        ([{"prompt": "a"}], {}, 'text 0: "prompt" and "completion" must be strings'),
        ([[1] * 100_000], {}, "text 0 has 100000 tokens and the model's context is"),
        (["a", [5, 4096]], {}, "text 1: token 1 has the id 4096, and the model's vocabulary has"),
        ([[-100, 5]], {}, "text 0: token 0 has the id -100, and the model's vocabulary has"),
    ],
)
def test_refuses(model, tokenizer, texts, options, message):
    with pytest.raises(ValueError, match=message):
        list(moezoo.score(model, tokenizer, texts, **options))


@pytest.mark.parametrize(
    "single",
    ["Hello", b"Hello", {"prompt": "a", "completion": "b"}, Prompt(0, "Hello")],
    ids=lambda single: type(single).__name__,
)
def test_a_single_text_is_refused_at_the_call(model, tokenizer, single):
    message = f"this is a single {type(single).__name__}; put it into a list"
    with pytest.raises(ValueError, match=message):
        moezoo.score(model, tokenizer, single)
    with pytest.raises(ValueError, match=message):
        moezoo.generate(model, tokenizer, single)


def test_models_of_transformers_are_refused_at_the_call(reference, tokenizer):
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM is not a model of moezoo"):
        moezoo.score(reference, tokenizer, ["a"])
