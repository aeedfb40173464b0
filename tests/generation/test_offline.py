"""Offline generation against transformers' own `generate`, prompt by prompt."""

import pytest
import torch
from configurations import CONFIGURATIONS
from configurations import reference as model_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import moezoo
from moezoo.assets import tiny_model
from moezoo.errors import MoEOutOfMemoryError
from moezoo.generation import on_engine
from moezoo.generation.offline import generate
from moezoo.generation.sampling import SeededDraw
from moezoo.generation.settings import check_options
from moezoo.generation.texts import Completion, Prompt

PROMPTS = [
    "Once upon a time",
    "The dog",
    "One day a little girl called Anna went to the market",
    "He said:",
    "It was",
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return moezoo.from_pretrained(tiny_model(), dtype=torch.float32, device="cpu", progress=False)


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model())


def in_order(completions):
    """They come as they finish."""
    return sorted(completions, key=lambda completion: completion.id)


def texts(completions):
    return [completion.text for completion in in_order(completions)]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_greedy_is_what_transformers_writes_for_each_prompt_alone(
    model, reference, tokenizer, batch_size
):
    options = {"batch_size": batch_size, "max_new_tokens": 12, "do_sample": False}
    completions = in_order(generate(model, tokenizer, PROMPTS, **options))
    assert completions == list(generate(reference, tokenizer, PROMPTS, **options))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = reference.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
        assert completion.token_ids == tuple(alone[inputs.input_ids.shape[1] :].tolist())
        assert prompt + completion.text == tokenizer.decode(alone, skip_special_tokens=True)
        assert completion.num_prompt_tokens == inputs.input_ids.shape[1]
    assert [completion.id for completion in completions] == [0, 1, 2, 3, 4]


def test_a_seeded_completion_depends_on_seed_and_id_only(model, tokenizer):
    def sampled(prompts, batch_size, seed):
        return {
            c.id: c.text
            for c in generate(
                model, tokenizer, prompts, batch_size=batch_size, seed=seed, max_new_tokens=12
            )
        }

    prompts = [Prompt(f"p{i}", text) for i, text in enumerate(PROMPTS)]
    whole = sampled(prompts, 5, seed=1)
    torch.rand(3)  # the global random state plays no part
    assert sampled(prompts, 2, seed=1) == whole
    assert sampled(prompts[3:], 1, seed=1) == {id: whole[id] for id in ("p3", "p4")}
    assert sampled(prompts, 5, seed=2) != whole
    same_text = sampled([Prompt("a", "The dog"), Prompt("b", "The dog")], 2, seed=1)
    assert same_text["a"] != same_text["b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite, got 0.0"),
        ({"repetition_penalty": float("inf")}, "got inf"),
        ({"stop_strings": ["a", ""]}, "stop_strings must be texts that are not empty, got ''"),
        ({"stop_strings": [3]}, "got 3"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_generated(
    model, tokenizer, options, message
):
    for refuse in (
        lambda: generate(model, tokenizer, ["The dog"], **options),
        lambda: check_options(**options),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()


def test_what_greedy_search_does_not_use_is_not_refused(model, tokenizer):
    """Some checkpoints say temperature 0 beside do_sample false."""
    (completion,) = generate(model, tokenizer, ["It"], do_sample=False, temperature=0.0)
    assert completion.error is None


@pytest.mark.parametrize(
    ("num_prompts", "settings", "message"),
    [
        (3, {}, "one prompt alone is too much for cpu.*: a smaller cache_bytes or max_new_tokens"),
        (3, {"num_beams": 2}, "3 prompts at once is too much for cpu: a batch size below 3"),
        (1, {"num_beams": 2}, "1 prompt at once is too much for cpu: a shorter prompt or a small"),
    ],
)
def test_what_does_not_fit_is_an_out_of_memory_error(
    model, tokenizer, num_prompts, settings, message
):
    """torch's CPU allocator raises a plain RuntimeError, as this hook finds."""
    layer = model.decoder.layers[3]
    hook = layer.register_forward_pre_hook(lambda *_: torch.empty(1 << 50) and None)
    try:
        with pytest.raises(MoEOutOfMemoryError, match=message):
            next(generate(model, tokenizer, ["It"] * num_prompts, batch_size=4, **settings))
    finally:
        hook.remove()


def test_other_errors_of_torch_stay_what_they_are(model, tokenizer):
    layer = model.decoder.layers[3]
    hook = layer.register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    try:
        with pytest.raises(RuntimeError, match="inconsistent tensor size"):
            next(generate(model, tokenizer, ["It"]))
    finally:
        hook.remove()


def test_seeded_draws_follow_the_distribution():
    draws = 4000
    logits = torch.tensor([0.1, 2.0, -torch.inf, 1.0, 0.5]).expand(draws, -1)
    uniforms = (torch.arange(draws, dtype=torch.float64) / draws)[:, None]
    config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=3, top_p=1.0, min_p=None, typical_p=1.0
    )
    drawn = SeededDraw(config, uniforms, prompt_length=4)(torch.zeros(draws, 4).long(), logits)
    counts = drawn.argmax(-1).bincount(minlength=5) / draws
    kept = torch.tensor([-torch.inf, 2.0, -torch.inf, 1.0, 0.5])
    torch.testing.assert_close(counts, (kept / 0.7).softmax(-1), atol=1e-3, rtol=0)
    assert torch.isfinite(drawn).sum(-1).eq(1).all()


def test_every_step_takes_its_own_number():
    uniforms = torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, typical_p=1.0)
    draw = SeededDraw(config, uniforms, prompt_length=3)
    logits = torch.zeros(1, 2)
    assert draw(torch.zeros(1, 3).long(), logits).argmax() == 0
    assert draw(torch.zeros(1, 4).long(), logits).argmax() == 1


def test_settings_come_from_overrides_then_the_config_given_then_the_model(model, tokenizer):
    prompts = PROMPTS[:1]
    greedy = texts(generate(model, tokenizer, prompts, max_new_tokens=8, do_sample=False))
    config = GenerationConfig(max_new_tokens=8, do_sample=False)
    assert texts(generate(model, tokenizer, prompts, generation_config=config)) == greedy
    (shorter,) = generate(model, tokenizer, prompts, generation_config=config, max_new_tokens=3)
    assert len(shorter.token_ids) == 3
    # the checkpoint's own generation_config.json samples
    draws = {
        text
        for seed in range(4)
        for text in texts(generate(model, tokenizer, prompts, max_new_tokens=8, seed=seed))
    }
    assert len(draws) > 1


def test_a_stop_string_ends_the_text_before_it(model, tokenizer):
    options = {"max_new_tokens": 20, "do_sample": False}
    (free,) = generate(model, tokenizer, PROMPTS[:1], **options)
    stop = free.text[9:14]
    (stopped, other) = generate(model, tokenizer, PROMPTS[:2], stop_strings=[stop], **options)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < len(free.token_ids)
    assert stop in tokenizer.decode(stopped.token_ids)
    assert stop not in tokenizer.decode(stopped.token_ids[:-1])
    assert stop not in other.text


def test_end_of_text_ends_the_tokens_before_it(model, tokenizer):
    options = {"max_new_tokens": 10, "do_sample": False}
    (free,) = generate(model, tokenizer, PROMPTS[:1], **options)
    end = free.token_ids[4]
    assert free.finish_reason == "length"
    (ended, _) = generate(model, tokenizer, PROMPTS[:2], eos_token_id=end, **options)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(end)]
    assert ended.finish_reason == "stop"


def test_a_prompt_longer_than_the_context_fails_alone(model, tokenizer):
    completions = in_order(
        generate(
            model,
            tokenizer,
            [PROMPTS[0], "word " * 600, "word " * 505, PROMPTS[1]],
            max_new_tokens=12,
            do_sample=False,
        )
    )
    assert [c.finish_reason for c in completions] == ["length", "error", "length", "length"]
    assert "602 tokens" in completions[1].error
    assert "context is 512" in completions[1].error
    # what room is left is used and no more
    assert completions[2].num_prompt_tokens + len(completions[2].token_ids) == 512
    alone = generate(model, tokenizer, [PROMPTS[0]], max_new_tokens=12, do_sample=False)
    assert completions[0] == next(alone)


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_one_new_token(model, reference, tokenizer, batch_size):
    options = {"max_new_tokens": 1, "do_sample": False, "batch_size": batch_size}
    completions = in_order(generate(model, tokenizer, iter(PROMPTS * 3), **options))
    assert completions == list(generate(reference, tokenizer, PROMPTS * 3, **options))


def test_what_the_cache_has_no_room_for_fails_alone(model, tokenizer):
    page = 64 * 3072 * 2  # of the small model in fp32
    options = {"max_new_tokens": 60, "do_sample": False, "cache_bytes": 2 * page + 5}
    first, failed, last = in_order(
        generate(model, tokenizer, [PROMPTS[0], "word " * 80, PROMPTS[1]], **options)
    )
    assert failed.finish_reason == "error"
    assert failed.error.startswith("141 tokens of prompt and completion do not fit the KV cache of")
    assert failed.num_prompt_tokens == 82
    for completion, prompt in ((first, PROMPTS[0]), (last, PROMPTS[1])):
        (alone,) = generate(model, tokenizer, [prompt], max_new_tokens=60, do_sample=False)
        assert completion.token_ids == alone.token_ids
    with pytest.raises(ValueError, match=f"cache_bytes is {page - 1}, but one prompt of 64 tokens"):
        next(generate(model, tokenizer, PROMPTS, cache_bytes=page - 1))


def test_a_model_of_sliding_windows_only(tokenizer, tmp_path):
    config = CONFIGURATIONS["mixtral"]["window"]
    theirs = model_of("mixtral", config | {"vocab_size": 4096, "max_position_embeddings": 400})
    theirs.save_pretrained(tmp_path)
    ours = moezoo.from_pretrained(tmp_path, dtype=torch.float32, device="cpu", progress=False)
    prompts = [*PROMPTS, "word " * 200]
    options = {"max_new_tokens": 70, "do_sample": False}
    expected = list(generate(theirs, tokenizer, prompts, batch_size=1, **options))
    for limits in ({}, {"cache_bytes": 200_000, "batch_tokens": 30}):
        assert in_order(generate(ours, tokenizer, prompts, **options, **limits)) == expected


@pytest.mark.parametrize(
    ("settings", "in_engine"),
    [
        ({}, True),
        ({"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1}, True),
        ({"repetition_penalty": 1.2, "stop_strings": ["."]}, True),
        ({"max_new_tokens": 10**12, "stop_strings": [" "], "do_sample": True, "seed": 1}, True),
        ({"num_beams": 2}, False),
        ({"do_sample": True, "typical_p": 0.5}, False),
        ({"no_repeat_ngram_size": 2}, False),
        ({"min_new_tokens": 2}, False),
        ({"min_length": 9}, False),
        ({"encoder_repetition_penalty": 1.3}, False),
        ({"max_time": 5.0}, False),
        ({"cache_implementation": "static", "disable_compile": True}, False),
        ({"prompt_lookup_num_tokens": 2, "batch_size": 1}, False),
    ],
)
def test_what_runs_on_the_engine_and_what_does_not(
    model, tokenizer, monkeypatch, settings, in_engine
):
    made = []
    engine = on_engine.Engine
    monkeypatch.setattr(on_engine, "Engine", lambda *a, **k: made.append(1) or engine(*a, **k))
    settings = {"max_new_tokens": 3, "do_sample": False} | settings
    (completion,) = generate(model, tokenizer, PROMPTS[:1], **settings)
    assert completion.error is None
    assert completion.token_ids
    assert bool(made) == in_engine


def test_an_empty_prompt_begins_with_the_first_token_there_is(model, tokenizer):
    options = {"max_new_tokens": 5, "do_sample": False}
    empty, explicit = generate(model, tokenizer, ["", "<|endoftext|>"], **options)
    assert empty.token_ids == explicit.token_ids
    tokenizer.bos_token = tokenizer.eos_token = None
    (failed, after) = generate(model, tokenizer, ["", PROMPTS[0]], **options)
    assert failed.finish_reason == "error"
    assert "the prompt is empty" in failed.error
    assert after.finish_reason == "length"


def test_chat_goes_through_the_template(model, tokenizer):
    options = {"max_new_tokens": 5, "do_sample": False}
    tokenizer.chat_template = TEMPLATE
    hello = [{"role": "user", "content": "hello"}]
    chat, messages, refused = in_order(
        generate(
            model,
            tokenizer,
            ["hello", {"messages": hello}, {"messages": [{"role": "robot", "content": ""}]}],
            chat=True,
            **options,
        )
    )
    (plain,) = generate(model, tokenizer, ["user: hello\nassistant:"], **options)
    assert chat.text == messages.text == plain.text
    assert messages.prompt == hello
    assert refused.finish_reason == "error"
    assert "no robots" in refused.error


def test_tokens_outside_the_vocabulary_fail_alone(model, reference, tokenizer):
    tokenizer.add_tokens(["<new>"])
    new = len(tokenizer) - 1
    for one in (model, reference):
        failed, after = in_order(generate(one, tokenizer, ["<new>", "hello"], max_new_tokens=2))
        assert f"token 0 has the id {new}, and the model's vocabulary has 4096" in failed.error
        assert after.error is None


def test_without_a_template_chat_is_refused_and_messages_fail_alone(model, tokenizer):
    with pytest.raises(ValueError, match="has no chat template"):
        generate(model, tokenizer, ["hello"], chat=True)
    record = {"id": "m", "messages": [{"role": "user", "content": "hello"}]}
    failed, after = generate(model, tokenizer, [record, "hello"], max_new_tokens=2)
    assert "no chat template" in failed.error
    assert isinstance(after, Completion)
    assert after.error is None


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_prompts_with_one_id_are_refused(model, tokenizer, options):
    message = "prompts 0 and 1 have the same id, 1; give each one of its own"
    prompts = [{"id": 1, "prompt": "a"}, "b"]
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, prompts, **options)
    with pytest.raises(ValueError, match=message):
        list(generate(model, tokenizer, iter(prompts), **options))


def test_prompts_are_read_as_they_are_needed(model, tokenizer):
    read = []

    def source():
        for prompt in PROMPTS:
            read.append(prompt)
            yield prompt

    completions = generate(model, tokenizer, source(), batch_size=2, max_new_tokens=1)
    assert read == []
    next(completions)
    assert read == PROMPTS[:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 0.5}, "unknown generation options: temprature"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "top_p": 2.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_length": 20}, "use max_new_tokens"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences must be 1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": "x"}, "batch_size must be an integer of at least 1, got 'x'"),
        ({"batch_size": 2.0}, "batch_size must be an integer of at least 1, got 2.0"),
        ({"batch_size": True}, "batch_size must be an integer of at least 1, got True"),
        ({"seed": "x"}, "seed must be an integer, or None .*, got 'x'"),
        ({"seed": 1.5}, "seed must be an integer, or None .*, got 1.5"),
        ({"streamer": object()}, "a streamer needs batch_size=1"),
        ({"seed": 0, "num_beams": 2, "do_sample": True}, "seed needs num_beams=1"),
    ],
)
def test_wrong_options_raise_before_anything_runs(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, PROMPTS, **options)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": 1}, 'one of "prompt" and "messages" is needed'),
        ({"prompt": "a", "messages": []}, 'one of "prompt" and "messages" is needed'),
        ({"prompt": 3}, '"prompt" must be a string, got int'),
        ({"messages": []}, '"messages" must be a non-empty list'),
        ({"messages": ["hello"]}, '"messages" must be a non-empty list'),
        ({"id": 1.5, "prompt": "a"}, "id must be a string or an integer, got 1.5"),
        ({"id": True, "prompt": "a"}, "id must be a string or an integer, got True"),
    ],
)
def test_malformed_records_say_what_is_wrong(record, message):
    with pytest.raises(ValueError, match=message):
        Prompt.from_record(record, default_id=0)


def test_a_record_without_an_id_takes_its_position():
    assert Prompt.from_record({"prompt": "a", "id": None}, default_id=7) == Prompt(7, "a")
    assert Prompt.from_record({"prompt": "a", "topic": "b"}, default_id=7) == Prompt(7, "a")
