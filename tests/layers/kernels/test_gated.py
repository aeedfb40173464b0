import re

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.kernels.gated import gate, gate_ref

# One name for each function.
KERNELS = {function: name for name, function in ACTIVATIONS.items()}.values()


def gate_up(num_rows: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(num_rows, 2 * intermediate, generator=generator)).to(dtype).to(device)


@pytest.mark.parametrize("intermediate", [1, 24, 256, 1500])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_matches_torch(
    num_rows: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = gate_up(num_rows, intermediate, dtype, device)
    left, right = x.float().chunk(2, -1)
    assert_close(gate(x), (F.silu(left) * right).to(dtype))


@pytest.mark.parametrize(
    "activation",
    [*KERNELS, Gating("silu", limit=2.5), Gating("quick_gelu", limit=0.5, up_offset=1.0)],
    ids=str,
)
def test_activations(activation: str | Gating, device: torch.device) -> None:
    x = gate_up(5, 24, torch.float32, device)
    assert_close(gate(x, activation), gate_ref(x, activation))


def test_rows_that_lie_apart(device: torch.device) -> None:
    x = gate_up(5, 24, torch.float32, device)
    wide = torch.full((5, 100), torch.nan, device=device)
    wide[:, 3:51] = x
    assert_close(gate(wide[:, 3:51]), gate(x))


@pytest.mark.parametrize("shape", [(0, 48), (5, 0)])
def test_nothing(shape: tuple[int, int], device: torch.device) -> None:
    assert gate(torch.zeros(shape, device=device)).shape == (shape[0], shape[1] // 2)


@pytest.mark.parametrize(
    ("x", "activation", "message"),
    [
        (torch.zeros(5, 47), "silu", "gate_up must be [N, 2I] of dense rows, got [5, 47]"),
        (torch.zeros(5, 1, 48), "silu", "gate_up must be [N, 2I]"),
        (torch.zeros(48, 5).mT, "silu", "gate_up must be [N, 2I] of dense rows"),
        (torch.zeros(5, 48), "tanh", "activation must be one of"),
    ],
)
def test_refuses(x: Tensor, activation: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        gate(x, activation)
