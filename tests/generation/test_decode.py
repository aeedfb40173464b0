"""The token loop on the engine against the one on transformers' caches, both on the CPU."""

import weakref
from copy import deepcopy
from threading import Barrier, Thread

import pytest
import torch
from configurations import CONFIGURATIONS
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import moezoo
from moezoo.assets import tiny_model
from moezoo.generation import keeper as keeper_module
from moezoo.generation.cache import growing_cache
from moezoo.generation.continuous import Batcher, Request
from moezoo.generation.decode import decode, decode_paged, unpadded
from moezoo.generation.engine import Engine
from moezoo.generation.graphs import capturable
from moezoo.generation.keeper import EngineKeeper

PROMPTS = ["Once upon a time there was a little fox", "The boat", "In the morning, the king said"]
PAD = 0
NEW = 14


class Stream(BaseStreamer):
    def __init__(self):
        self.pieces = []
        self.ended = False

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended = True


class RowLength(StoppingCriteria):
    """Ends the first row after two tokens, the next after four, and so on."""

    def __init__(self, prompt_length):
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores, **kwargs):
        rows = torch.arange(len(input_ids))
        return input_ids.shape[1] - self.prompt_length >= 2 * (rows + 1)


@pytest.fixture(scope="module")
def model():
    return moezoo.from_pretrained(tiny_model(), dtype=torch.float32, device="cpu", progress=False)


@pytest.fixture(scope="module")
def inputs():
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(), padding_side="left")
    return dict(tokenizer(PROMPTS, return_tensors="pt", padding=True))


def both(model, inputs, processors=(), criteria=(), *, engine=None, **settings):
    """What each loop makes of the same arguments, with its stream."""
    input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
    config = GenerationConfig(**settings)
    config._pad_token_tensor = torch.tensor(PAD)
    criteria = [MaxLengthCriteria(input_ids.shape[1] + NEW), *criteria]
    results = []
    for paged in (True, False):
        stream = Stream()
        arguments = {
            "logits_processor": LogitsProcessorList(processors),
            "stopping_criteria": StoppingCriteriaList(criteria),
            "generation_config": config,
            "streamer": stream,
        }
        torch.manual_seed(7)
        if paged:
            engine = engine or Engine(model.decoder, num_rows=len(input_ids), context=64, chunk=8)
            prompts = unpadded(input_ids, mask, None)
            decoded = decode_paged(engine, prompts, input_ids, **arguments)
            assert not engine.lengths.any()
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            decoded = decode(
                model.decoder,
                input_ids,
                growing_cache(model.config),
                attention_mask=mask,
                position_ids=None if mask.all() else positions,
                **arguments,
            )
        assert stream.ended
        results.append((decoded, stream.pieces))
    return results


def assert_same(results):
    (ours, our_stream), (theirs, their_stream) = results
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert our_stream == their_stream
    for name in ("scores", "logits"):
        kept = getattr(ours, name), getattr(theirs, name)
        assert len(kept[0]) == len(kept[1])
        for one, other in zip(*kept, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def ends_of(model, inputs, places):
    """Tokens that greedy search writes at these (row, step)."""
    (ours, _), _ = both(model, inputs)
    length = inputs["input_ids"].shape[1]
    return [int(ours.sequences[row, length + step]) for row, step in places]


def test_greedy(model, inputs):
    results = both(model, inputs)
    assert_same(results)
    assert results[0][0].sequences.shape[1] == inputs["input_ids"].shape[1] + NEW


def test_one_prompt(model, inputs):
    one = {name: x[:1] for name, x in inputs.items()}
    assert_same(both(model, one))
    assert_same(both(model, one, do_sample=True))


PROCESSORS = {
    "penalty": [RepetitionPenaltyLogitsProcessor(1.5)],
    "no-repeats": [NoRepeatNGramLogitsProcessor(2)],
    "warped": [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)],
}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_see_all_tokens_and_scores_are_kept(model, inputs, name, sampled):
    results = both(
        model,
        inputs,
        PROCESSORS[name],
        do_sample=sampled,
        output_scores=True,
        output_logits=True,
    )
    assert_same(results)
    assert len(results[0][0].scores) == len(results[0][0].logits) == NEW


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("places", [[(0, 3)], [(0, 2), (1, 6), (2, 4)], [(1, 0)]])
def test_rows_end_one_before_another(model, inputs, places, keeps):
    ends = EosTokenCriteria(ends_of(model, inputs, places))
    results = both(model, inputs, criteria=[ends], output_scores=keeps)
    assert_same(results)
    assert (results[0][0].sequences[:, inputs["input_ids"].shape[1] :] == PAD).any()


def test_the_loop_ends_with_the_last_row(model, inputs):
    ends = ends_of(model, inputs, [(0, 2), (1, 3), (2, 5)])
    results = both(model, inputs, criteria=[EosTokenCriteria(ends)])
    assert_same(results)
    assert results[0][0].sequences.shape[1] <= inputs["input_ids"].shape[1] + 6


def test_an_end_that_may_not_come_yet(model, inputs):
    (end,) = ends_of(model, inputs, [(0, 1)])
    length = inputs["input_ids"].shape[1]
    least = MinNewTokensLengthLogitsProcessor(length, 5, end, device="cpu")
    assert_same(both(model, inputs, [least], [EosTokenCriteria(end)], output_scores=True))


def test_without_an_end_of_text_token_nothing_is_padded(model, inputs):
    """Other criteria end rows too; transformers goes on with their tokens until all have ended."""
    results = both(model, inputs, criteria=[RowLength(inputs["input_ids"].shape[1])])
    assert_same(results)
    assert results[0][0].sequences.shape[1] == inputs["input_ids"].shape[1] + 6
    assert not (results[0][0].sequences[:, inputs["input_ids"].shape[1] :] == PAD).any()


def test_an_engine_serves_call_after_call(model, inputs):
    engine = Engine(model.decoder, num_rows=3, context=64, chunk=8)
    assert_same(both(model, inputs, engine=engine))
    turned = {name: x.flip(0) for name, x in inputs.items()}
    assert_same(both(model, turned, engine=engine))


def test_one_call_at_a_time_has_the_kept_engine(model):
    keeper = EngineKeeper()
    one, other = (keeper.engine(model.decoder, 3, 100) for _ in range(2))
    with one as first, other as second:
        assert second is not first
    with keeper.engine(model.decoder, 3, 512) as again:
        assert again is first
    with keeper.engine(model.decoder, 4, 100) as wider:
        assert wider.num_rows == 4
    with keeper.engine(model.decoder, 4, 513) as longer:
        assert longer.context == 1024


def test_a_model_frees_the_engine_that_it_keeps(model):
    with model._engines.engine(model.decoder, 2, 100) as engine:
        keys = weakref.ref(engine.cache.layers[0].keys)
    del engine
    assert keys() is not None
    model.release_engine()
    assert keys() is None
    model.release_engine()
    with model._engines.engine(model.decoder, 2, 100) as engine:
        assert engine.num_rows == 2


def test_what_a_failed_call_leaves_is_not_used(model):
    keeper = EngineKeeper()
    with pytest.raises(KeyboardInterrupt), keeper.engine(model.decoder, 2, 100) as failed:
        raise KeyboardInterrupt
    with keeper.engine(model.decoder, 2, 100) as engine:
        assert engine is not failed


class Adapter(nn.Module):
    """As adapters do it: around a layer, with a switch that is neither a weight nor a module."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.disabled = False

    def forward(self, x):
        y = self.base_layer(x)
        return y if self.disabled else y + 0.1 * y.flip(-1)


def test_adapters_around_layers_work_and_their_switches_count(model, inputs):
    adapted = deepcopy(model)
    for layer in adapted.decoder.layers:
        layer.attn.qkv = Adapter(layer.attn.qkv)
    results = both(adapted, inputs)
    assert_same(results)
    assert results[0][0].sequences.tolist() != both(model, inputs)[0][0].sequences.tolist()
    keeper = EngineKeeper()
    with keeper.engine(model.decoder, 1, 100):
        pass
    assert keeper._engine is not None
    with keeper.engine(adapted.decoder, 1, 100):
        pass
    with keeper.engine(adapted.decoder, 1, 100) as engine:
        assert engine.decoder is adapted.decoder
        assert keeper._engine is None, "its graphs hold what the switches were"


@pytest.mark.parametrize("how", ["replaced", "hooked"])
@pytest.mark.parametrize(
    "model_type, name", [("deepseek_v3", "groups"), ("deepseek_v32", "five-keys")]
)
def test_keys_and_values_of_adapters_and_their_logits(model_type, name, how):
    """Latents are expanded in every step where the projections are not plain."""
    config = AutoConfig.for_model(model_type, **CONFIGURATIONS[model_type][name])
    torch.manual_seed(0)
    model = moezoo.from_config(config, dtype="float32", device="cpu")
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :7], mask[2, :4] = 0, 0
    inputs = {"input_ids": torch.arange(1, 28).view(3, 9) * mask, "attention_mask": mask}
    settings = {"output_logits": True}
    before = both(model, inputs, **settings)
    decoder = model.decoder
    handles = [x.attn.kv_b.register_forward_hook(lambda *_: None) for x in decoder.layers]
    torch.testing.assert_close(
        both(model, inputs, **settings)[0][0].logits, before[0][0].logits, atol=1e-4, rtol=1e-4
    )
    for handle in handles:
        handle.remove()
    for owner, name in ((decoder, "lm_head"), *((layer.attn, "kv_b") for layer in decoder.layers)):
        if how == "replaced":
            setattr(owner, name, Adapter(getattr(owner, name)))
        else:
            getattr(owner, name).register_forward_hook(lambda _, given, y: y + 0.1 * y.flip(-1))
    assert not capturable(decoder)
    results = both(model, inputs, **settings)
    assert_same(results)
    assert not torch.allclose(results[0][0].logits[0], before[0][0].logits[0], atol=1e-3)
    with torch.inference_mode():
        whole = model(results[0][0].sequences[:1, :-1]).logits[0, -NEW:]
    ours = torch.cat([step[:1] for step in results[0][0].logits])
    torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-4)


def test_an_engine_made_in_inference_mode_serves_outside_it(model, inputs):
    with torch.inference_mode():
        engine = Engine(model.decoder, num_rows=3, context=64, chunk=8)
    assert_same(both(model, inputs, engine=engine))
    prompts = unpadded(inputs["input_ids"], inputs["attention_mask"], None)
    requests = [Request(i, prompt, 4) for i, prompt in enumerate(prompts)]
    assert len(list(Batcher(engine, engine.greedy, ends=set()).run(iter(requests)))) == 3


def test_threads_get_engines_of_their_own(model):
    keeper, meet, found = EngineKeeper(), Barrier(4), []

    def call():
        with keeper.engine(model.decoder, 1, 100) as engine:
            found.append(engine)
            meet.wait()

    threads = [Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(engine) for engine in found}) == 4


def test_a_cache_too_large_to_keep_is_no_larger_than_needed(model, monkeypatch):
    monkeypatch.setattr(keeper_module, "KEPT_BYTES", 2 * 3072 * 2 * 600)
    keeper = EngineKeeper()
    with keeper.engine(model.decoder, 2, 600) as engine:
        assert engine.context == 600
    assert keeper._engine is None


def test_the_pages_become_the_cache_that_transformers_would_have(model, inputs):
    engine = Engine(model.decoder, num_rows=len(PROMPTS), context=64)
    both(model, inputs, engine=engine)
    mask = inputs["attention_mask"]
    lengths = (mask.sum(1) + NEW - 1).tolist()
    cache = engine.cache.dense(model.config, engine.tables[None], lengths)
    sequences = both(model, inputs)[1][0].sequences[:, :-1]
    mask = torch.cat((mask, mask.new_ones(len(mask), NEW - 1)), 1)
    with torch.inference_mode():
        expected = model(
            sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).past_key_values
    kept = mask.bool()[:, None, :, None]
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        for name in ("keys", "values"):
            torch.testing.assert_close(
                getattr(ours, name) * kept, getattr(theirs, name) * kept, atol=1e-4, rtol=1e-4
            )
