import re

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from kernels.routings import ROUTINGS, topk_ids
from moezoo.layers.kernels.combine import combine, combine_ref


def inputs(routing: str, hidden: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, k, _ = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(num_tokens, k, hidden, generator=generator)
    weights = torch.rand(num_tokens, k, generator=generator)
    return y.to(device), weights.to(device), topk_ids(routing).to(device)


@pytest.mark.parametrize("hidden", [1, 40, 1500])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_reference(
    routing: str, hidden: int, dtype: torch.dtype, device: torch.device
) -> None:
    y, weights, ids = inputs(routing, hidden, device)
    y = y.to(dtype)
    assert_close(combine(y, weights, ids), combine_ref(y, weights, ids))


def test_rows_of_absent_experts_are_not_looked_at(device: torch.device) -> None:
    y, weights, ids = inputs("absent", 40, device)
    expected = combine(y, weights, ids)
    y[ids < 0] = torch.nan
    weights[ids < 0] = torch.inf
    result = combine(y, weights, ids)
    assert torch.equal(result, expected)
    assert not result[5].any()


def test_strided_weights_and_ids(device: torch.device) -> None:
    y, weights, ids = inputs("odd", 40, device)
    result = combine(y, weights.mT.contiguous().mT, ids.long().mT.contiguous().mT)
    assert torch.equal(result, combine(y, weights, ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(63, 40)}, "y must be [T, K, H] and contiguous"),
        ({"y": torch.zeros(3, 63, 40).transpose(0, 1)}, "y must be [T, K, H] and contiguous"),
        ({"topk_weights": torch.zeros(63, 2)}, "topk_weights must be [63, 3], got [63, 2]"),
        ({"topk_weights": torch.zeros(63, 3).half()}, "topk_weights must be float32"),
        ({"topk_ids": torch.zeros(62, 3).int()}, "topk_ids must be [63, 3], got [62, 3]"),
    ],
)
def test_refuses(change: dict[str, Tensor], message: str) -> None:
    y, weights, ids = inputs("odd", 40, torch.device("cpu"))
    arguments = {"y": y, "topk_weights": weights, "topk_ids": ids}
    with pytest.raises(ValueError, match=re.escape(message)):
        combine(**(arguments | change))
