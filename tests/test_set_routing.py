"""Routing that is forced, banned, biased, or of another k, and undone."""

from functools import partial

import pytest
import torch
from configurations import CONFIGURATIONS, reference
from test_oracle import write
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

import moezoo
from moezoo.assets import tiny_model
from moezoo.layers.moe import FusedMoE

IDS = torch.tensor([[5, 17, 300, 2, 41, 9, 80, 1200]])


@pytest.fixture(scope="module")
def model():
    return moezoo.from_pretrained(tiny_model(), dtype=torch.float32, device="cpu", progress=False)


@pytest.fixture(scope="module")
def theirs():
    return AutoModelForCausalLM.from_pretrained(
        tiny_model(), dtype=torch.float32, attn_implementation="eager"
    )


def logits(model):
    with torch.inference_mode():
        return model(IDS % model.config.vocab_size).logits


def choices(model):
    with moezoo.record_routing(model, choices=True) as trace:
        logits(model)
    return trace.topk_ids


def their_logits(theirs: Qwen3MoeForCausalLM, change, k):
    """transformers' model with `change` made to the router logits, and k experts a token."""

    def route(self, hidden_states):
        raw = change(torch.nn.functional.linear(hidden_states.flatten(0, -2), self.weight))
        weights, ids = raw.softmax(-1, dtype=torch.float32).topk(k, dim=-1)
        return raw, weights / weights.sum(-1, keepdim=True), ids

    gates = [layer.mlp.gate for layer in theirs.model.layers]
    for gate in gates:
        gate.forward = partial(route, gate)
    try:
        with torch.inference_mode():
            return theirs(IDS).logits
    finally:
        for gate in gates:
            del gate.forward


def filled(raw, experts, value):
    raw = raw.clone()
    raw[:, experts] = value
    return raw


def above(best):
    return best + 1e-3 * best.abs().clamp(min=1)


@pytest.mark.parametrize(
    ("options", "change", "k"),
    [
        ({"k": 2}, lambda raw: raw, 2),
        ({"ban": [0, 3, 7]}, lambda raw: filled(raw, [0, 3, 7], float("-inf")), 4),
        ({"bias": {2: 1.5, 11: -0.5}, "k": 3}, lambda raw: raw + BIAS, 3),
        (
            {"force": [13, 1]},
            lambda raw: torch.where(FORCED, above(raw.amax(-1, keepdim=True)), raw),
            4,
        ),
    ],
    ids=["k", "ban", "bias", "force"],
)
def test_logits_are_those_of_transformers_with_the_same_change(model, theirs, options, change, k):
    before = logits(model)
    with model.set_routing(**options):
        changed = logits(model)
    assert not torch.allclose(changed, before, atol=1e-2)
    torch.testing.assert_close(changed, their_logits(theirs, change, k), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model), before)


BIAS = torch.zeros(16)
BIAS[2], BIAS[11] = 1.5, -0.5
FORCED = torch.zeros(16, dtype=torch.bool)
FORCED[[1, 13]] = True


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_router_follows(name, tmp_path):
    write(name, reference(name, next(iter(CONFIGURATIONS[name].values()))), tmp_path)
    model = moezoo.from_pretrained(tmp_path, device="cpu", progress=False)
    layer = next(x.mlp for x in model.decoder.layers if isinstance(x.mlp, FusedMoE))
    first, last = 0, len(layer.gate) - 1
    before = logits(model)
    with model.set_routing(ban=[last], force=[first]):
        for ids in choices(model):
            assert (ids == first).any(1).all()
            assert not (ids == last).any()
    with model.set_routing(k=1):
        assert {ids.shape[1] for ids in choices(model)} == {1}
    assert torch.equal(logits(model), before)


def test_a_forced_expert_weighs_as_much_as_the_best(model):
    with moezoo.record_routing(model, choices=True) as plain:
        logits(model)
    with model.set_routing(force=[6], layers=[0]), moezoo.record_routing(model, choices=True) as t:
        logits(model)
    ids, weights = t.topk_ids[0], t.topk_weights[0]
    others = weights.masked_fill(ids == 6, 0.0).amax(1)
    assert torch.allclose(weights[ids == 6], torch.maximum(others, weights[ids == 6]))
    best = plain.topk_ids[0][:, :1]
    assert (ids == best).any(1).all()


def test_only_the_layers_that_are_named(model):
    plain = choices(model)
    with model.set_routing(ban=[4, 5], layers=[2]):
        changed = choices(model)
    assert torch.equal(plain[0], changed[0]) and torch.equal(plain[1], changed[1])
    assert not torch.isin(changed[2], torch.tensor([4, 5])).any()
    assert torch.isin(changed[3], torch.tensor([4, 5])).any()


def test_without_a_block_it_lasts_until_undo(model):
    before = logits(model)
    override = model.set_routing(k=1)
    assert not torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="is changed already"):
        model.set_routing(k=2)
    names = set(model.state_dict())
    override.undo()
    override.undo()
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == names


def test_tokens_are_counted_with_the_k_of_the_time(model):
    with model.set_routing(k=2), moezoo.record_routing(model) as trace:
        logits(model)
    assert [layer.tokens for layer in trace.summary()] == [8] * 6


def test_generation_follows_and_returns(model):
    options = {"max_new_tokens": 8, "do_sample": False}
    before = model.generate(IDS, **options)
    with model.set_routing(k=1):
        assert not torch.equal(model.generate(IDS, **options), before)
    assert torch.equal(model.generate(IDS, **options), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ban": [16]}, "ban: there is no expert 16, only 0 to 15"),
        ({"bias": {-1: 1.0}}, "bias: there is no expert -1"),
        ({"k": 0}, "k is 0, and a token has 16 experts to choose from"),
        ({"ban": range(13)}, "k is 4, and a token has 3 experts to choose from"),
        ({"force": range(5)}, "5 experts are forced, and a token has k = 4"),
        ({"force": [1], "ban": [1]}, "expert 1 is forced, so it can be neither"),
        ({"bias": {1: 1.0}, "ban": [1]}, "expert 1 is banned, so it can have no bias"),
        ({"ban": 3}, r"ban must be a list of indices, such as \[3\], got 3"),
        ({"force": "3"}, "force must be a list of indices, .* got '3'"),
        ({"force": [1.5]}, "each index in force must be an integer, got 1.5"),
        ({"ban": (expert for expert in (0, 1))}, "ban must be a list of indices"),
        ({"layers": 2}, "layers must be a list of indices, .* got 2"),
        ({"layers": ["2"]}, "each index in layers must be an integer, got '2'"),
        ({"bias": [3]}, r"bias must map experts to numbers, such as \{3: 1.5\}, got \[3\]"),
        ({"bias": {1: "a"}}, "bias of expert 1 must be a number, got 'a'"),
        ({"bias": {1: None}}, "bias of expert 1 must be a number, got None"),
        ({"bias": {"1": 2.0}}, "each expert in bias must be an integer, got '1'"),
        ({"k": "2"}, "k must be an integer, got '2'"),
        ({"layers": [6]}, "layer 6 has no experts; those with experts are 0, 1, 2, 3, 4, 5"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(model, options, message):
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        model.set_routing(**options)
    assert torch.equal(logits(model), before)


@pytest.mark.gpu
def test_captured_steps_follow():
    model = moezoo.from_pretrained(tiny_model(), dtype=torch.float32, device="cuda", progress=False)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = IDS.cuda()
    plain = model.generate(ids, **options)
    changed = []
    for ban in ([0, 1, 2], [3, 4, 5]):
        with model.set_routing(ban=ban), moezoo.record_routing(model) as trace:
            changed.append(model.generate(ids, **options))
        assert trace.expert_load[:, ban].sum() == 0
        assert trace.expert_load.sum() > 0
    assert not torch.equal(changed[0], changed[1])
    assert torch.equal(model.generate(ids, **options), plain)
