import pytest
import torch

from moezoo.layers.kernels import tiles

CPU = torch.device("cpu")


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_fit_shared_memory(
    kilobytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "shared_memory", lambda device: kilobytes * 1024)
    for num_rows in (1, 8, 100, 1000, 10**4, 10**6):
        m = tiles.row_tile(num_rows, 8, dtype)
        for num_outputs in (1, 2):
            tile = tiles.choose_tile(m, num_outputs, dtype, CPU)
            assert tile.m == m
            # What tl.dot takes.
            assert min(tile.m, tile.n, tile.k) >= 16
            operands = (tile.m + num_outputs * tile.n) * tile.k * dtype.itemsize
            assert operands * tile.num_stages <= kilobytes * 1024


def test_row_tile_follows_the_rows_of_an_expert() -> None:
    sizes = [tiles.row_tile(8 * rows, 8, torch.bfloat16) for rows in (1, 16, 17, 60, 100, 5000)]
    assert sizes == [16, 16, 32, 64, 128, 128]
    assert tiles.row_tile(10**6, 8, torch.float32) == 32


def test_activations_share_a_kernel_with_their_aliases() -> None:
    from moezoo.layers.kernels.activations import ACTIVATIONS

    kernels = {function.__name__ for function in ACTIVATIONS.values()}
    assert kernels == {"silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"}
    assert ACTIVATIONS["gelu_pytorch_tanh"] is ACTIVATIONS["gelu_new"]
