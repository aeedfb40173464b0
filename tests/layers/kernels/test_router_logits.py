import re

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close, relative_difference
from torch import Tensor

from moezoo.layers.kernels.router_logits import router_logits, router_logits_ref


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def inputs(
    num_tokens: int, num_experts: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden, generator=generator)
    gate = torch.randn(num_experts, hidden, generator=generator) * hidden**-0.5
    return x.to(device, dtype), gate.to(device, dtype)


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 17, 64])
@pytest.mark.parametrize(
    ("num_experts", "hidden"),
    [(1, 1), (7, 100), (60, 129), (128, 2048), (257, 2049), (512, 8192)],
    ids=str,
)
def test_matches_fp32(
    num_experts: int, hidden: int, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and num_experts > 60:
        pytest.skip("slow in the interpreter")
    x, gate = inputs(num_tokens, num_experts, hidden, dtype, device)
    logits = router_logits(x, gate)
    assert logits.shape == (num_tokens, num_experts)
    expected = F.linear(x.double(), gate.double())
    assert logits.dtype == torch.float32
    assert relative_difference(logits, expected) <= 1e-5
    assert_close(router_logits_ref(x, gate), expected.float())
    assert torch.equal(router_logits(x, gate), logits)


def test_strides_and_unused_memory(dtype: torch.dtype, device: torch.device) -> None:
    tensors = inputs(2, 10, 100, dtype, device)
    expected = router_logits(*tensors)
    strided = []
    for tensor in tensors:
        wide = torch.full((len(tensor), 128), torch.nan).to(dtype)
        wide[:, :100] = tensor.cpu()
        strided.append(wide.to(device)[:, :100])
    assert torch.equal(router_logits(*strided), expected)


def test_a_token_with_nan_leaves_the_others_alone(device: torch.device) -> None:
    x, gate = inputs(5, 10, 100, torch.float16, device)
    expected = router_logits(x, gate)
    x[1, 3] = torch.nan
    logits = router_logits(x, gate)
    assert logits[1].isnan().all()
    assert torch.equal(logits[0], expected[0])
    assert torch.equal(logits[2:], expected[2:])


@pytest.mark.parametrize(
    ("x", "gate", "message"),
    [
        (torch.zeros(2, 40), torch.zeros(8, 41), "gate [E, H], got [2, 40] and [8, 41]"),
        (torch.zeros(2, 40), torch.zeros(8, 40).half(), "gate must be torch.float32 as x is"),
        (torch.zeros(65, 40), torch.zeros(8, 40), "x must be [T, H] with T <= 64"),
        (torch.zeros(1, 2, 40), torch.zeros(8, 40), "x must be [T, H]"),
        (torch.zeros(40, 2).mT, torch.zeros(8, 40), "x's last stride must be 1"),
        (torch.zeros(2, 40), torch.zeros(40, 8).mT, "gate's last stride must be 1"),
    ],
)
def test_refuses(x: Tensor, gate: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        router_logits(x, gate)
