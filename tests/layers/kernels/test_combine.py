import re

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from kernels.routings import ROUTINGS, topk_ids
from moezoo.layers.kernels.combine import combine, combine_ref
from moezoo.layers.kernels.permute import permute_ref


def inputs(routing: str, hidden: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, k, num_experts = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(num_tokens * k, hidden, generator=generator)
    weights = torch.rand(num_tokens, k, generator=generator)
    positions = permute_ref(topk_ids(routing), num_experts, 16).positions
    return y.to(device), weights.to(device), positions.to(device)


@pytest.mark.parametrize("hidden", [1, 40, 1500])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.sampled(n=6)
def test_matches_reference(
    routing: str, hidden: int, dtype: torch.dtype, device: torch.device
) -> None:
    y, weights, positions = inputs(routing, hidden, device)
    y = y.to(dtype)
    assert_close(combine(y, weights, positions), combine_ref(y, weights, positions))


def test_rows_of_absent_experts_are_not_looked_at(device: torch.device) -> None:
    y, weights, positions = inputs("absent", 40, device)
    expected = combine(y, weights, positions)
    y[int(positions.max()) + 1 :] = torch.nan
    weights[positions < 0] = torch.inf
    result = combine(y, weights, positions)
    assert torch.equal(result, expected)
    assert not result[5].any()


def test_strided_weights(device: torch.device) -> None:
    y, weights, positions = inputs("odd", 40, device)
    result = combine(y, weights.mT.contiguous().mT, positions)
    assert torch.equal(result, combine(y, weights, positions))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(63, 3, 40)}, "y must be [S, H] and contiguous"),
        ({"y": torch.zeros(40, 189).mT}, "y must be [S, H] and contiguous"),
        ({"y": torch.zeros(188, 40)}, "y [189, H]"),
        ({"positions": torch.zeros(3, 63).int().mT}, "positions must be contiguous"),
        ({"topk_weights": torch.zeros(63, 2)}, "topk_weights must be [63, 3]"),
        ({"topk_weights": torch.zeros(63, 3).half()}, "topk_weights must be float32"),
    ],
)
def test_refuses(change: dict[str, Tensor], message: str) -> None:
    y, weights, positions = inputs("odd", 40, torch.device("cpu"))
    arguments = {"y": y, "topk_weights": weights, "positions": positions}
    with pytest.raises(ValueError, match=re.escape(message)):
        combine(**(arguments | change))
