"""permute and combine, the two verbs around the experts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moezoo.layers.moe import combine, permute


def chosen(num_tokens: int, k: int, num_experts: int) -> torch.Tensor:
    """k different experts for each token, [T, K] int32."""
    return torch.rand(num_tokens, num_experts).argsort(-1)[:, :k].int()


@pytest.mark.parametrize(
    "topk_ids",
    [
        pytest.param(chosen(1, 2, 5), id="one-token"),
        pytest.param(chosen(63, 3, 5), id="odd"),
        pytest.param(chosen(8, 5, 5), id="every-expert"),
        pytest.param(torch.full((9, 1), 2), id="all-on-one"),
        pytest.param(torch.tensor([[0, 4], [4, 0]]), id="empty-experts"),
        pytest.param(torch.tensor([[-1, 3], [1, -1], [-1, -1]]), id="absent"),
        pytest.param(torch.full((4, 2), -1), id="all-absent"),
        pytest.param(torch.empty(0, 3, dtype=torch.int32), id="no-tokens"),
    ],
)
def test_groups_rows_by_expert_in_their_order(topk_ids: torch.Tensor) -> None:
    order, offsets = permute(topk_ids, 5)
    assert order.dtype == offsets.dtype == torch.int32
    flat = topk_ids.flatten().tolist()
    assert sorted(order.tolist()) == list(range(len(flat)))
    assert offsets[0] == 0
    assert offsets[-1] == sum(e >= 0 for e in flat)
    for e in range(5):
        rows = order[offsets[e] : offsets[e + 1]].tolist()
        assert rows == [i for i, id_ in enumerate(flat) if id_ == e]
    assert order[offsets[-1] :].tolist() == [i for i, id_ in enumerate(flat) if id_ < 0]


@given(
    st.integers(1, 9).flatmap(
        lambda k: st.lists(
            st.lists(st.integers(-1, 6), min_size=k, max_size=k), min_size=1, max_size=9
        )
    )
)
def test_counts_sum_to_the_rows_and_the_permutation_inverts(ids: list[list[int]]) -> None:
    topk_ids = torch.tensor(ids)
    order, offsets = permute(topk_ids, 7)
    rows = topk_ids.flatten()
    assert torch.equal(offsets.diff(), torch.bincount(rows[rows >= 0], minlength=7).int())
    assert torch.equal(rows[order.long()][order.argsort()], rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_combine_rounds_once(dtype: torch.dtype) -> None:
    y, weights = torch.randn(5, 3, 7).to(dtype), torch.rand(5, 3)
    expected = (y.double() * weights.double().unsqueeze(-1)).sum(1)
    result = combine(y, weights)
    assert result.dtype == dtype
    # Within one step of the dtype from the exact sum, which a sum in 16 bit would leave.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=step, atol=2**-20)


def test_combine_of_no_tokens() -> None:
    assert combine(torch.empty(0, 2, 4), torch.empty(0, 2)).shape == (0, 4)
