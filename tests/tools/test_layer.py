"""The layer benchmark, but for the clock: what it counts, draws, refuses and prints."""

import json
from contextlib import nullcontext
from functools import partial
from io import StringIO

import pytest
import torch
from rich.console import Console

from moezoo import cli
from moezoo.tools import layer as tool
from moezoo.tools import layer_inputs, timing
from moezoo.tools.layer import Ceilings
from moezoo.tools.layer_inputs import Inputs, Oracle, WrongResultError
from moezoo.tools.layer_weights import Layer, QuantizedWeights, Weights

SMALL = Layer(num_experts=16, k=2, hidden_size=32, intermediate_size=24)
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(tool.LAYERS, "small", SMALL)
    # Measured for real they take seconds.
    monkeypatch.setattr(tool, "measure_ceilings", lambda *_: Ceilings(1e10, 1e11))


def case(num_tokens, *, dtype=torch.float32, skewed=False):
    weights = Weights.random(SMALL, dtype, CPU)
    inputs = Inputs.random(SMALL, num_tokens, dtype, CPU, skewed=skewed)
    return weights, inputs, Oracle(weights, SMALL.k, inputs)


def hit_by(logits):
    return set(logits.topk(SMALL.k).indices.flatten().tolist())


def test_floor_of_qwen3_at_one_token_is_its_bytes():
    layer = tool.LAYERS["qwen3-30b-a3b"]
    nbytes = 8 * 3 * 2048 * 768 * 2
    assert layer.k * layer.expert_elements * 2 == nbytes == 75_497_472
    ceilings = Ceilings(3.1e12, 720e12)
    assert ceilings.floor_us(nbytes, layer.flop(1)) == pytest.approx(24.35, abs=0.01)


def test_floor_of_mixtral_at_many_tokens_is_its_products():
    layer = tool.LAYERS["mixtral-8x7b"]
    flop = 16384 * 2 * (2 * 4096 * 28672 + 2 * 14336 * 4096)
    assert layer.flop(16384) == flop
    floor = Ceilings(3.1e12, 720e12).floor_us(8 * layer.expert_elements * 2, flop)
    assert floor == pytest.approx(16035, rel=1e-3)


def test_few_tokens_hit_other_experts_in_every_launch():
    _, inputs, _ = case(1)
    hits = [hit_by(logits) for logits in inputs.logits]
    assert len(hits) == 8
    assert len(set().union(*hits)) == 16
    assert inputs.disjoint
    assert inputs.experts_hit == 2


def test_many_tokens_hit_all_experts_in_two_sets():
    _, inputs, _ = case(100)
    assert [len(hit_by(logits)) for logits in inputs.logits] == [16, 16]
    assert not inputs.disjoint


def test_renaming_keeps_weights_and_moves_experts():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    renamed = layer_inputs._renamed(logits, torch.tensor([1, 2]), torch.tensor([3, 0]))
    assert renamed.tolist() == [[2.0, 0.0, 1.0, 3.0]]


@pytest.mark.parametrize("skewed", [False, True], ids=["uniform", "skewed"])
def test_skewed_routing_follows_zipf(skewed):
    generator = torch.Generator().manual_seed(0)
    logits = layer_inputs.router_logits(64, 20_000, skewed=skewed, generator=generator)
    load = torch.bincount(logits.argmax(-1), minlength=64).sort(descending=True).values / 20_000
    zipf = 1 / torch.arange(1, 65)
    expected = zipf / zipf.sum() if skewed else torch.full((64,), 1 / 64)
    assert (load - expected).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moezoo_is_measured(dtype):
    weights, inputs, oracle = case(3, dtype=dtype)
    run = tool.moezoo_layer(weights, SMALL.k)
    timings, failures = tool.measure({"moezoo": run}, inputs, oracle, budget_ms=1)
    taken = timings["moezoo"]
    assert not failures
    assert 0 < taken.min_us <= taken.median_us <= taken.max_us
    assert taken.replays >= timing.MIN_REPLAYS
    assert 0 <= taken.error <= layer_inputs.TOLERANCE[dtype]


def wrong_weights(run, x, logits):
    return run(x, logits) * 1.05


def one_wrong_token(run, x, logits):
    out = run(x, logits).clone()
    out[-1] = out[0]
    return out


def one_nan(run, x, logits):
    out = run(x, logits).clone()
    out[1, 5] = float("nan")
    return out


def other_dtype(run, x, logits):
    return run(x, logits).double()


def wrong_later(run, x, logits):
    run.calls = getattr(run, "calls", 0) + 1
    return run(x, logits) * (1 if run.calls == 1 else 2)


def test_a_graph_goes_through_the_calls_in_turn(monkeypatch):
    ran = []

    class Graph:
        def replay(self):
            ran.append("replay")

    class Event:
        def __init__(self, **options):
            pass

        def record(self):
            pass

        synchronize = record

        def elapsed_time(self, end):
            return 0.5

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)

    def call(number):
        ran.append(number)
        return torch.tensor(number)

    pauses = []
    monkeypatch.setattr(timing.time, "sleep", pauses.append)
    graph = timing.Graph([partial(call, 1), partial(call, 2)])
    # 0.5 ms once, so four times make GRAPH_SECONDS.
    assert ran == [1, 2, *["replay"] * 2, *[1, 2] * 4, *["replay"] * 2]
    assert (graph.launches, graph.out.item()) == (8, 2)
    # Six replays of 0.5 ms are the budget.
    assert timing.in_turns({"graph": graph}, 3.0) == {"graph": [5e-4] * 6}
    assert pauses == [timing.PAUSE * 5e-4] * 6


def test_graphs_take_turns_after_pauses_for_the_longer_of_two(monkeypatch):
    ran, pauses = [], []
    monkeypatch.setattr(timing.time, "sleep", pauses.append)

    class Graph(timing.Graph):
        def __init__(self, seconds):
            self.seconds = seconds

        def replay(self):
            ran.append(self.seconds)
            return self.seconds

    samples = timing.in_turns({"long": Graph(1.0), "short": Graph(0.125)}, 750.0)
    assert ran == [1.0, 0.125] * 5 + [0.125]
    assert samples == {"long": [1.0] * 5, "short": [0.125] * 6}
    assert pauses == [timing.PAUSE] * 10 + [timing.PAUSE * 0.125]


@pytest.mark.parametrize(
    "spoil", [wrong_weights, one_wrong_token, one_nan, other_dtype, wrong_later]
)
def test_a_wrong_implementation_is_refused(spoil):
    weights, inputs, oracle = case(7, dtype=torch.bfloat16)
    run = tool.moezoo_layer(weights, SMALL.k)
    runs = {"spoiled": lambda *args: spoil(run, *args), "right": run}
    timings, failures = tool.measure(runs, inputs, oracle, budget_ms=1)
    assert timings.keys() == {"right"}
    assert isinstance(failures["spoiled"], WrongResultError)


def test_report_holds_shapes_spread_and_what_was_hit(small):
    report = tool.bench(["small"], [1, 100], dtype="float32", device="cpu", budget_ms=1)
    document = json.loads(json.dumps(report.to_dict()))
    assert document["layers"]["small"]["num_experts"] == 16
    one, many = document["cells"]
    assert (one["experts_hit"], one["num_sets"], many["experts_hit"]) == (2, 8, 16)
    assert one["bytes_between_repeats"] == 16 * 3 * 32 * 24 * 4
    assert one["floor_us"] == pytest.approx(2 * 3 * 32 * 24 * 4 / 1e10 * 1e6, rel=1e-6)
    assert set(one["timings"]["moezoo"]) >= {"median_us", "min_us", "max_us", "launches"}
    text = StringIO()
    Console(file=text, width=120).print(report)
    assert "small" in text.getvalue()
    assert "10 GB/s read" in text.getvalue()


def test_a_wrong_moezoo_has_a_reason_instead_of_a_time(small, monkeypatch):
    monkeypatch.setattr(tool, "moezoo_layer", lambda *_: lambda x, logits: torch.zeros_like(x))
    report = tool.bench(["small"], [4], dtype="float32", device="cpu")
    assert not report.cells[0].timings
    assert "away from fp32" in report.cells[0].skipped["moezoo"]
    text = StringIO()
    Console(file=text, width=160).print(report)
    assert "away from fp32" in text.getvalue()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nMore of it"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nMore of it"),
    ],
)
def test_a_layer_that_does_not_fit_is_skipped_by_name(small, monkeypatch, error):
    random, told = Weights.random, str(error).partition("\n")[0]

    def limited(layer, *options):
        if layer is not SMALL:
            raise error
        return random(layer, *options)

    monkeypatch.setattr(Weights, "random", limited)
    report = tool.bench(["deepseek-v3", "small"], [1], dtype="float32", device="cpu", budget_ms=1)
    assert report.to_dict()["skipped"] == {"deepseek-v3": told}
    assert [cell.layer for cell in report.cells if cell.timings] == ["small"]
    text = StringIO()
    Console(file=text, width=160).print(report)
    assert told in text.getvalue()
    monkeypatch.setattr(tool, "bench", lambda *args, **options: report)
    assert cli.main(["bench", "layer"]) == 1


def test_command_line(small, capsys):
    options = ["--layer", "small", "--tokens", "1", "5", "--dtype", "float32", "--device", "cpu"]
    assert cli.main(["bench", "layer", *options, "--skewed"]) == 0
    table = capsys.readouterr()
    assert "skewed" in table.out and "small, 5 tokens: done" in table.err
    assert cli.main(["bench", "layer", *options, "--json", "--quiet"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert [cell["num_tokens"] for cell in json.loads(told.out)["cells"]] == [1, 5]


def test_command_line_names_the_layers_it_knows(capsys):
    assert cli.main(["bench", "layer", "--layer", "gpt-4"]) == 2
    assert "qwen3-30b-a3b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantization", "expert_bytes"),
    [
        # Blocks of 128 x 128, two of them for gate and up.
        ("fp8_w8a8", 3 * 128 * 256 + 4 * (4 + 2)),
        ("fp8_w8a8_channel", 3 * 128 * 256 + 4 * (256 + 256)),
        ("int8_w8a16", 3 * 128 * 256 + 2 * (256 + 256)),
        ("int4_w4a16", 3 * 128 * 128 + 2 * (256 * 2 + 256)),
        ("mxfp4", 3 * 128 * 128 + 256 * 8 + 256 * 4),
    ],
)
def test_quantized_is_measured_against_its_dequantized_weights(
    small, monkeypatch, quantization, expert_bytes
):
    monkeypatch.setitem(tool.LAYERS, "small", Layer(4, 2, 256, 128))
    report = tool.bench(["small"], [1, 5], quantization=quantization, device="cpu", budget_ms=1)
    assert report.quantization == quantization
    assert [cell.skipped for cell in report.cells] == [{}, {}]
    fp8 = quantization.startswith("fp8")
    tolerance = layer_inputs.QUANTIZED_TOLERANCE if fp8 else layer_inputs.TOLERANCE[torch.bfloat16]
    for cell in report.cells:
        assert 0 < cell.timings["moezoo"].error < tolerance
    # Two experts.
    assert report.cells[0].floor_us == pytest.approx(1e6 * 2 * expert_bytes / 1e10)


def test_what_a_format_does_not_take_is_skipped(small):
    report = tool.bench(["small"], [1], quantization="int4_w4a16", device="cpu", budget_ms=1)
    assert "128" in report.skipped["small"]


def test_quantized_weights_are_those_of_the_layer():
    weights = QuantizedWeights.random(SMALL, CPU)
    w13, w2 = weights.expert(3)
    assert w13.shape == (48, 32)
    plain = weights.dequantized(torch.float32)
    assert torch.equal(plain.w13[3], w13)
    assert torch.equal(plain.w2[3], w2)
    assert not torch.equal(plain.w2[3], plain.w2[4])
