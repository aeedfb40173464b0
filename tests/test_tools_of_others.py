"""What people use beside moezoo: streamers, peft, accelerate's device maps, torch's profiler."""

from copy import deepcopy
from threading import Thread

import pytest
import torch
from configurations import CONFIGURATIONS, reference
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

import moezoo
from moezoo.assets import tiny_model
from moezoo.layers.moe import ranges

PROMPT = "Once upon a time there was a dog"


@pytest.fixture
def model():
    return moezoo.from_pretrained(tiny_model(), dtype=torch.float32, device="cpu", progress=False)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model())


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(PROMPT, return_tensors="pt")["input_ids"]


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def test_an_iterator_gives_the_text_as_it_comes(model, tokenizer, ids):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"max_new_tokens": 12, "do_sample": False}
    thread = Thread(target=model.generate, args=(ids,), kwargs={"streamer": streamer, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    whole = model.generate(ids, **options)[0, ids.shape[1] :]
    assert len(pieces) > 3
    assert "".join(pieces) == tokenizer.decode(whole)


@pytest.mark.parametrize("quantization", [None, "int8_w8a16"])
def test_lora_on_attention(ids, tmp_path, quantization):
    peft = pytest.importorskip("peft")
    model = moezoo.from_pretrained(
        tiny_model(), dtype="float32", device="cpu", quantization=quantization, progress=False
    )
    before = logits(model, ids)
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["qkv", "o"], r=4, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapted, ids), before)  # LoRA begins at zero
    if quantization is not None:
        # No gradient comes through quantised experts, so there is inference alone.
        with pytest.raises(ValueError, match="no gradient through"):
            adapted(input_ids=ids, labels=ids).loss.backward()
        return
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = logits(adapted, ids)
    assert not torch.allclose(after, before, atol=0.1)
    assert adapted.generate(input_ids=ids, max_new_tokens=4).shape[1] == ids.shape[1] + 4
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, ids), before)

    adapted.save_pretrained(tmp_path)
    fresh = moezoo.from_pretrained(tiny_model(), dtype="float32", device="cpu", progress=False)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(again, ids), after)
    torch.testing.assert_close(logits(again.merge_and_unload(), ids), after, atol=1e-4, rtol=1e-4)


def test_a_lora_step_has_the_gradient_of_transformers(model, ids):
    """On the output projection of attention, which has the same weight on both sides."""
    peft = pytest.importorskip("peft")
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    gradients = []
    for whose, target in ((model, "o"), (theirs, "o_proj")):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=[target], r=2, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(whose, config)
        adapted(input_ids=ids, labels=ids).loss.backward()
        found = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
        assert len(found) == 6
        gradients.append(found)
    for ours, their in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, their, atol=1e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def latent_pair(tmp_path_factory):
    """Latent attention and a head of its own, ours and transformers'."""
    theirs = reference("deepseek_v3", CONFIGURATIONS["deepseek_v3"]["groups"])
    folder = tmp_path_factory.mktemp("latent")
    theirs.save_pretrained(folder)
    ours = moezoo.from_pretrained(folder, dtype="float32", device="cpu", progress=False)
    return ours, theirs


def test_lora_on_latent_attention_and_the_head(latent_pair):
    """Gradients and then logits are transformers', of modules whose weights are read elsewhere."""
    peft = pytest.importorskip("peft")
    ids = torch.arange(1, 12)[None]
    sides, found = (["o", "kv_b", "lm_head"], ["o_proj", "kv_b_proj", "lm_head"]), []
    for model, targets in zip(latent_pair, sides, strict=True):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=targets, r=2, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(deepcopy(model), config)
        adapted(input_ids=ids, labels=ids).loss.backward()
        learnt = [p for name, p in adapted.named_parameters() if "lora_B" in name]
        assert all(p.grad.any() for p in learnt)
        gradients = [p.grad.clone() for p in learnt]
        with torch.no_grad():
            for p in learnt:
                p.add_(p.grad.sign(), alpha=0.1)
        found.append((*gradients, logits(adapted, ids)))
        assert not torch.allclose(found[-1][-1], logits(model, ids), atol=0.1)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_replaced_and_hooked_heads_are_called(latent_pair):
    model = deepcopy(latent_pair[0])
    decoder, ids = model.decoder, torch.arange(1, 12)[None]
    before, seen = logits(model, ids), []
    modules = [decoder.lm_head, *(layer.attn.kv_b for layer in decoder.layers)]
    handles = [m.register_forward_hook(lambda *_: seen.append(1)) for m in modules]
    torch.testing.assert_close(logits(model, ids), before, atol=1e-4, rtol=1e-4)
    assert len(seen) == len(modules)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model, ids), before)
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    head.weight = decoder.lm_head.weight
    decoder.lm_head = head
    assert torch.equal(logits(model, ids), before)
    decoder.lm_head = torch.nn.Sequential(head, torch.nn.Tanh())
    assert torch.equal(logits(model, ids), before.tanh())


def test_layers_on_several_devices(model, ids, tmp_path):
    """As accelerate spreads them; a disk is the second device where there is only a CPU."""
    from accelerate import dispatch_model

    before = logits(model, ids)
    places = {f"decoder.layers.{i}": "cpu" if i < 3 else "disk" for i in range(6)}
    places |= {f"decoder.{name}": "cpu" for name in ("embed", "rope", "norm")}
    spread = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert next(spread.decoder.layers[5].parameters()).is_meta
    assert torch.equal(logits(spread, ids), before)
    assert spread.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


@pytest.mark.slow
def test_a_compiled_model_is_one_graph():
    """Of any length, with padding, and in a step over a cache."""
    config = AutoConfig.from_pretrained(tiny_model(), num_hidden_layers=1)
    model = moezoo.from_config(config, dtype="float32", device="cpu")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.arange(5, 17)[None]
    padding = torch.tensor([[0, 0] + [1] * 10])
    with torch.no_grad():
        for given in ({"input_ids": ids}, {"input_ids": ids[:, :7]}, {"attention_mask": padding}):
            given = {"input_ids": ids, "use_cache": False, **given}
            torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
        steps = []
        for each in (compiled, model):
            cache = each(ids).past_key_values
            steps.append(each(ids[:, :1], past_key_values=cache).logits)
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("quantization", [None, "int8_w8a16"])
def test_the_profiler_names_the_verbs(ids, quantization):
    model = moezoo.from_pretrained(
        tiny_model(), dtype="float32", device="cpu", quantization=quantization, progress=False
    )
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, torch.inference_mode():
        model(ids)
    calls = {event.key: event.count for event in profile.key_averages()}
    for verb in ("route", "permute", "experts"):
        assert calls[f"moezoo::{verb}"] == 6


def test_without_a_profiler_there_is_no_range(model, ids, monkeypatch):
    def fails(name):
        raise AssertionError(name)

    monkeypatch.setattr(ranges.torch.profiler, "record_function", fails)
    logits(model, ids)
