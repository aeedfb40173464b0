"""The table of quality, on a short text and a few formats."""

from dataclasses import replace

import pytest
import quality
import torch

import moezoo
from moezoo.assets import tiny_model
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import Format

LABELS = [
    "bf16",
    "fp8, blocks",
    "int8, channels",
    "int4, groups of 128",
    "int4, groups of 64, round to nearest",
    "int4, groups of 64",
    "mxfp4",
]


@pytest.fixture(scope="module")
def text() -> str:
    return quality.TEXT.read_text()[:12_000]


def test_formats_of_the_small_model(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schemes = [scheme for scheme in quality.SCHEMES if scheme.label in LABELS]
    assert len(schemes) == len(LABELS)
    monkeypatch.setattr(quality, "SCHEMES", schemes)
    windows = quality.windows_of(text, tiny_model(), 256)[:8]
    assert windows.shape == (8, 256)
    found = quality.measure(tiny_model(), windows, torch.device("cpu"))
    entries = {q.scheme.label: quality.entry(q, found[0]) for q in found}
    assert entries.keys() == set(LABELS) - {"int4, groups of 128"}  # the experts are 64 wide
    for label, entry in entries.items():
        limit = quality.LIMITS.get(label.partition(",")[0], 0)
        assert abs(entry["loss_over_bf16"]) <= limit
        assert len(entry["weight_error_by_layer"]) == 6
    assert entries["bf16"]["top1_changed"] == 0 < entries["mxfp4"]["top1_changed"] < 0.1
    assert entries["mxfp4"]["bits_per_weight"] == 4.25
    searched, nearest = (entries[label]["weight_error_by_layer"] for label in LABELS[5:3:-1])
    assert all(ours < theirs for ours, theirs in zip(searched, nearest, strict=True))
    over = [replace(q, loss=q.loss + 0.2) for q in found[1:]]
    told = quality.failures([found[0], *over])
    limited = [label for label in entries if label != "bf16" and "nearest" not in label]
    assert [message.partition(":")[0] for message in told[: len(limited)]] == limited
    base = found[0].loss
    losses = {LABELS[4]: base + 0.01, LABELS[5]: base + 0.02}
    worse = [replace(q, loss=losses.get(q.scheme.label, base)) for q in found]
    told = quality.failures(worse)
    assert told == [f"{LABELS[5]}: {base + 0.02:.4f}, {LABELS[4]} is not worse"]
    assert quality.failures(worse, whole=False) == []


def test_the_model_is_as_it_was() -> None:
    model = moezoo.from_pretrained(tiny_model(), device="cpu", progress=False)
    before = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    for scheme in quality.SCHEMES[2:6]:
        with quality.held(model, scheme) as (errors, bits):
            layers = [module for module in model.modules() if isinstance(module, FusedMoE)]
            assert all(issubclass(layer.quantized or int, Format) for layer in layers)
            assert len(errors) == len(layers)
            assert 8 <= bits < 8.3
        after = [(name, id(parameter)) for name, parameter in model.named_parameters()]
        assert sorted(after) == sorted(before)


def test_a_partial_run_has_a_name_of_its_own(tmp_path):
    published = tmp_path / "quality_cpu.json"
    whole = quality.arguments([])
    assert quality.result_name(whole, published, ["a"]) == "quality"
    published.write_text('{"checkpoints": {"a": {}, "b": {}}}')
    assert quality.result_name(whole, published, ["a", "b", "c"]) == "quality"
    assert quality.result_name(whole, published, ["a"]) == "quality_partial"
    for some in (["--windows", "2"], ["--text", "other"], ["--length", "64"]):
        assert quality.result_name(quality.arguments(some), published, "ab") == "quality_partial"
