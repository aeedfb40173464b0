import re

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from moezoo.layers.kernels import add_norm
from moezoo.layers.kernels.add_norm import add_rms_norm, add_rms_norm_ref
from moezoo.layers.kernels.few_rows import add_norm_linear
from moezoo.layers.kernels.rotate_store import rotate_and_store
from moezoo.layers.kernels.router_logits import add_norm_router_logits
from moezoo.layers.norm import ZeroCenteredRMSNorm

EPS = 1e-5


def inputs(
    num_rows: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(num_rows, hidden, generator=generator)
    residual = torch.randn(num_rows, hidden, generator=generator)
    weight = torch.rand(hidden, generator=generator)
    return x.to(dtype).to(device), residual.to(dtype).to(device), weight.to(dtype).to(device)


@pytest.mark.parametrize("hidden", [1, 40, 256, 2048, 7168])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_matches_reference(
    num_rows: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, residual, weight = inputs(num_rows, hidden, dtype, device)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    expected, _ = add_rms_norm_ref(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert_close(normed, expected)


def test_without_a_residual(dtype: torch.dtype, device: torch.device) -> None:
    x, _, weight = inputs(5, 40, dtype, device)
    normed, total = add_rms_norm(x, None, weight, EPS)
    assert total is x
    assert_close(normed, add_rms_norm_ref(x, None, weight, EPS)[0])


def test_matches_transformers(device: torch.device) -> None:
    x, residual, weight = inputs(5, 40, torch.float16, device)
    norm = Qwen3MoeRMSNorm(40, EPS).to(device)
    norm.weight.data = weight
    assert_close(add_rms_norm(x, residual, weight, EPS)[0], norm(x + residual).detach())


@pytest.mark.parametrize("with_residual", [True, False])
def test_rows_longer_than_a_block(
    with_residual: bool, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(add_norm, "LARGEST_BLOCK", 64)
    x, residual, weight = inputs(5, 200, dtype, device)
    other = residual if with_residual else None
    normed, total = add_rms_norm(x, other, weight, EPS)
    assert torch.equal(total, x + residual if with_residual else x)
    assert_close(normed, add_rms_norm_ref(x, other, weight, EPS)[0])


def test_fp32_weight(device: torch.device) -> None:
    x, residual, weight = inputs(5, 40, torch.bfloat16, device)
    normed, _ = add_rms_norm(x, residual, weight.float(), EPS)
    assert_close(normed, add_rms_norm(x, residual, weight, EPS)[0])


def test_rows_that_lie_apart(device: torch.device) -> None:
    x, residual, weight = inputs(5, 40, torch.float32, device)
    wide = torch.full((5, 100), torch.nan, device=device)
    wide[:, 3:43], wide[:, 50:90] = x, residual
    result = add_rms_norm(wide[:, 3:43], wide[:, 50:90], weight, EPS)
    for actual, expected in zip(result, add_rms_norm(x, residual, weight, EPS), strict=True):
        assert_close(actual, expected)


def test_no_rows(device: torch.device) -> None:
    x, residual, weight = inputs(0, 40, torch.float32, device)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert normed.shape == total.shape == (0, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 1, 40)}, "x must be [N, H] of dense rows"),
        ({"x": torch.zeros(40, 5).mT}, "x must be [N, H] of dense rows"),
        ({"residual": torch.zeros(1, 40)}, "residual must be [5, 40] torch.float32"),
        ({"residual": torch.zeros(5, 40).half()}, "got [5, 40] torch.float16"),
        ({"residual": torch.zeros(40, 5).mT}, "residual must have dense rows"),
        ({"weight": torch.zeros(41)}, "weight must be [40]"),
        ({"weight": torch.zeros(80)[::2]}, "weight must be [40] and contiguous"),
    ],
)
def test_refuses(change: dict[str, Tensor], message: str) -> None:
    x, residual, weight = inputs(5, 40, torch.float32, torch.device("cpu"))
    arguments = {"x": x, "residual": residual, "weight": weight, "eps": EPS}
    with pytest.raises(ValueError, match=re.escape(message)):
        add_rms_norm(**(arguments | change))


def test_a_weight_around_zero(dtype: torch.dtype, device: torch.device) -> None:
    """Gemma's norm, in every kernel that computes one."""
    x, residual, weight = inputs(2, 40, dtype, device)
    theirs = Qwen3NextRMSNorm(40, EPS).to(dtype).to(device)
    theirs.weight.data = weight
    total = x + residual
    expected = theirs(total)
    normed, _ = add_rms_norm(x, residual, weight, EPS, offset=1.0)
    assert_close(normed, expected)
    norm = {"norm_weight": weight, "eps": EPS, "offset": 1.0}
    eye = torch.eye(40, dtype=dtype, device=device)
    assert_close(add_norm_linear(x, residual, eye, **norm)[0], expected)
    logits, rows, _ = add_norm_router_logits(x, residual, eye, **norm)
    assert_close(rows, expected)
    assert_close(logits, expected.float())
    keys, values = (torch.zeros(2, 1, 40, dtype=dtype, device=device) for _ in range(2))
    q = rotate_and_store(
        torch.cat((total, total, total), 1),
        None,
        torch.arange(2, device=device),
        keys,
        values,
        num_heads=1,
        num_kv_heads=1,
        q_weight=weight,
        k_weight=weight,
        eps=EPS,
        offset=1.0,
    )
    assert_close(q[:, 0], expected)
    assert_close(keys[:, 0], expected)
    assert values[:, 0].equal(total)
    ours = ZeroCenteredRMSNorm(40, EPS).to(dtype).to(device)
    ours.weight.data = weight
    with torch.no_grad():
        assert_close(ours(total), expected)
        assert_close(ours.add(x, residual)[0], expected)
