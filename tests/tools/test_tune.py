"""The search for tiles, but for the GPU: its candidates, what it refuses and what it keeps."""

import json
from dataclasses import asdict
from functools import partial

import pytest
import torch
from triton.runtime.errors import OutOfResources

import moezoo
from moezoo import cli
from moezoo.assets import tiny_model
from moezoo.errors import MoEZooError
from moezoo.formats import QUANTIZATIONS
from moezoo.layers.kernels import tiles, weight_only_tiles
from moezoo.layers.kernels.tiles import Tile
from moezoo.layers.quant import Format
from moezoo.tools import tune as tool
from moezoo.tools.layer_weights import LAYERS, Layer, Weights, empty_weights, random_weights
from moezoo.tools.tune_candidates import SEARCHES
from moezoo.tools.tune_case import Case

ROWS_PER_EXPERT = sorted(
    {tokens * layer.k / layer.num_experts for tokens in tool.TOKENS for layer in LAYERS.values()}
)
CPU = torch.device("cpu")
WEIGHT_ONLY = ("int8_w8a16", "int4_w4a16", "mxfp4")


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(tool, "capability", lambda device: (9, 0))


def entry(*rows_per_expert, sizes=(8, 64, 96), num_stages=3):
    tile = asdict(Tile(16, 64, 64, 4, num_stages, descriptors=True))
    plan = {"gated_up": tile, "down": tile}
    plans = [{"rows_per_expert": rows} | plan for rows in rows_per_expert]
    names = ("num_experts", "hidden_size", "intermediate_size")
    return dict(zip(names, sizes, strict=True)) | {"k": 2, "plans": plans}


def stages(path):
    return {
        plan["rows_per_expert"]: plan["gated_up"]["num_stages"]
        for layer in json.loads(path.read_text())["layers"]
        for plan in layer["plans"]
    }


@pytest.mark.parametrize("quantization", SEARCHES)
@pytest.mark.parametrize("rows", ROWS_PER_EXPERT)
def test_candidates_are_tiles_that_a_product_takes(rows, quantization):
    search = SEARCHES[quantization]
    firsts, seconds = list(search.gated_up(rows)), list(search.down(rows))
    weight_only = quantization in WEIGHT_ONLY
    for tile in [*firsts, *seconds]:
        assert tile.m in ((16, 32, 64, 128, 256) if weight_only else (16, 32, 64, 128))
        assert tile.tail == 0 or (tile.tail >= 16 and tile.tail < tile.m)
        for size in (tile.n, tile.k, tile.tail or 16):
            assert size >= 16
            assert size & (size - 1) == 0
        assert tile.num_warps in (4, 8)
        assert tile.descriptors
        if weight_only:
            assert tile.weights_first
        elif tile.weights_first:
            assert tile.n % 64 == 0
            assert not tile.tail
    if weight_only:
        # Matrix instructions take 64 rows of weights, of gate and up together in the first product.
        assert all(tile.n % 32 == 0 for tile in firsts)
        assert all(tile.n % 64 == 0 for tile in seconds)
    elif quantization:
        assert all((tile.n, tile.k) == (128, 128) for tile in firsts)
        assert all(tile.n in (64, 128, 256) and tile.k == 128 for tile in seconds)


@pytest.mark.parametrize("quantization", SEARCHES)
@pytest.mark.parametrize("rows", ROWS_PER_EXPERT)
def test_both_products_have_a_candidate_of_one_m_even_for_the_smallest_layer(rows, quantization):
    search = SEARCHES[quantization]
    first, second = (
        {tile.m for tile in of(rows) if tile.k <= search.smallest}
        for of in (search.gated_up, search.down)
    )
    assert first & second


@pytest.mark.parametrize("quantization", SEARCHES)
@pytest.mark.parametrize("rows", ROWS_PER_EXPERT)
def test_no_candidate_is_measured_twice(rows, quantization):
    search = SEARCHES[quantization]
    for candidates in (list(search.gated_up(rows)), list(search.down(rows))):
        assert len(candidates) == len(set(candidates))


def test_old_gpus_have_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(tool, "capability", lambda device: (8, 9))
    with pytest.raises(ValueError, match=r"compute capability 9\.0 .* by rule"):
        tool.check(Layer(8, 2, 64, 96), CPU)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "reason"),
    [
        (100, 96, "multiples of 8 for weights of 16 bits, got 100 and 96"),
        (96, 100, "multiples of 8 for weights of 16 bits, got 96 and 100"),
        (56, 96, "at least 64 for weights of 16 bits, got 56 and 96"),
        (96, 32, "at least 64 for weights of 16 bits, got 96 and 32"),
    ],
)
def test_layers_with_nothing_to_tune(hopper, hidden, intermediate, reason):
    with pytest.raises(ValueError, match=rf"{reason}; .* by rule"):
        tool.check(Layer(8, 2, hidden, intermediate), CPU)


@pytest.mark.parametrize("layer", [*LAYERS.values(), Layer(8, 2, 64, 64)], ids=str)
def test_layers_to_tune(hopper, layer):
    tool.check(layer, CPU)


class Replays:
    """In place of a graph: what a call returns are the seconds of its replays."""

    launches = 1

    def __init__(self, calls, pool=None):
        self.replay = calls[0]
        self.seconds = self.replay()


def too_large():
    raise OutOfResources(300_000, 232_448, "shared memory")


@pytest.fixture
def replays(monkeypatch):
    monkeypatch.setattr(tool, "Graph", Replays)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def test_only_the_fastest_of_those_that_run_are_tried_together(replays):
    times = {"slow": 9e-6, "fast": 3e-6, "close": 3.2e-6}
    candidates = [("large", [too_large]), *((n, [lambda t=t: t]) for n, t in times.items())]
    assert list(tool._finalists(tool._times_alone(candidates))) == ["fast", "close"]
    assert tool._finalists(tool._times_alone(candidates[:1])) == {}
    many = dict.fromkeys(range(2 * tool.FINALISTS), 3e-06)
    assert list(tool._finalists(many)) == [*range(tool.FINALISTS)]


def test_products_are_chosen_by_what_they_take_together(replays, monkeypatch):
    alone = {"a": 2e-6, "b": 2.1e-6, "c": 1e-6, "d": 1.05e-6}
    together = {("a", "c"): 5e-6, ("a", "d"): 4e-6, ("b", "c"): 3e-6, ("b", "d"): 6e-6}
    ran = []

    def call(name, seconds):
        ran.append(name)
        return seconds

    def candidates(*names):
        return lambda case, m: ((n, [partial(call, n, alone[n])]) for n in names)

    x = torch.empty(4, 64)
    case = Case(x, x, Weights(x, x), x, {16: []})
    monkeypatch.setattr(Case, "gated_up_candidates", candidates("a", "b"))
    monkeypatch.setattr(Case, "down_candidates", candidates("c", "d"))
    monkeypatch.setattr(
        Case,
        "calls",
        lambda self, plan: [
            partial(call, (plan.gated_up, plan.down), together[plan.gated_up, plan.down])
        ],
    )
    assert tool._fastest(case) == (pytest.approx(3), tool.Plan("b", "c"))
    turns = [name for name in ran if isinstance(name, tuple)][len(together) :]
    assert turns[: len(together)] == turns[len(together) : 2 * len(together)] == [*together]
    # Once to compile, once as a graph and then its replays: no product is searched twice.
    assert [*dict.fromkeys(ran)][:4] == ["a", "b", "c", "d"]
    assert all(ran.count(name) == 2 + 50 for name in alone)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "fp8_w8a8", "int4_w4a16", "mxfp4"])
def test_a_small_layer_is_tuned(quantization, monkeypatch):
    monkeypatch.setattr(tool, "MAX_PROCESSES", 3)  # other tests compile beside them
    layer = Layer(8, 2, 256, 256)
    entry = tool.tune(layer, tokens=[4, 2048], quantization=quantization, report=lambda line: None)
    assert [plan["tokens"] for plan in entry["plans"]] == [4, 2048]
    for plan in entry["plans"]:
        assert plan["microseconds"] > 0
        assert plan["gated_up"]["m"] == plan["down"]["m"]


def test_an_error_of_the_device_is_not_taken_for_a_tile_that_does_not_compile():
    with tool.unless_unusable():
        raise RuntimeError("PassManager::run failed")
    with pytest.raises(torch.OutOfMemoryError), tool.unless_unusable():
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_no_candidate_at_all_is_an_error(monkeypatch):
    monkeypatch.setattr(tool, "_times_alone", lambda candidates: {})
    x = torch.empty(4, 64)
    case = Case(x, x, Weights(x, x), x, {16: [], 32: []})
    with pytest.raises(MoEZooError, match="at 4 tokens no candidate runs"):
        tool._fastest(case)


def test_saving_merges_plans_and_the_new_ones_win(tmp_path):
    path = tmp_path / "deeper" / "tiles.json"
    tool.save([entry(1.0, 4.0, num_stages=2), entry(7.0, sizes=(4, 64, 64))], path)
    assert tool.save([entry(4.0, 2.0)], path) == path
    assert stages(path) == {1.0: 2, 2.0: 3, 4.0: 3, 7.0: 3}
    merged, other = tool.read_entries(path)
    assert [plan["rows_per_expert"] for plan in merged["plans"]] == [1.0, 2.0, 4.0]
    assert other == entry(7.0, sizes=(4, 64, 64))
    assert list(path.parent.iterdir()) == [path]


def test_plans_of_a_quantization_stand_beside_the_others(tmp_path):
    path = tmp_path / "tiles.json"
    quantized = entry(1.0, num_stages=2) | {"quantization": "fp8_w8a8"}
    tool.save([entry(1.0), quantized], path)
    assert len(tool.read_entries(path)) == 2
    table = tiles.read_table(path)
    assert table[8, 64, 96][1.0].down.num_stages == 3
    assert table[8, 64, 96, "fp8_w8a8"][1.0].down.num_stages == 2


@pytest.mark.parametrize(
    ("quantization", "fits", "between", "small"),
    [
        ("fp8_w8a8", 144, 136, 64),
        ("int8_w8a16", 80, 72, 32),
        ("int4_w4a16", 256, 192, None),
        ("mxfp4", 160, 144, 96),
    ],
)
def test_layers_with_nothing_to_tune_quantized(hopper, quantization, fits, between, small):
    tool.check(Layer(8, 2, 128, fits), CPU, quantization)
    with pytest.raises(ValueError, match=f"multiples of .* for {quantization}, got 128 and"):
        tool.check(Layer(8, 2, 128, between), CPU, quantization)
    if small is not None:  # what divides by int4's 128 is large enough
        with pytest.raises(ValueError, match=rf"at least (64|128) for {quantization}, got 128 and"):
            tool.check(Layer(8, 2, 128, small), CPU, quantization)


@pytest.fixture
def no_plans():
    tiles.reload_tables()
    yield
    tiles.reload_tables()


def test_what_was_saved_is_used_at_once(no_plans, tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    monkeypatch.setattr(tiles, "user_table", lambda device: path)
    monkeypatch.setattr(tiles, "table_name", lambda device: "GPU.json")
    monkeypatch.setattr(tiles, "capability", lambda device: (9, 0))
    monkeypatch.setattr(tiles, "shared_memory", lambda device: 227 * 1024)
    device = torch.device("cuda", 0)

    def planned():
        shape, rows = (8, 2, 96, 64), 4.0
        bf16 = tiles._plan(device, torch.bfloat16, shape, True, rows)
        int4 = weight_only_tiles._plan(
            *(device, torch.bfloat16, "int4_w4a16", 4, shape, False, True, rows)
        )
        return [plan.down.num_stages for plan in (bf16, int4)]

    assert planned() == [4, 3]
    bf16, int4 = (entry(4.0, num_stages=stages) for stages in (2, 1))
    tool.save([bf16, int4 | {"quantization": "int4_w4a16"}], path)
    assert planned() == [2, 1]


@pytest.mark.parametrize("quantization", SEARCHES)
def test_what_is_compiled_beforehand_is_laid_out_as_what_is_launched(quantization):
    """Triton compiles for strides; the number of experts is none of them."""
    sizes = {"k": 1, "hidden_size": 256, "intermediate_size": 384}
    empty = empty_weights(Layer(1, **sizes), torch.bfloat16, CPU, quantization)
    launched = random_weights(Layer(3, **sizes), torch.bfloat16, CPU, quantization)
    for name in ("w13", "w2"):
        one, three = (getattr(weights, name) for weights in (empty, launched))
        pairs = [(one, three)]
        if isinstance(one, Format):
            tensors = zip(one.tensors().values(), three.tensors().values(), strict=True)
            pairs = [pair for pair in tensors if pair[0] is not None]
        for own, other in pairs:
            assert (own.dtype, own.stride(), own.shape[1:]) == (
                *(other.dtype, other.stride(), other.shape[1:]),
            )


def test_the_command_takes_what_can_be_searched():
    assert {None, *QUANTIZATIONS} == set(SEARCHES)


MALFORMED = {
    "no JSON": "{",
    "no object": "[]",
    "no layers": "{}",
    "no sizes": '{"layers": [{"plans": []}]}',
    "no plan": '{"layers": [{"num_experts": 8, "hidden_size": 64, "intermediate_size": 96}]}',
    "another tile": json.dumps({"layers": [entry(1.0)]}).replace("num_stages", "stages"),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_table_is_refused_by_name_and_kept(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json is not a table of tiles"):
        tool.save([entry(1.0)], path)
    assert path.read_text() == text


@pytest.fixture
def gpu_stand_in(monkeypatch):
    """A CUDA device as far as the command looks, and a search that must not begin."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in")
    monkeypatch.setattr(tool, "tune", lambda *args, **options: pytest.fail("searched"))


def test_the_command_refuses_before_the_search(hopper, gpu_stand_in, capsys, tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    assert cli.main(["tune", "8,2,100,96", "--output", str(path)]) == 2
    assert "multiples of 8" in capsys.readouterr().err
    path.write_text("{")
    assert cli.main(["tune", "8,2,64,96", "--output", str(path)]) == 2
    assert f"{path} is not a table of tiles" in capsys.readouterr().err
    monkeypatch.setattr(tool, "capability", lambda device: (8, 0))
    assert cli.main(["tune", "8,2,64,96", "--output", str(path)]) == 2
    assert "this one is Stand-in" in capsys.readouterr().err


def test_the_command_adds_to_a_table(hopper, gpu_stand_in, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "tune", lambda layer, *, tokens, quantization, report: entry(*tokens))
    path = tmp_path / "tiles.json"
    for tokens in (["4", "8"], ["2"]):
        command = ["tune", "8,2,64,96", "--tokens", *tokens, "--output", str(path)]
        assert cli.main(command) == 0
    assert stages(path) == {2: 3, 4: 3, 8: 3}


def test_a_model_is_tuned_in_the_format_of_its_experts(
    hopper, gpu_stand_in, tmp_path, monkeypatch, capsys
):
    asked = []

    def tune(layer, *, tokens, quantization, report):
        asked.append((layer, quantization))
        return entry(*tokens)

    monkeypatch.setattr(tool, "tune", tune)
    model = moezoo.from_pretrained(tiny_model(), quantization="int8_w8a16", device="cpu")
    model.save_pretrained(tmp_path / "model")
    options = ["--tokens", "2", "--output", str(tmp_path / "tiles.json")]
    assert cli.main(["tune", str(tmp_path / "model"), *options]) == 0
    assert cli.main(["tune", str(tiny_model()), *options]) == 0
    (quantized, name), (plain, no_name) = asked
    assert (name, no_name) == ("int8_w8a16", None)
    assert quantized == plain
