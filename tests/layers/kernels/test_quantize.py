import re

import pytest
import torch

from kernels.routings import ROUTINGS, topk_ids
from moezoo.layers.kernels import permute
from moezoo.layers.kernels.quantize import permute_and_quantize, permute_and_quantize_ref


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # no tl.dot: bf16 is right in the interpreter too


@pytest.mark.parametrize("hidden", [1, 128, 300, 1280])
@pytest.mark.parametrize("routing", ["one-token", "odd", "no-tokens", "absent"])
@pytest.mark.parametrize("few_rows", [0, 8192], ids=["many", "few"])
@pytest.mark.usefixtures("fp8")
@pytest.mark.sampled(n=6)
def test_matches_reference(
    few_rows: int,
    routing: str,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device.type == "cpu" and few_rows == 0 and (hidden != 300 or dtype != torch.float16):
        pytest.skip("seconds in the interpreter; other rows have these widths and types")
    monkeypatch.setattr(permute, "FEW_ROWS", few_rows)
    num_tokens, _, num_experts = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden, generator=generator) * torch.logspace(-3, 3, hidden)
    if num_tokens:
        x[0] = 0.0
    x, ids = x.to(device, dtype), topk_ids(routing).to(device)
    rows, quantized = permute_and_quantize(x, ids, num_experts, 16)
    expected_rows, expected = permute_and_quantize_ref(x, ids, num_experts, 16)
    valid, num_tiles = int(expected_rows.offsets[-1]), int(expected_rows.num_tiles)
    assert torch.equal(rows.order[:valid], expected_rows.order[:valid])
    assert torch.equal(rows.positions, expected_rows.positions)
    assert torch.equal(rows.offsets, expected_rows.offsets)
    assert torch.equal(rows.tiles[:, :num_tiles], expected_rows.tiles)
    assert torch.equal(quantized.data.float(), expected.data.float())
    assert torch.equal(quantized.scales, expected.scales)


@pytest.mark.usefixtures("fp8")
def test_strides_and_nan(device: torch.device) -> None:
    x = torch.randn(63, 300, generator=torch.Generator().manual_seed(0)).to(device)
    x[2, 130] = torch.nan
    ids = topk_ids("odd").to(device)
    strided = x.mT.contiguous().mT
    _, quantized = permute_and_quantize(strided, ids, 7, 16)
    assert quantized.dequantize()[2, 130].isnan()
    x[2] = 1.0
    _, quantized = permute_and_quantize(x.mT.contiguous().mT, ids, 7, 16)
    _, expected = permute_and_quantize_ref(x, ids, 7, 16)
    assert torch.equal(quantized.data.float(), expected.data.float())


def test_refuses() -> None:
    ids = topk_ids("odd")
    with pytest.raises(ValueError, match=re.escape("x must be [63, H]")):
        permute_and_quantize(torch.zeros(62, 8), ids, 7, 16)
    with pytest.raises(ValueError, match="int32 or int64"):
        permute_and_quantize(torch.zeros(63, 8), ids.float(), 7, 16)
