"""The routing kernel against the torch routers, which are tested against transformers' own."""

import pytest
import torch

from moezoo.layers.kernels.topk import topk
from moezoo.layers.moe.routing import biased_topk, grouped_topk, softmax_topk, topk_sigmoid


def assert_same(
    actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert torch.equal(actual[1].cpu(), expected[1])
    torch.testing.assert_close(actual[0].cpu(), expected[0], rtol=1e-5, atol=1e-7, equal_nan=True)


def logits_of(num_tokens: int, num_experts: int) -> torch.Tensor:
    logits = torch.randn(
        num_tokens, num_experts, generator=torch.Generator().manual_seed(num_experts)
    )
    logits[:, -1] = logits[:, 0]  # a tie
    return logits


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k"),
    [(1, 8, 2), (7, 128, 8), (65, 60, 4), (3, 5, 5), (2, 1, 1), (0, 4, 2)],
)
@pytest.mark.sampled(n=2)
def test_softmax(
    num_tokens: int,
    num_experts: int,
    k: int,
    dtype: torch.dtype,
    renormalize: bool,
    device: torch.device,
) -> None:
    logits = logits_of(num_tokens, num_experts).to(dtype)
    scoring = "softmax_of_chosen" if renormalize else "softmax"
    assert_same(
        topk(logits.to(device), k, scoring=scoring),
        softmax_topk(logits, k, renormalize=renormalize),
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("num_experts", "num_groups", "topk_groups", "k"),
    [(256, 8, 4, 8), (160, 8, 3, 6), (64, 1, 1, 6), (12, 12, 5, 4), (6, 2, 1, 3)],
)
@pytest.mark.sampled(n=2)
def test_groups(
    num_experts: int,
    num_groups: int,
    topk_groups: int,
    k: int,
    scoring: str,
    biased: bool,
    device: torch.device,
) -> None:
    logits = logits_of(9, num_experts)
    bias = torch.randn(num_experts, generator=torch.Generator().manual_seed(1)) if biased else None
    settings = {
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "scoring": scoring,
        "renormalize": scoring == "sigmoid",
        "scaling": 2.5,
    }
    actual = topk(
        logits.to(device),
        k,
        correction_bias=None if bias is None else bias.to(device),
        epsilon=1e-20,
        **settings,
    )
    assert_same(actual, grouped_topk(logits, k, correction_bias=bias, **settings))


@pytest.mark.parametrize("min_sum", [0.0, 0.1])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_bias(scoring: str, min_sum: float, device: torch.device) -> None:
    logits = 3 * logits_of(9, 60)
    bias = torch.randn(60, generator=torch.Generator().manual_seed(1))
    settings = {"scoring": scoring, "min_sum": min_sum}
    actual = topk(
        logits.to(device), 5, correction_bias=bias.to(device), renormalize=True, **settings
    )
    expected = biased_topk(logits, 5, correction_bias=bias, **settings)
    assert_same(actual, expected)
    if scoring == "softmax":
        assert (expected[0].sum(-1) < 0.99).any() == (min_sum > 0)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("num_experts", "k"), [(16, 1), (128, 8), (5, 5), (37, 3)])
def test_sigmoid_of_chosen(
    num_experts: int, k: int, renormalize: bool, device: torch.device
) -> None:
    """Logits whose sigmoids are all 1 differ still."""
    logits = 30 + 9 * logits_of(7, num_experts)
    actual = topk(logits.to(device), k, scoring="sigmoid_of_chosen", renormalize=renormalize)
    assert_same(actual, topk_sigmoid(logits, k, renormalize=renormalize))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("num_experts", "k"), [(32, 4), (5, 5), (37, 3)])
def test_bias_of_the_gate(
    num_experts: int, k: int, renormalize: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """One that changes what is chosen, and of its own dtype."""
    logits = logits_of(9, num_experts)
    bias = 2 * torch.randn(num_experts, generator=torch.Generator().manual_seed(1))
    bias = bias.to(dtype)
    scoring = "softmax_of_chosen" if renormalize else "softmax"
    actual = topk(logits.to(device), k, scoring=scoring, bias=bias.to(device))
    assert_same(actual, softmax_topk(logits + bias.float(), k, renormalize=renormalize))
    assert_same(actual, softmax_topk(logits, k, renormalize=renormalize, bias=bias))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_touches_no_other(value: float, device: torch.device) -> None:
    logits = logits_of(6, 32)
    expected = softmax_topk(logits, 4, renormalize=True)
    logits[2, 7] = value
    logits[3] = value
    weights, ids = topk(logits.to(device), 4, scoring="softmax_of_chosen")
    others = [0, 1, 4, 5]
    assert torch.equal(ids.cpu()[others], expected[1][others])
    torch.testing.assert_close(weights.cpu()[others], expected[0][others])
    assert ((ids >= 0) & (ids < 32)).all()
    assert_same((weights, ids), softmax_topk(logits, 4, renormalize=True))


def test_strided_logits(device: torch.device) -> None:
    logits = logits_of(9, 20)
    strided = logits.T.contiguous().T.to(device)
    assert_same(topk(strided, 3, scoring="softmax"), softmax_topk(logits, 3, renormalize=False))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
def test_experts_that_are_banned_and_forced(
    scoring: str, biased: bool, device: torch.device
) -> None:
    """As `moezoo.layers.moe.override` has them: +-1e30 in logits and in the correction bias."""
    logits, correction = logits_of(9, 16), torch.linspace(-0.1, 0.1, 16) if biased else None
    banned, forced = [0, 1, 2, 3, 9], [12]
    logits[:, banned] = -1e30
    logits[:, forced] = logits.amax(-1, keepdim=True) + 1e-3
    if correction is not None:
        correction[banned], correction[forced] = -1e30, 1e30
    options = {"scoring": scoring, "correction_bias": correction, "renormalize": True}
    groups = {"num_groups": 4, "topk_groups": 2}
    moved = None if correction is None else correction.to(device)
    actual = topk(
        logits.to(device), 4, **(options | {"correction_bias": moved}), **groups, epsilon=1e-20
    )
    assert_same(actual, grouped_topk(logits, 4, **options, **groups))
    assert not torch.isin(actual[1].cpu(), torch.tensor(banned)).any()
    if biased or scoring == "softmax":
        assert (actual[1] == 12).any(1).all()
