import json
from pathlib import Path

import pytest
import torch

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [64, 65], ids=["descriptors", "pointers"])
def test_plans_fit_shared_memory(
    kilobytes: int, dtype: torch.dtype, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "shared_memory", lambda device: kilobytes * 1024)
    monkeypatch.setattr(tiles, "_tuned", lambda *key: None)
    x, w13, w2 = weights((8, hidden, 32), dtype)
    for num_rows in (1, 8, 100, 200, 300, 1000, 10**4, 10**6):
        chosen = plan(x, w13, w2, num_rows)
        assert chosen.gated_up.m == chosen.down.m
        for tile, num_parts in ((chosen.gated_up, 2), (chosen.down, 1)):
            # What tl.dot takes.
            assert min(tile.m, tile.n, tile.k) >= 16
            operands = (tile.m + num_parts * tile.n) * tile.k * dtype.itemsize
            assert operands * tile.num_stages <= kilobytes * 1024
            assert tile.descriptors == (hidden == 64 and dtype == torch.bfloat16)


def test_tiles_grow_with_the_rows_of_an_expert() -> None:
    x, w13, w2 = weights((8, 64, 32), torch.bfloat16)
    assert [plan(x, w13, w2, 8 * rows).down.m for rows in (1, 20, 40, 5000)] == [16, 32, 64, 128]


def test_every_table_of_the_package_is_read() -> None:
    paths = sorted(tiles.TABLES.glob("*.json"))
    assert paths
    for path in paths:
        table = tiles._table(path)
        assert len(table) == len(json.loads(path.read_text())["layers"])
        for rows in table.values():
            for _, tuned in rows:
                assert tuned.gated_up.m == tuned.down.m


def test_the_users_table_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Plan(Tile(16, 32, 64, 4, 2), Tile(16, 64, 64, 4, 2))
    entry = {
        "num_experts": 8,
        "hidden_size": 64,
        "intermediate_size": 32,
        "plans": [
            {
                "rows_per_expert": 4.0,
                "gated_up": vars(mine.gated_up),
                "down": vars(mine.down),
                "sort_rows": False,
            }
        ],
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"layers": [entry]}))
    package = next(tiles.TABLES.glob("*.json"))
    monkeypatch.setattr(tiles, "table_paths", lambda device: (package, path))
    x, w13, w2 = weights((8, 64, 32), torch.bfloat16)
    assert plan(x, w13, w2, 100) == mine
    x, w13, w2 = weights((9, 64, 32), torch.bfloat16)
    assert plan(x, w13, w2, 100) != mine


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
