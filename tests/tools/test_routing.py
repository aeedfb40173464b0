import json

import pytest
import torch
from configurations import CONFIGURATIONS, reference
from scipy.stats import entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import moezoo
from moezoo.assets import tiny_model
from moezoo.generation.engine import Engine
from moezoo.generation.graphs import capturable
from moezoo.generation.keeper import fingerprint
from moezoo.tools.routing import RoutingTrace

PROMPTS = ["Once upon a time", "The dog", "A cat sat on the roof and looked at the moon"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return moezoo.from_pretrained(tiny_model(), dtype=torch.float32, device="cpu", progress=False)


@pytest.fixture(scope="module")
def theirs():
    return AutoModelForCausalLM.from_pretrained(
        tiny_model(), dtype=torch.float32, attn_implementation="eager"
    )


def chosen_by_transformers(theirs, inputs):
    """topk_ids [T, 4] of each layer, of tokens that are no padding."""
    with torch.inference_mode():
        logits = theirs(**inputs, output_router_logits=True).router_logits
    real = inputs["attention_mask"].flatten().bool()
    return [layer[real].topk(4).indices for layer in logits]


def test_what_transformers_routers_choose(model, theirs, tokenizer):
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert (inputs["attention_mask"] == 0).any()
    with moezoo.record_routing(model, choices=True) as trace, torch.inference_mode():
        model(**inputs)
        assert len(trace.topk_ids[0]) == inputs["attention_mask"].sum()
        model(**inputs)
    expected = chosen_by_transformers(theirs, inputs)
    assert trace.layers == tuple(range(6))
    for layer, ids in enumerate(expected):
        twice = torch.cat((ids, ids))
        assert torch.equal(trace.topk_ids[layer].sort().values, twice.sort().values.int())
        load = twice.flatten().bincount(minlength=16)
        assert torch.equal(trace.expert_load[layer], load)
        assert torch.equal(trace.load_history[:, layer].sum(0), load)
    assert trace.expert_load.dtype == torch.int64
    assert trace.load_history.shape == (2, 6, 16)
    weights = trace.topk_weights[3]
    assert weights.shape == trace.topk_ids[3].shape
    bins = (weights / weights.sum(-1, keepdim=True) * 50).long().clamp(max=49).flatten()
    assert torch.equal(trace.score_histogram[3], bins.bincount(minlength=50))
    assert trace.about == {
        "model": str(tiny_model()),
        "experts_per_token": 4,
        "expert_bytes": 3 * 64 * 256 * 4,
    }


@pytest.mark.parametrize("continuous", [True, False])
def test_generation_counts_every_token_once(model, tokenizer, continuous):
    """The last token of a sequence goes through no layer."""
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    with moezoo.record_routing(model) as trace:
        if continuous:
            options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
            done = [*moezoo.generate(model, tokenizer, PROMPTS, **options)]
            assert [len(completion.token_ids) for completion in done] == [5] * 3
        else:
            inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
            model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert trace.expert_load.sum(1).tolist() == [4 * (sum(lengths) + 3 * 4)] * 6
    assert trace.load_history[1:].sum((1, 2)).tolist() == [4 * 3 * 6] * 4
    assert trace.topk_ids is None


def test_nothing_is_left_behind(model, tokenizer):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    before = fingerprint(model.decoder), set(model.state_dict())
    with torch.inference_mode():
        expected = model(**inputs).logits
        with moezoo.record_routing(model) as trace:
            assert fingerprint(model.decoder) != before[0]
            assert set(model.state_dict()) == before[1]
            assert torch.equal(model(**inputs).logits, expected)
            with pytest.raises(ValueError, match="is being recorded already"):
                moezoo.record_routing(model).__enter__()
        load = trace.expert_load.clone()
        model(**inputs)
    assert torch.equal(trace.expert_load, load)
    assert (fingerprint(model.decoder), set(model.state_dict())) == before


def test_the_history_keeps_the_last_passes(model, tokenizer):
    with moezoo.record_routing(model, history=3) as trace, torch.inference_mode():
        for length in range(1, 6):
            model(torch.ones(1, length, dtype=torch.int64))
            assert trace.load_history[-1].sum(1).tolist() == [4 * length] * 6
    assert trace.load_history.sum(2)[:, 0].tolist() == [12, 16, 20]
    assert trace.expert_load.sum(1).tolist() == [4 * 15] * 6


def test_steps_are_captured_unless_choices_are_kept(model):
    for choices in (False, True):
        with moezoo.record_routing(model, choices=choices):
            assert capturable(model.decoder) == (not choices)
    assert capturable(model.decoder)


def test_passes_that_do_nobodys_work_are_forgotten(model):
    with moezoo.record_routing(model, choices=True) as trace, torch.inference_mode():
        model(torch.ones(1, 2, dtype=torch.int64))
        before = trace.expert_load
        with model.decoder.recorder.uncounted():
            model(torch.ones(1, 7, dtype=torch.int64))
        assert torch.equal(trace.expert_load, before)
        assert len(trace.topk_ids[0]) == 2
        assert len(trace.load_history) == 1


def test_dense_layers_are_not_among_them(tmp_path):
    reference("deepseek_v3", CONFIGURATIONS["deepseek_v3"]["groups"]).save_pretrained(tmp_path)
    model = moezoo.from_pretrained(tmp_path, device="cpu", progress=False)
    dense = model.config.first_k_dense_replace
    with moezoo.record_routing(model) as trace, torch.inference_mode():
        model(torch.ones(1, 3, dtype=torch.int64))
    assert trace.layers == tuple(range(dense, model.config.num_hidden_layers))
    assert trace.expert_load.shape[1] == model.config.n_routed_experts


def test_a_file_gives_back_what_was_saved(model, tmp_path):
    with moezoo.record_routing(model, choices=True) as trace, torch.inference_mode():
        model(torch.ones(1, 3, dtype=torch.int64))
    trace.save(tmp_path / "trace.safetensors")
    loaded = RoutingTrace.load(tmp_path / "trace.safetensors")
    assert (loaded.layers, loaded.about) == (trace.layers, trace.about)
    for name in ("expert_load", "load_history", "score_histogram"):
        assert torch.equal(getattr(loaded, name), getattr(trace, name))
    for ours, theirs in zip(trace.topk_ids, loaded.topk_ids, strict=True):
        assert torch.equal(ours, theirs)


def test_files_that_are_no_trace(tmp_path):
    path = tmp_path / "trace.safetensors"
    with pytest.raises(OSError, match="trace"):
        RoutingTrace.load(path)
    path.write_text("no")
    with pytest.raises(ValueError, match="is no safetensors file"):
        RoutingTrace.load(path)
    with pytest.raises(ValueError, match="is not a trace of moezoo routing"):
        RoutingTrace.load(tiny_model() / "model.safetensors")


def test_the_summary(model):
    with moezoo.record_routing(model) as trace, torch.inference_mode():
        model(torch.arange(11)[None])
    for i, layer in enumerate(trace.summary()):
        load = trace.expert_load[i].tolist()
        assert (layer.layer, layer.tokens) == (i, 11)
        assert load[layer.busiest] == max(load)
        assert layer.imbalance == pytest.approx(max(load) / (11 * 4 / 16))
        assert layer.entropy == pytest.approx(entropy(load, base=2))
        assert layer.effective_experts == pytest.approx(2 ** entropy(load, base=2))
        assert layer.dead == tuple(e for e in range(16) if load[e] == 0)
    assert any(layer.dead for layer in trace.summary())
    assert json.loads(json.dumps(trace.to_dict()))["layers"][3]["tokens"] == 11


def test_coactivation_counts_pairs(model):
    with moezoo.record_routing(model, choices=True) as trace, torch.inference_mode():
        model(torch.arange(11)[None])
    expected = torch.zeros(6, 16, 16, dtype=torch.int64)
    for layer, ids in enumerate(trace.topk_ids):
        for token in ids.tolist():
            for a in token:
                for b in token:
                    expected[layer, a, b] += 1
    assert torch.equal(trace.coactivation, expected)
    with moezoo.record_routing(model) as trace:
        pass
    assert trace.coactivation is None


def test_the_plot_shows_layers_and_experts(model, tmp_path):
    pytest.importorskip("matplotlib")
    with moezoo.record_routing(model) as trace, torch.inference_mode():
        model(torch.arange(40)[None])
    figure = trace.plot()
    heat, bars = figure.axes[:2]
    assert heat.images[0].get_array().shape == (6, 16)
    widths = [bar.get_width() for bar in bars.patches]
    assert widths == pytest.approx(trace.imbalance.tolist())
    figure.savefig(tmp_path / "routing.png")


def test_other_models_are_refused(theirs, model):
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM is not a model of moezoo"):
        moezoo.record_routing(theirs).__enter__()
    with pytest.raises(ValueError, match="history must be at least 1"):
        moezoo.record_routing(model, history=0).__enter__()


@pytest.mark.gpu
def test_captured_steps_are_counted_too(tokenizer):
    """Rows and places of prompts that fill up a graph, and what runs before a capture, are not."""
    model = moezoo.from_pretrained(tiny_model(), device="cuda", progress=False)
    prompts = [*PROMPTS, "The sea", "An old king"]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to("cuda")
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    once = 4 * (sum(lengths) + 5 * 8)  # a sequence's last token goes through no layer
    for _ in range(2):
        with moezoo.record_routing(model) as trace:
            assert len([*moezoo.generate(model, tokenizer, prompts, **options)]) == 5
        assert trace.expert_load.sum(1).tolist() == [once] * 6
        assert trace.load_history.sum(0).equal(trace.expert_load)
        with moezoo.record_routing(model) as trace:
            for _ in range(3):  # the second time the prompts' pass becomes a graph
                model.generate(**inputs, max_new_tokens=9, min_new_tokens=9, do_sample=False)
        assert trace.expert_load.sum(1).tolist() == [3 * once] * 6


@pytest.mark.gpu
def test_recording_does_not_wait_for_the_device():
    model = moezoo.from_pretrained(tiny_model(), device="cuda", progress=False)
    with moezoo.record_routing(model), torch.inference_mode():
        engine = Engine(model.decoder, num_rows=4, context=64)
        engine.prefill_all([[1, 2, 3], [4, 5]])
        engine.step(4)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                engine.step(4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
