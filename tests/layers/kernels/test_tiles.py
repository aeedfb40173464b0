import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moezoo.formats import FP8
from moezoo.layers.kernels import tiles
from moezoo.layers.kernels.activations import ACTIVATIONS
from moezoo.layers.kernels.tiles import Plan, Tile, can_describe, plan

CPU = torch.device("cpu")


def weights(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_experts, hidden, intermediate = shape
    return (
        torch.empty(1, hidden, dtype=dtype),
        torch.empty(num_experts, 2, intermediate, hidden, dtype=dtype),
        torch.empty(num_experts, hidden, intermediate, dtype=dtype),
    )


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("hidden", [64, 65], ids=["descriptors", "pointers"])
def test_plans_fit_shared_memory(
    kilobytes: int, dtype: torch.dtype, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "shared_memory", lambda device: kilobytes * 1024)
    tiles.reload_tables()
    x, w13, w2 = weights((8, hidden, 32), dtype)
    for num_rows in (1, 8, 100, 200, 300, 1000, 10**4, 10**6):
        chosen = plan(x, w13, w2, num_rows=num_rows)
        assert chosen.gated_up.m == chosen.down.m
        for tile, num_parts in ((chosen.gated_up, 2), (chosen.down, 1)):
            # What tl.dot takes.
            assert min(tile.m, tile.n, tile.k) >= 16
            operands = (tile.m + num_parts * tile.n) * tile.k * dtype.itemsize
            assert operands * tile.num_stages <= kilobytes * 1024
            assert tile.descriptors == (hidden == 64 and dtype != torch.float32)
            if dtype == torch.float8_e4m3fn:
                assert (tile.n, tile.k) == (128, 128)


def test_tiles_grow_with_the_rows_of_an_expert() -> None:
    x, w13, w2 = weights((8, 64, 32), torch.bfloat16)
    assert [plan(x, w13, w2, num_rows=8 * rows).down.m for rows in (1, 20, 40, 5000)] == [
        16,
        32,
        64,
        128,
    ]


def test_every_table_of_the_package_is_read() -> None:
    paths = sorted(tiles.TABLES.glob("*.json"))
    assert paths
    for path in paths:
        table = tiles.read_table(path)
        assert len(table) == len(json.loads(path.read_text())["layers"])
        for plans in table.values():
            assert plans
            for tuned in plans.values():
                assert tuned.gated_up.m == tuned.down.m


MINE = Plan(Tile(16, 32, 64, 4, 2), Tile(16, 64, 64, 4, 2))


def write_table(path: Path, sizes: tuple[int, int, int], rows_per_expert: float) -> None:
    names = ("num_experts", "hidden_size", "intermediate_size")
    entry = dict(zip(names, sizes, strict=True)) | {
        "plans": [
            {
                "rows_per_expert": rows_per_expert,
                "gated_up": vars(MINE.gated_up),
                "down": vars(MINE.down),
            }
        ]
    }
    path.write_text(json.dumps({"layers": [entry]}))


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's table of a pretended Hopper GPU."""
    path = tmp_path / "mine.json"
    monkeypatch.setattr(tiles, "user_table", lambda device: path)
    monkeypatch.setattr(tiles, "table_name", lambda device: "GPU.json")
    monkeypatch.setattr(tiles, "capability", lambda device: (9, 0))
    tiles.reload_tables()
    yield path
    tiles.reload_tables()


CUDA = torch.device("cuda", 0)
QWEN3 = (128, 2048, 768)


def test_the_users_plans_lie_over_the_packages(own_table: Path) -> None:
    package = tiles.tuned(CUDA, QWEN3, 64.0)
    assert package is not None
    write_table(own_table, QWEN3, 64.0)
    tiles.reload_tables()
    assert tiles.tuned(CUDA, QWEN3, 70.0) == MINE
    assert tiles.tuned(CUDA, QWEN3, 1.0) not in (MINE, None)
    assert tiles.tuned(CUDA, (9, 64, 32), 64.0) is None


def test_a_gpus_plans_lie_over_those_of_its_architecture(
    own_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = tiles.read_table(tiles.TABLES / "sm_90.json")
    own = tiles.read_table(tiles.TABLES / "NVIDIA_H200.json")
    at_1024 = 1024 * 8 / 128
    assert own[QWEN3][at_1024] != architecture[QWEN3][at_1024]
    in_fp8 = (*QWEN3, FP8)
    assert in_fp8 not in own
    monkeypatch.setattr(tiles, "table_name", lambda device: "NVIDIA_H200.json")
    tiles.reload_tables()
    assert tiles.tuned(CUDA, QWEN3, at_1024) == own[QWEN3][at_1024]
    few = min(architecture[in_fp8])
    assert tiles.tuned(CUDA, in_fp8, few) == architecture[in_fp8][few]
    write_table(own_table, QWEN3, at_1024)
    tiles.reload_tables()
    assert tiles.tuned(CUDA, QWEN3, at_1024) == MINE


def test_fp8_does_not_take_the_plans_of_16_bit(own_table: Path) -> None:
    assert tiles.tuned(CUDA, QWEN3, 64.0) is not None
    found = tiles.tuned(CUDA, (*QWEN3, FP8), 64.0)
    assert found is not None
    write_table(own_table, QWEN3, 64.0)
    tiles.reload_tables()
    assert tiles.tuned(CUDA, (*QWEN3, FP8), 64.0) == found


def test_a_plan_for_far_fewer_rows_is_not_used(own_table: Path) -> None:
    write_table(own_table, (9, 64, 32), 10.0)
    tiles.reload_tables()
    assert tiles.tuned(CUDA, (9, 64, 32), 39.0) == MINE
    assert tiles.tuned(CUDA, (9, 64, 32), 41.0) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": [{"num_experts": 8}]}'])
def test_a_broken_table_of_the_user_is_left_out_aloud(own_table: Path, text: str) -> None:
    own_table.write_text(text)
    tiles.reload_tables()
    with pytest.warns(UserWarning, match=f"{own_table}.*moezoo tune"):
        assert tiles.tuned(CUDA, QWEN3, 64.0) is not None
    with pytest.raises(ValueError, match=str(own_table)):
        tiles.read_table(own_table)


def test_padded_weights_of_odd_width_are_read_by_pointer() -> None:
    x, w13, _ = weights((8, 64, 100), torch.bfloat16)
    w2 = torch.empty(8, 64, 104, dtype=torch.bfloat16)[..., :100]
    assert can_describe(w13)
    assert can_describe(w2)
    assert not plan(x, w13, w2, num_rows=64).down.descriptors


def test_a_tile_that_holds_no_stage_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "shared_memory", lambda device: 48 * 1024)
    tile = Tile(128, 256, 128, 8, 4).fitted(1, 2, CPU)
    assert (tile.k, tile.num_stages) == (32, 1)


def test_a_place_in_the_grid_or_a_share_of_the_tiles() -> None:
    few, cpu = Tile(16, 64, 128, 4, 3), torch.device("cpu")
    assert few.grid(5, 130, cpu) == (5, 3, 1)
    assert few.grid(21, 130, cpu) == (8, 3, 3)
    assert replace(few, m=128).grid(5, 130, cpu) == (15,)
    assert replace(few, m=64, tail=16).grid(5, 130, cpu) == (15,)
    assert replace(few, programs_per_sm=3).grid(5, 130, cpu) == (6,)
    assert replace(few, programs_per_sm=30).grid(5, 130, cpu) == (15,)
    assert 0 in few.grid(0, 130, cpu)
    assert 0 in replace(few, m=128).grid(0, 130, cpu)


def test_what_the_bulk_copy_engine_reads() -> None:
    w = torch.empty(4, 2, 24, 40, dtype=torch.bfloat16)
    assert can_describe(w)
    assert can_describe(w.transpose(1, 2).contiguous().transpose(1, 2))
    assert not can_describe(w.mT)
    assert not can_describe(w[..., :39].contiguous())
    assert not can_describe(w.flatten()[1:].unflatten(0, (-1, 1)).expand(-1, 8)[:8])


def test_activations_share_a_kernel_with_their_aliases() -> None:
    kernels = {function.__name__ for function in ACTIVATIONS.values()}
    assert kernels == {"silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"}
    assert ACTIVATIONS["gelu_pytorch_tanh"] is ACTIVATIONS["gelu_new"]
