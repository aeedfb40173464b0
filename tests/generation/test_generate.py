"""`model.generate` against transformers', with the trained model of the package."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

import moezoo
from moezoo.assets import tiny_model

PROMPTS = [
    "Once upon a time there was a little fox",
    "The boat",
    "In the morning, the king said to his",
]
TOKENS = 12


class Pair(NamedTuple):
    ours: PreTrainedModel
    theirs: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def encode(self, *prompts: str) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(list(prompts), return_tensors="pt", padding=True))

    def both(self, *prompts: str, **options: Any) -> tuple[Any, Any]:
        """What each generates from the same seed."""
        results = []
        for model in (self.ours, self.theirs):
            torch.manual_seed(5)
            asked = {"max_new_tokens": TOKENS} | options
            results.append(model.generate(**self.encode(*prompts), **asked))
        return results[0], results[1]


def load(dtype: torch.dtype) -> Pair:
    folder = tiny_model()
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager"
    )
    ours = moezoo.from_pretrained(folder, dtype=dtype, device="cpu", progress=False)
    return Pair(ours, theirs, AutoTokenizer.from_pretrained(folder, padding_side="left"))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with torch.inference_mode():
        yield load(torch.float32)


def test_greedy_text(pair: Pair) -> None:
    ours, theirs = pair.both(*PROMPTS, do_sample=False, max_new_tokens=60)
    assert pair.tokenizer.batch_decode(ours) == pair.tokenizer.batch_decode(theirs)
    assert "fox" in pair.tokenizer.decode(ours[0])


def test_greedy_text_in_sixteen_bits() -> None:
    """Equal up to the first step at which the two best logits lie within rounding."""
    pair = load(torch.bfloat16)
    for prompt in PROMPTS:
        ours, theirs = pair.both(prompt, do_sample=False, max_new_tokens=40)
        prompt_length = pair.encode(prompt)["input_ids"].shape[1]
        shared = min(ours.shape[1], theirs.shape[1])
        apart = (ours[0, :shared] != theirs[0, :shared]).nonzero()
        if len(apart) or ours.shape != theirs.shape:
            end = apart[0, 0] if len(apart) else shared
            assert end > prompt_length
            best = pair.theirs(theirs[:, :end]).logits[0, -1].float().topk(2).values
            assert best[0] - best[1] <= 4 * torch.finfo(torch.bfloat16).eps * best[0].abs()


def test_one_prompt_equals_a_padded_batch(pair: Pair) -> None:
    batch, _ = pair.both(*PROMPTS, do_sample=False)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        alone, _ = pair.both(prompt, do_sample=False)
        text = pair.tokenizer.decode(row, skip_special_tokens=True)
        assert text == pair.tokenizer.decode(alone[0], skip_special_tokens=True)


SAMPLING: dict[str, dict[str, Any]] = {
    "checkpoint": {},
    "plain": {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
    "top-k": {"temperature": 0.7, "top_k": 9, "top_p": 1.0},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "min-p": {"min_p": 0.1, "top_p": 1.0},
    "typical": {"typical_p": 0.6, "epsilon_cutoff": 3e-4, "top_p": 1.0},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
    "several": {"num_return_sequences": 3, "temperature": 1.2},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampled_tokens(pair: Pair, name: str) -> None:
    ours, theirs = pair.both(*PROMPTS, do_sample=True, **SAMPLING[name])
    assert ours.tolist() == theirs.tolist()


def test_seed_reproduces(pair: Pair) -> None:
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        inputs = pair.encode(*PROMPTS)
        return pair.ours.generate(**inputs, do_sample=True, max_new_tokens=TOKENS).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


CONSTRAINTS: dict[str, dict[str, Any]] = {
    "bad-words": {"bad_words_ids": [[262], [263, 264]], "suppress_tokens": [16, 17]},
    "begin": {"begin_suppress_tokens": [13, 16], "forced_eos_token_id": 0},
    "bias": {"sequence_bias": [[[300], 5.0], [[265], -9.0]]},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: [200 + row, 300 + len(ids), 400]},
    "guided": {"guidance_scale": 1.5},
    "decay": {"exponential_decay_length_penalty": (4, 1.5)},
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_processors_of_transformers(pair: Pair, name: str) -> None:
    prompts = PROMPTS[:1] if name == "guided" else PROMPTS
    ours, theirs = pair.both(*prompts, do_sample=False, **CONSTRAINTS[name])
    assert ours.tolist() == theirs.tolist()


class Shift(LogitsProcessor):
    """Prefers tokens that it has seen an odd number of times."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        assert scores.dtype == torch.float32
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(scores))
        return scores + 2.5 * (counts % 2)


def test_custom_processor(pair: Pair) -> None:
    processors = LogitsProcessorList([Shift()])
    plain, _ = pair.both(*PROMPTS, do_sample=False)
    ours, theirs = pair.both(*PROMPTS, do_sample=False, logits_processor=processors)
    assert ours.tolist() == theirs.tolist() != plain.tolist()


def test_scores_and_logits(pair: Pair) -> None:
    ours, theirs = pair.both(
        *PROMPTS,
        do_sample=True,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert len(ours.scores) == len(ours.logits) == TOKENS
    for our, their in zip(ours.scores, theirs.scores, strict=True):
        assert our.isinf().equal(their.isinf())
        torch.testing.assert_close(our, their, atol=1e-3, rtol=1e-4)
    for our, their in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(our, their, atol=1e-3, rtol=1e-4)
    transitions = (
        model.compute_transition_scores(result.sequences, result.scores, normalize_logits=True)
        for model, result in ((pair.ours, ours), (pair.theirs, theirs))
    )
    torch.testing.assert_close(*transitions, atol=1e-3, rtol=1e-4)


def test_hidden_states_of_each_step(pair: Pair) -> None:
    ours, theirs = pair.both(
        PROMPTS[0], do_sample=False, return_dict_in_generate=True, output_hidden_states=True
    )
    assert [len(step) for step in ours.hidden_states] == [len(s) for s in theirs.hidden_states]
    torch.testing.assert_close(
        ours.hidden_states[-1][-1], theirs.hidden_states[-1][-1], atol=1e-3, rtol=1e-4
    )


def test_end_of_sequence(pair: Pair) -> None:
    """Rows end at different steps, at any of several tokens, and are padded from there."""
    free, _ = pair.both(*PROMPTS, do_sample=False)
    prompt_length = free.shape[1] - TOKENS
    ends = [free[0, prompt_length + 3].item(), free[1, prompt_length + 6].item()]
    options = {"do_sample": False, "eos_token_id": ends, "pad_token_id": 7}
    ours, theirs = pair.both(*PROMPTS, **options)
    assert ours.tolist() == theirs.tolist()
    assert ours[0, -1] == 7
    single, _ = pair.both(PROMPTS[0], do_sample=False, eos_token_id=ends[0])
    assert single[0, -1] == ends[0]
    assert (single[0] == ends[0]).sum() == 1


def test_stop_strings(pair: Pair) -> None:
    options = {"do_sample": False, "stop_strings": [" the", "."], "tokenizer": pair.tokenizer}
    ours, theirs = pair.both(*PROMPTS, max_new_tokens=40, **options)
    assert ours.tolist() == theirs.tolist()
    text = pair.tokenizer.decode(ours[1], skip_special_tokens=True)
    assert text.endswith((" the", "."))
    ours, theirs = pair.both(PROMPTS[1], max_new_tokens=40, num_beams=2, **options)
    assert ours.tolist() == theirs.tolist()


class RowLength(StoppingCriteria):
    """Row r stops once it has `first + 2 * r` tokens."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.first + 2 * torch.arange(len(input_ids))


def test_custom_stopping_criteria(pair: Pair) -> None:
    length = pair.encode(*PROMPTS)["input_ids"].shape[1]
    criteria = StoppingCriteriaList([RowLength(length + 2)])
    ours, theirs = pair.both(*PROMPTS, do_sample=False, stopping_criteria=criteria)
    assert ours.tolist() == theirs.tolist()
    assert ours.shape[1] == length + 6


def test_lengths(pair: Pair) -> None:
    for options in ({"max_new_tokens": 1}, {"max_length": 20, "max_new_tokens": None}):
        ours, theirs = pair.both(*PROMPTS, do_sample=False, **options)
        assert ours.tolist() == theirs.tolist()
    ours, _ = pair.both(PROMPTS[0], do_sample=False, max_new_tokens=10_000, max_time=0.0)
    assert ours.shape[1] <= pair.encode(PROMPTS[0])["input_ids"].shape[1] + 1


def test_text_streamer(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(pair.tokenizer, skip_prompt=True)
    inputs = pair.encode(PROMPTS[0])
    ids = pair.ours.generate(**inputs, do_sample=False, max_new_tokens=20, streamer=streamer)
    prompt_length = inputs["input_ids"].shape[1]
    assert capsys.readouterr().out.strip() == pair.tokenizer.decode(ids[0, prompt_length:]).strip()


def test_iterator_streamer(pair: Pair) -> None:
    streamer = TextIteratorStreamer(pair.tokenizer, timeout=20)
    inputs = pair.encode(PROMPTS[0])
    thread = threading.Thread(
        target=pair.ours.generate,
        kwargs=inputs | {"do_sample": False, "max_new_tokens": 20, "streamer": streamer},
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected, _ = pair.both(PROMPTS[0], do_sample=False, max_new_tokens=20)
    assert "".join(pieces) == pair.tokenizer.decode(expected[0])
    assert len(pieces) > 5


BEAMS: dict[str, dict[str, Any]] = {
    "three": {"num_beams": 3},
    "all-of-four": {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.3},
    "early": {"num_beams": 3, "early_stopping": True, "eos_token_id": 16},
    "sampled": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize("name", BEAMS)
def test_beams(pair: Pair, name: str) -> None:
    ours, theirs = pair.both(*PROMPTS, **{"do_sample": False} | BEAMS[name])
    assert ours.tolist() == theirs.tolist()


def test_beam_scores(pair: Pair) -> None:
    ours, theirs = pair.both(
        *PROMPTS, do_sample=False, num_beams=3, return_dict_in_generate=True, output_scores=True
    )
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=1e-4, rtol=1e-4)
    assert ours.beam_indices.equal(theirs.beam_indices)


@pytest.fixture(scope="module")
def assistant(pair: Pair) -> PreTrainedModel:
    """A model that mostly agrees with the first one: its weights, shaken."""
    model = moezoo.from_pretrained(tiny_model(), dtype=torch.float32, device="cpu", progress=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.2 * parameter.std() * noise
    return model


@pytest.mark.parametrize("sampled", [False, True])
def test_assisted_by_another_model(pair: Pair, assistant: PreTrainedModel, sampled: bool) -> None:
    options = {"do_sample": sampled, "max_new_tokens": 24}
    assisted, theirs = pair.both(PROMPTS[0], assistant_model=assistant, **options)
    if sampled:
        assert assisted.tolist() == theirs.tolist()
    else:
        alone, _ = pair.both(PROMPTS[0], **options)
        assert assisted.tolist() == alone.tolist()


def test_prompt_lookup(pair: Pair) -> None:
    prompt = "The fox ran to the barn. The fox ran to the house. The fox ran"
    options = {"do_sample": False, "max_new_tokens": 24}
    looked_up, _ = pair.both(prompt, prompt_lookup_num_tokens=3, **options)
    alone, _ = pair.both(prompt, **options)
    assert looked_up.tolist() == alone.tolist()


def test_cache_over_turns(pair: Pair) -> None:
    """The cache of one call goes into the next, whose prompt begins with the first result."""
    whole, _ = pair.both(PROMPTS[0], do_sample=False, max_new_tokens=20)
    inputs = pair.encode(PROMPTS[0])
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = pair.ours.generate(**inputs, max_new_tokens=8, **options)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    second = pair.ours.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=12, **options
    )
    assert second.sequences.tolist() == whole.tolist()
    told = torch.cat((second.sequences, pair.encode(" But then")["input_ids"]), 1)
    third = pair.ours.generate(
        told, past_key_values=second.past_key_values, max_new_tokens=6, **options
    )
    assert third.sequences.equal(
        pair.theirs.generate(told, do_sample=False, max_new_tokens=6, attention_mask=told * 0 + 1)
    )


@pytest.mark.parametrize("padding", [0, 2])
def test_new_tokens_alone_after_a_cache(pair: Pair, padding: int) -> None:
    """With a mask of all tokens, as transformers allows it."""
    ids = torch.arange(5, 16)[None]
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    written = []
    for model in (pair.ours, pair.theirs):
        cache = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
        new = {"attention_mask": mask, "past_key_values": cache}
        written.append(model.generate(ids[:, 8:], **new, max_new_tokens=4, do_sample=False))
    assert written[0].tolist() == written[1].tolist()


def test_cache_of_a_padded_batch_over_turns(pair: Pair) -> None:
    inputs = pair.encode(*PROMPTS)
    options = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    whole = pair.theirs.generate(**inputs, max_new_tokens=10, **options).sequences
    first = pair.ours.generate(**inputs, max_new_tokens=4, **options)
    mask = torch.cat((inputs["attention_mask"], torch.ones(3, 4, dtype=torch.long)), 1)
    second = pair.ours.generate(
        first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=6,
        **options,
    )
    assert second.sequences.tolist() == whole.tolist()


CACHES: dict[str, Callable[[], dict[str, Any]]] = {
    "none": lambda: {"use_cache": False},
    "own": lambda: {"past_key_values": DynamicCache()},
    "static": lambda: {"cache_implementation": "static"},
    "dynamic": lambda: {"cache_implementation": "dynamic"},
    "prefill-in-chunks": lambda: {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("name", CACHES)
def test_caches(pair: Pair, name: str) -> None:
    expected, _ = pair.both(*PROMPTS, do_sample=False)
    options = CACHES[name]()
    options |= {"disable_compile": True} if name == "static" else {}
    inputs = pair.encode(*PROMPTS)
    ours = pair.ours.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, **options)
    assert ours.tolist() == expected.tolist()


@pytest.mark.gpu
def test_an_offloaded_cache_is_offloaded() -> None:
    model = moezoo.from_pretrained(tiny_model(), dtype=torch.float32, progress=False)
    ids = torch.arange(30, 40, device=model.device)[None]
    options = {"do_sample": False, "max_new_tokens": TOKENS, "return_dict_in_generate": True}
    plain = model.generate(ids, **options)
    offloaded = model.generate(ids, cache_implementation="offloaded", **options)
    assert offloaded.sequences.equal(plain.sequences)
    assert offloaded.past_key_values.offloading
    assert {layer.keys.device.type for layer in offloaded.past_key_values.layers} == {"cpu", "cuda"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA it works")
def test_an_offloaded_cache_is_asked_of_transformers(pair: Pair) -> None:
    """Without CUDA that fails in transformers, and so it does here: it is not done silently."""
    options = {"do_sample": False, "max_new_tokens": 3, "cache_implementation": "offloaded"}
    errors = []
    for model in (pair.ours, pair.theirs):
        with pytest.raises(Exception) as caught:
            model.generate(torch.tensor([[5, 6]]), **options)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_embeddings_as_prompt(pair: Pair) -> None:
    inputs = pair.encode(*PROMPTS)
    embeds = pair.ours.get_input_embeddings()(inputs.pop("input_ids"))
    options = inputs | {"do_sample": False, "max_new_tokens": TOKENS}
    ours, theirs = (m.generate(inputs_embeds=embeds, **options) for m in (pair.ours, pair.theirs))
    assert ours.tolist() == theirs.tolist()


def test_no_prompt(pair: Pair) -> None:
    options = {"do_sample": False, "max_new_tokens": TOKENS}
    ours, theirs = (model.generate(**options) for model in (pair.ours, pair.theirs))
    assert ours.tolist() == theirs.tolist()


def test_prompt_longer_than_a_growing_cache(pair: Pair) -> None:
    """Buffers grow while decoding: 130 tokens are two doublings from the smallest."""
    ids = torch.randint(1, 4096, (2, 60), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": 80, "eos_token_id": None}
    ours, theirs = (
        model.generate(ids, attention_mask=ids * 0 + 1, **options)
        for model in (pair.ours, pair.theirs)
    )
    assert ours.tolist() == theirs.tolist()
