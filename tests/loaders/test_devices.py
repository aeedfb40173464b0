"""Layers on devices of their own: where `device_map` puts them, and that they compute as on one."""

from itertools import product

import pytest
import torch
from transformers import AutoTokenizer, pipeline

import moezoo
from moezoo.assets import tiny_model
from moezoo.layers.decoder import Stage
from moezoo.loaders import devices, memory
from moezoo.loaders.devices import Places, parse_device_map, places_of, spread
from moezoo.loaders.mapping import ParameterInfo

CPU = torch.device("cpu")
A, B = torch.device("cuda", 0), torch.device("cuda", 1)
LAYERS = 6


def load(**options):
    return moezoo.from_pretrained(tiny_model(), dtype="float32", progress=False, **options)


@pytest.fixture(scope="module")
def inputs():
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.padding_side = "left"
    return tokenizer(
        ["Once upon a time", "The old man went to the"], padding=True
    ).convert_to_tensors("pt")


def wanted(*sizes, ends=4):
    """Of layers of so many bytes, and what is in none."""
    infos = {"embed.weight": ParameterInfo((ends,), torch.int8)}
    for layer, size in enumerate(sizes):
        infos[f"layers.{layer}.mlp.w2.data"] = ParameterInfo((size,), torch.int8)
    return infos


@pytest.mark.parametrize(
    ("device_map", "home", "layers"),
    [
        ("cpu", "cpu", "cpu cpu cpu"),
        ({"": "cpu"}, "cpu", "cpu cpu cpu"),
        ({"": 0, "decoder.layers.1": "cpu"}, "cuda:0", "cuda:0 cpu cuda:0"),
        ({"decoder": "1", "decoder.layers": "cpu"}, "cuda:1", "cpu cpu cpu"),
        (
            {"decoder.embed": "cpu", "decoder.layers": 0, "decoder.layers.2": "cuda:1"},
            *("cpu", "cuda:0 cuda:0 cuda:1"),
        ),
    ],
)
def test_a_map_of_modules(monkeypatch, device_map, home, layers):
    monkeypatch.setattr(devices, "device_of", torch.device)
    places = places_of(parse_device_map(device_map), wanted(1, 1, 1))
    assert str(places.of("lm_head.weight")) == home
    found = [str(places.of(f"layers.{i}.mlp.w2.data")) for i in range(3)]
    assert found == layers.split()


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("balanced", "device_map='balanced', which is not 'auto': device is"),
        ({"": "cpu", "decoder.layers.0": "disk"}, r"'disk': moezoo keeps no weights on a disk"),
        ({"": "cpu", "decoder.layers.0.mlp": "cpu"}, "a layer is not divided"),
        ({"": "cpu", "model.layers.0": "cpu"}, "names 'model.layers.0', expected ''"),
        ({"": "cpu", "decoder.layers.6": "cpu"}, "there are 6 layers"),
        ({"decoder.embed": "cpu", "decoder.layers.0": "cpu"}, r"no device for decoder.layers.1, "),
        ({"decoder.layers": "cpu"}, "no device for decoder.embed"),
        ({"": "cpu", "decoder.norm": "cpu:1"}, "go to one together"),
        ({"": "cuda:99"}, "device_map['']: device is 'cuda:99'".replace("[", r"\[")),
    ],
)
def test_a_map_that_cannot_be(device_map, message):
    with pytest.raises(ValueError, match=message):
        load(device_map=device_map)


@pytest.mark.parametrize(
    "other", [{"device": "cpu"}, {"parallel": moezoo.Parallel(expert_parallel_size=2)}]
)
def test_one_thing_says_where_layers_go(other):
    with pytest.raises(ValueError, match=f"device_map and {next(iter(other))} both"):
        load(device_map="auto", **other)


def test_layers_spread_evenly_over_as_few_devices_as_have_room():
    """Against all ways to cut a row of layers in two."""
    for sizes in ([3, 1, 4, 1, 5], [2] * 7, [9, 1], [1]):
        for a, b in product((8, 11, 25), (5, 12, 30)):
            places = spread(4, sizes, {A: a, B: b}, CPU)
            count = places.layers.count(A)
            first, second = 4 + sum(sizes[:count]), sum(sizes[count:])
            assert places.home == A
            if 4 + sum(sizes) <= a:
                assert places.layers == (A,) * len(sizes)
                continue
            cuts = range(len(sizes) + 1)
            fill = {n: max((4 + sum(sizes[:n])) / a, sum(sizes[n:]) / b) for n in cuts}
            if min(fill.values()) <= 1:
                assert set(places.layers) <= {A, B}
                assert max(first / a, second / b) <= min(fill.values()) + 0.01
            else:
                order = "".join("ABC"[(A, B, CPU).index(device)] for device in places.layers)
                assert order == "".join(sorted(order)) and "C" in order
                assert 4 + sum(s for s, o in zip(sizes, order, strict=True) if o == "A") <= a
                assert sum(s for s, o in zip(sizes, order, strict=True) if o == "B") <= b


def test_ends_that_no_gpu_has_room_for_stay_with_all_layers_on_the_cpu():
    assert spread(9, [1, 1], {A: 8}, CPU) == Places(CPU, (CPU, CPU))


@pytest.mark.parametrize("quantization", [None, "int8_w8a16"])
def test_everything_on_the_cpu(inputs, quantization):
    whole = load(device="cpu", quantization=quantization)
    mapped = load(device_map={"": "cpu"}, quantization=quantization)
    with torch.inference_mode():
        assert mapped(**inputs).logits.equal(whole(**inputs).logits)
    assert not hasattr(mapped, "hf_device_map")


def test_room_is_looked_for_on_each_device(monkeypatch):
    monkeypatch.setattr(devices, "device_of", torch.device)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**9 if device == CPU else 10**6)
    with pytest.raises(moezoo.errors.MoEOutOfMemoryError, match="what device_map puts there of"):
        load(device_map={"": "cpu", "decoder.layers.3": "cuda:0"})


def test_what_passes_from_stage_to_stage(inputs):
    """As between devices; those of a name that torch does not keep are the same memory."""
    model = load(device="cpu")
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.inference_mode():
        expected = model(**inputs).logits
    tokens = model.generate(**inputs, **options)
    model.decoder.stages = (Stage(torch.device("cpu", 1), range(4)), Stage(CPU, range(4, LAYERS)))
    with torch.inference_mode():
        assert model(**inputs).logits.equal(expected)
    assert model.generate(**inputs, **options).equal(tokens)
    assert model.to("cpu").decoder.stages == ()  # they are looked for again


def check_split(device_map, quantization):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    text = tokenizer("One day, a little dog", return_tensors="pt").to("cuda")
    whole = load(device="cuda", quantization=quantization)
    split = load(device_map=device_map, quantization=quantization)
    assert len(set(split.hf_device_map.values())) == 2
    assert split.device == torch.device(device_map[""])
    text = text.to(split.device)
    with torch.inference_mode():
        expected, found = (m(text["input_ids"].to(m.device)).logits.cpu() for m in (whole, split))
    # Activations in fp8 may be a step of it apart.
    assert (found - expected).norm() < (0.03 if quantization else 1e-3) * expected.norm()
    options = {"max_new_tokens": 8, "do_sample": False}
    assert split.generate(**text, **options).shape == (1, text["input_ids"].shape[1] + 8)
    with moezoo.record_routing(split, choices=True) as trace:
        (done,) = moezoo.generate(split, tokenizer, ["One day"], max_new_tokens=4, do_sample=False)
    assert done.error is None
    assert (trace.expert_load.sum(1) > 0).all()
    (score,) = moezoo.score(split, tokenizer, ["Once upon a time"])
    assert score.logprob < 0
    write = pipeline("text-generation", model=split, tokenizer=tokenizer)
    assert write("One day", max_new_tokens=3)[0]["generated_text"].startswith("One day")
    assert split.to("cpu").decoder.stages == ()
    assert split.generate(**text.to("cpu"), max_new_tokens=3).device == CPU


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "int8_w8a16", "fp8_w8a8", "mxfp4"])
@pytest.mark.parametrize("home", ["cuda:0", "cpu"])
def test_layers_on_a_gpu_and_on_the_cpu(quantization, home):
    other = "cpu" if home == "cuda:0" else "cuda:0"
    check_split({"": home} | {f"decoder.layers.{i}": other for i in (1, 4, 5)}, quantization)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("quantization", [None, "int4_w4a16", "fp8_w8a8"])
def test_layers_on_two_gpus(quantization):
    check_split({"": "cuda:0"} | {f"decoder.layers.{i}": 1 for i in range(3, 6)}, quantization)
    check_split({"": "cuda:1", "decoder.layers.2": 0}, quantization)


@pytest.mark.gpu
def test_auto_fills_a_gpu_and_then_the_cpu(monkeypatch):
    real = memory.free_memory
    model = load(device_map="auto")
    assert model.device.type == "cuda" and not hasattr(model, "hf_device_map")
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(
        devices, "free_memory", lambda d: nbytes * 2 // 3 if d.type == "cuda" else real(d)
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    places = list(load(device_map="auto").hf_device_map.values())
    assert places[0] == A and places[-1] == CPU
