"""The engine against transformers' greedy `generate`, prompt by prompt, for every architecture."""

from operator import itemgetter

import pytest
import torch
from configurations import CONFIGURATIONS, reference
from test_oracle import write
from transformers import AutoModelForCausalLM, AutoTokenizer

import moezoo
from moezoo.assets import tiny_model
from moezoo.generation.continuous import Batcher, Request
from moezoo.generation.engine import Engine, supports
from moezoo.generation.paged import counts_padding

STORY = "One day a little dog went to the market with his friend and saw a big red ball"
LENGTHS = (5, 1, 13, 8, 2, 11, 3)
NEW = 6
CASES = [(model_type, name) for model_type, cases in CONFIGURATIONS.items() for name in cases]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def prompts(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 61, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module", params=CASES, ids=[f"{m}-{n}" for m, n in CASES])
def folder(request, tmp_path_factory):
    """A checkpoint, and what transformers writes after each prompt."""
    model_type, name = request.param
    if model_type == "kimi_k2":
        pytest.skip("another name of deepseek_v3")
    theirs = reference(model_type, CONFIGURATIONS[model_type][name])
    path = tmp_path_factory.mktemp(f"{model_type}-{name}")
    write(model_type, theirs, path)
    # With a cache transformers 5.17 forgets the text where Phi passes its original context.
    options = {"do_sample": False, "pad_token_id": 0, "use_cache": model_type != "phimoe"}
    with torch.inference_mode():
        written = [
            theirs.generate(torch.tensor([ids]), max_new_tokens=NEW, **options)[
                0, len(ids) :
            ].tolist()
            for ids in prompts()
        ]
    return path, written


def load(path, device):
    return moezoo.from_pretrained(path, dtype=torch.float32, device=device, progress=False)


def batcher(model, *, rows=3, chunk=16, pages=None, ends=()):
    decoder = model.decoder
    engine = Engine(decoder, num_rows=rows, context=64, pages=pages, chunk=chunk)
    return Batcher(engine, engine.greedy, ends=set(ends))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.sampled(n=5, by=itemgetter(0))  # a model type
def test_continuous_batching_writes_what_transformers_writes(folder, device):
    path, written = folder
    model = load(path, device)
    if not supports(model.decoder):
        pytest.skip("its rotation depends on the length")
    requests = [Request(i, ids, NEW) for i, ids in enumerate(prompts())]
    finished = list(batcher(model).run(iter(requests)))
    assert sorted(request.index for request in finished) == list(range(len(requests)))
    assert [request.tokens for request in requests] == written
    assert {request.finish_reason for request in requests} == {"length"}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one(folder):
    path, written = folder
    model = load(path, "cuda:1")
    if not supports(model.decoder):
        pytest.skip("its rotation depends on the length")
    requests = [Request(i, ids, NEW) for i, ids in enumerate(prompts())]
    list(batcher(model).run(iter(requests)))
    assert [request.tokens for request in requests] == written
    ids = torch.tensor(prompts()[:1]).to("cuda:1")
    for _ in range(2):
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert out[0, ids.shape[1] :].tolist() == written[0]
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_generate_writes_what_transformers_writes(folder):
    path, written = folder
    model = load(path, "cuda")
    if not supports(model.decoder):
        pytest.skip("its rotation depends on the length, here that of the whole batch")
    given = prompts()
    longest = max(map(len, given))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in given])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in given])
    if counts_padding(model.decoder):  # the batch writes something else than each prompt alone
        theirs = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        written = theirs.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()
    for _ in range(2):  # the second time with the graph of the first
        out = model.generate(
            ids.cuda(),
            attention_mask=mask.cuda(),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        assert out[:, longest:].tolist() == written


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_writes_the_same_alone_and_among_32(device):
    model = load(tiny_model(), device)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    story = STORY.split()
    given = [" ".join(story[: 1 + i % 12]) + " and" * (i // 12) for i in range(32)]
    options = {"max_new_tokens": 16, "do_sample": False}
    together = {
        c.id: c.token_ids
        for c in moezoo.generate(model, tokenizer, given, batch_size=32, **options)
    }
    assert len(together) == 32
    for i in (0, 5, 17, 31):
        (alone,) = moezoo.generate(model, tokenizer, [given[i]], **options)
        assert alone.token_ids == together[i]
        inputs = tokenizer(given[i], return_tensors="pt").to(device)
        tokens = model.generate(**inputs, pad_token_id=0, **options)[0]
        new = tokens[inputs.input_ids.shape[1] :].tolist()
        assert tuple(new[: len(together[i])]) == together[i]
