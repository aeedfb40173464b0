import re

import pytest
import torch

from kernels.routings import ROUTINGS, topk_ids
from moezoo.layers.kernels import permute
from moezoo.layers.kernels.interleave import (
    interleave,
    interleave_ref,
    permute_and_interleave,
    permute_and_interleave_ref,
)


@pytest.mark.parametrize("ways", [1, 2, 4])
@pytest.mark.parametrize("columns", [64, 52, 300])
def test_matches_reference(ways: int, columns: int, device: torch.device) -> None:
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0)).to(device)
    strided = torch.cat((x, x), 1)[:, :columns]
    for tensor in (x, strided, x[:0]):
        assert torch.equal(interleave(tensor, ways), interleave_ref(tensor, ways))


def test_first_ways_of_eight_words_come_first() -> None:
    x = torch.arange(36)[None]
    first, second = interleave_ref(x, 4).view(2, 4, 8)
    assert first.tolist() == [[way + 4 * i for i in range(8)] for way in range(4)]
    assert second[:, 0].tolist() == [32, 33, 34, 35]
    assert not second[:, 1:].any()


@pytest.mark.parametrize("columns", [0, 52, 1300])
@pytest.mark.parametrize("routing", ["one-token", "odd", "no-tokens", "absent"])
@pytest.mark.parametrize("few_rows", [0, 8192], ids=["many", "few"])
@pytest.mark.sampled(n=6)
def test_in_the_launch_of_permute(
    few_rows: int,
    routing: str,
    columns: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(permute, "FEW_ROWS", few_rows)
    num_tokens, _, num_experts = ROUTINGS[routing]
    x = torch.randn(columns, num_tokens, generator=torch.Generator().manual_seed(0)).to(device).mT
    ids = topk_ids(routing).to(device)
    rows, out = permute_and_interleave(x, ids, num_experts, 16, ways=4)
    expected_rows, expected = permute_and_interleave_ref(x, ids, num_experts, 16, ways=4)
    valid, num_tiles = int(expected_rows.offsets[-1]), int(expected_rows.num_tiles)
    assert torch.equal(rows.order[:valid], expected_rows.order[:valid])
    assert torch.equal(rows.positions, expected_rows.positions)
    assert torch.equal(rows.offsets, expected_rows.offsets)
    assert torch.equal(rows.tiles[:, :num_tiles], expected_rows.tiles)
    assert torch.equal(out, expected)


def test_refuses_other_tokens() -> None:
    with pytest.raises(ValueError, match=re.escape("x must be [63, K]")):
        permute_and_interleave(torch.zeros(62, 8), topk_ids("odd"), 7, 16, ways=2)
