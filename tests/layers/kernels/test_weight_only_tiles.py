from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import RELATIVE

from moezoo.layers.kernels import tiles, weight_only_tiles
from moezoo.layers.kernels.tiles import Plan, tuned
from moezoo.layers.kernels.weight_only_tiles import plan_weight_only
from moezoo.layers.quant import WeightOnly
from moezoo.layers.quant.int4 import Int4
from moezoo.layers.quant.int8 import Int8
from moezoo.layers.quant.mxfp4 import Mxfp4

FORMATS = {
    "int8": (Int8, {}),
    "int8-zeros": (Int8, {"zeros": True}),
    "int4": (Int4, {"group_size": 32}),
    "int4-zeros": (Int4, {"group_size": 32, "zeros": True}),
    "mxfp4": (Mxfp4, {}),
}
MEASURED = {(128, 2048, 768): [0.0625, 1, 4, 64, 256], (8, 4096, 14336): [0.25, 4, 16, 256, 1024]}


def weights(name: str, *shape: int, padding: int = 0) -> WeightOnly:
    """With so many bytes between the rows of data."""
    format_, options = FORMATS[name]
    w = format_.quantize(torch.ones(shape), **options)

    def spaced(data: torch.Tensor) -> torch.Tensor:
        wide = data.new_empty(*data.shape[:-1], data.shape[-1] + padding)
        return wide[..., : data.shape[-1]]

    return replace(w, data=spaced(w.data))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing planned yet, and every CUDA device a Hopper GPU without tables of its own."""
    monkeypatch.setattr(tiles, "user_table", lambda device: tmp_path / "none.json")
    monkeypatch.setattr(tiles, "table_name", lambda device: "GPU.json")
    monkeypatch.setattr(tiles, "capability", lambda device: (9, 0))
    tiles.reload_tables()
    yield
    tiles.reload_tables()


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize("padding", [0, 8], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("name", FORMATS)
def test_plans_have_tiles_that_the_kernels_take(
    name: str, padding: int, kilobytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "shared_memory", lambda device: kilobytes * 1024)
    w13, w2 = weights(name, 2, 2, 128, 64, padding=padding), weights(name, 2, 64, 128)
    for dtype in RELATIVE:
        x = torch.zeros(1, 64, dtype=dtype)
        for num_rows in (1, 2, 24, 80, 128, 256, 600, 2048):
            plan = plan_weight_only(x, w13, w2, num_rows=num_rows)
            assert plan.gated_up.m == plan.down.m
            for tile, num_parts in ((plan.gated_up, 2), (plan.down, 1)):
                assert tile.k % 64 == 0
                assert tile.descriptors == (dtype != torch.float32 and not padding)
                assert tile.descriptors or tile.m <= 128
                bits = FORMATS[name][0].bits
                column_bits = 8 * dtype.itemsize * tile.m + bits * num_parts * tile.n
                assert column_bits * tile.k * tile.num_stages <= 8 * 1024 * kilobytes


@pytest.mark.parametrize("sizes", MEASURED, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_tables_are_used_near_what_was_measured(
    name: str, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "shared_memory", lambda device: 227 * 1024)
    cuda, format_ = torch.device("cuda", 0), FORMATS[name][0]
    num_experts, hidden_size, intermediate_size = sizes
    shape = (num_experts, 2, intermediate_size, hidden_size)
    for rows in MEASURED[sizes]:
        measured = tuned(cuda, (*sizes, format_.name), rows, far=1.0)
        assert measured is not None

        def plan(ratio: float, rows: float = rows) -> Plan:
            zeros = name.endswith("-zeros")
            return weight_only_tiles._plan(
                *(cuda, torch.bfloat16, format_.name, format_.bits, shape),
                *(zeros, True, ratio * rows),
            )

        for ratio in (0.6, 1.0, 1.9):
            # They are of integers without zero points.
            if not name.endswith("-zeros"):
                assert plan(ratio) == measured
        assert plan(3.0).gated_up.m >= measured.gated_up.m
