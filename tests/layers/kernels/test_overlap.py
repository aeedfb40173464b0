import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from moezoo.layers.kernels import overlap
from moezoo.layers.kernels.down import down
from moezoo.layers.kernels.down_fp8 import down_fp8
from moezoo.layers.kernels.down_weight_only import down_weight_only
from moezoo.layers.kernels.gated_up import gated_up
from moezoo.layers.kernels.gated_up_fp8 import gated_up_fp8
from moezoo.layers.kernels.gated_up_weight_only import gated_up_weight_only
from moezoo.layers.kernels.permute import permute_ref
from moezoo.layers.kernels.tiles import Tile
from moezoo.layers.quant import BlockFp8, Int8
from moezoo.layers.quant.fp8 import quantize_rows

ONCE = Tile(16, 128, 128, 4, 2)
PERSISTENT = replace(ONCE, programs_per_sm=1)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(overlap, "capability", lambda device: (9, 0))
    overlap.launch_options.cache_clear()
    yield torch.device("cuda", 0)
    overlap.launch_options.cache_clear()


def test_only_programs_of_one_tile_start_early(hopper: torch.device) -> None:
    assert overlap.launch_options(hopper) == {"OVERLAP": True, "launch_pdl": True}
    assert overlap.launch_options(hopper, persistent=True) == {"OVERLAP": False}
    assert overlap.launch_options(torch.device("cpu")) == {"OVERLAP": False}


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("tile", [ONCE, PERSISTENT], ids=["once", "persistent"])
def test_products_say_whether_they_are_persistent(
    tile: Tile, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    said = []

    def launch_options(device: torch.device, *, persistent: bool = False) -> dict[str, Any]:
        said.append(persistent)
        return {"OVERLAP": False}

    for name in ("gated_up", "down", "gated_up_fp8", "down_fp8", "packed_operand"):
        module = import_module(f"moezoo.layers.kernels.{name}")
        monkeypatch.setattr(module, "launch_options", launch_options)
    x = torch.ones(3, 128, dtype=torch.float16, device=device)
    w2 = torch.ones(2, 128, 128, dtype=torch.float16, device=device)
    w13 = torch.stack((w2, w2), 1)
    rows = permute_ref(torch.tensor([[0], [1], [1]], dtype=torch.int32, device=device), 2, 16)
    h = gated_up(x, w13, rows, k=1, tile=tile)
    assert down(h, w2, rows, tile=tile).shape == (3, 128)
    h = gated_up_weight_only(x, Int8.quantize(w13), rows, k=1, tile=tile)
    assert down_weight_only(h, Int8.quantize(w2), rows, tile=tile).shape == (3, 128)
    h8 = gated_up_fp8(quantize_rows(x), BlockFp8.quantize(w13), rows, k=1, tile=tile)
    y = down_fp8(h8, BlockFp8.quantize(w2), rows, dtype=torch.float16, tile=tile)
    assert y.shape == (3, 128)
    assert said == [tile.persistent] * 6


@pytest.mark.parametrize("counted", ["counted", "not-counted"])
def test_tiles_that_the_launch_before_writes_are_read_after_waiting(counted: str) -> None:
    script = Path(__file__).with_name("compile_down.py")
    # The interpreter would stand in for the compiler.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), counted]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reads_first = done.stdout.index("tt.load") < done.stdout.index("griddepcontrol.wait")
    assert reads_first == (counted == "counted")
