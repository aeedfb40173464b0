import re

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from moezoo.layers.kernels.sum_rows import sum_rows, sum_rows_ref


def inputs(num_tokens: int, most: int, hidden: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(7, hidden, generator=generator)
    places = torch.randint(-1, 7, (num_tokens, most), generator=generator)
    places[::3] = -1
    return y.to(device), places.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [1, 40, 1500])
@pytest.mark.parametrize(("num_tokens", "most"), [(0, 2), (1, 1), (13, 3), (64, 8)])
@pytest.mark.sampled(n=4)
def test_matches_reference(
    num_tokens: int, most: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> None:
    y, places = inputs(num_tokens, most, hidden, device)
    y = y.to(dtype)
    assert_close(sum_rows(y, places), sum_rows_ref(y, places))


def test_rows_that_nobody_names_are_not_looked_at(device: torch.device) -> None:
    y, places = inputs(13, 3, 40, device)
    expected = sum_rows(y, places)
    unnamed = sorted(set(range(7)) - set(places.flatten().tolist()))
    wider = torch.cat((y, torch.full_like(y, torch.nan)))
    wider[unnamed] = torch.nan
    assert torch.equal(sum_rows(wider, places.mT.contiguous().mT), expected)
    assert torch.equal(sum_rows(wider, places.int()), expected)
    assert not sum_rows(y[:0], torch.full_like(places, -1)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(7, 3, 40)}, "y must be [S, H] and contiguous"),
        ({"y": torch.zeros(40, 7).mT}, "y must be [S, H] and contiguous"),
        ({"places": torch.zeros(13, dtype=torch.int64)}, "places must be int [T, J], got [13]"),
        ({"places": torch.zeros(13, 3)}, "places must be int [T, J], got [13, 3] torch.float32"),
    ],
)
def test_refuses(change: dict[str, Tensor], message: str) -> None:
    y, places = inputs(13, 3, 40, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        sum_rows(**{"y": y, "places": places} | change)
