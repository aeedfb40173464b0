import re

import pytest
import torch

from moezoo.errors import QuantizationError
from moezoo.layers.quant import BlockFp8, format
from moezoo.layers.quant.fp8 import quantize_rows

SHAPES = [(128, 128), (3, 256, 384), (2, 2, 144, 72), (1, 1), (5, 300, 20)]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = normal(*shape).to(dtype)
    quantized = BlockFp8.quantize(w)
    assert quantized.data.is_contiguous()
    assert quantized.shape == shape
    back = quantized.dequantize()
    for i in range(0, shape[-2], 128):
        for j in range(0, shape[-1], 128):
            block, found = (t[..., i : i + 128, j : j + 128].float() for t in (w, back))
            largest = block.abs().amax((-2, -1), keepdim=True)
            # Half a step of 3 bits of mantissa, or of the subnormal numbers.
            assert (
                (block - found).abs() <= (block.abs() / 16 + largest / 448 * 2**-10) * 1.01
            ).all()
            torch.testing.assert_close(found.abs().amax((-2, -1), keepdim=True), largest)
            scales = quantized.scales[..., i // 128, j // 128]
            torch.testing.assert_close(scales, largest[..., 0, 0] / 448)
    again = BlockFp8.quantize(back)
    torch.testing.assert_close(again.dequantize(), back)


def test_zeros_and_parts() -> None:
    w = normal(3, 256, 128)
    assert BlockFp8.quantize(w[:0]).shape == (0, 256, 128)
    w[1, :128] = 0.0
    quantized = BlockFp8.quantize(w)
    assert not quantized.dequantize()[1, :128].any()
    assert torch.equal(quantized[2].dequantize(), quantized.dequantize()[2])
    assert quantized.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_equals_transformers() -> None:
    """Against the quantiser that writes transformers' own checkpoints of this format."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "Fp8Quantize") or not hasattr(fp8, "Fp8Dequantize"):
        pytest.skip("this transformers has no Fp8Quantize and Fp8Dequantize")
    from types import SimpleNamespace

    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    quantizer = SimpleNamespace(quantization_config=config)
    w = normal(3, 256, 384) * torch.logspace(-2, 2, 384)
    written = fp8.Fp8Quantize(quantizer).convert({"experts.weight": w})
    theirs = BlockFp8(written["experts.weight"], written["experts.weight_scale_inv"])
    ours = BlockFp8.quantize(w)
    torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-6, atol=0)
    # They multiply by a rounded reciprocal: a value in the middle of two may go to the other.
    assert (ours.data.float() != theirs.data.float()).float().mean() < 1e-3
    for quantized in (ours, theirs):
        read = fp8.Fp8Dequantize(quantizer).convert(
            {"weight": [quantized.data], "weight_scale_inv": [quantized.scales]}
        )
        assert torch.equal(read["weight"].float(), quantized.dequantize())


@pytest.mark.parametrize("width", [1, 128, 300])
def test_rows(width: int) -> None:
    x = normal(5, width).half()
    quantized = quantize_rows(x)
    assert quantized.data.shape == (5, -(-width // 128) * 128)
    assert not quantized.data[:, width:].float().any()
    for j in range(0, width, 128):
        group = x[:, j : j + 128].float()
        largest = group.abs().amax(1)
        torch.testing.assert_close(quantized.scales[:, j // 128], largest / 448)
        error = (quantized.dequantize()[:, j : j + group.shape[1]] - group).abs()
        assert (error <= (group.abs() / 16 + largest[:, None] / 448 * 2**-10) * 1.01).all()


@pytest.mark.parametrize(
    ("data", "scales", "message"),
    [
        (torch.zeros(4, 4), torch.ones(1, 1), "data must be [.., N, K] float8_e4m3fn"),
        (torch.zeros(4).to(torch.float8_e4m3fn), torch.ones(1), "got [4] torch.float8_e4m3fn"),
        (
            torch.zeros(2, 129, 256).to(torch.float8_e4m3fn),
            torch.ones(2, 1, 2),
            "scales of data [2, 129, 256] must be [2, 2, 2] torch.float32 on cpu, got [2, 1, 2]",
        ),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(1, 1).half(), "torch.float16"),
    ],
)
def test_refuses(data: torch.Tensor, scales: torch.Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=f"Quantization error: .*{re.escape(message)}"):
        BlockFp8(data, scales)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, -1.0])
def test_values_that_cannot_be_scales(value: float) -> None:
    quantized = BlockFp8.quantize(normal(2, 256, 128))
    quantized.scales[1, 1, 0] = value
    with pytest.raises(QuantizationError, match=re.escape("experts.w2: the scale of block [1, 1,")):
        quantized.check_values("experts.w2")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_works_on_some_rows_at_a_time(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = normal(*shape)
    expected = BlockFp8.quantize(w)
    for values in (1, 128 * shape[-1], 700 * shape[-1]):
        monkeypatch.setattr(format, "_CHUNK", {"cpu": values})
        found = BlockFp8.quantize(w)
        assert found.data.view(torch.uint8).equal(expected.data.view(torch.uint8))
        assert found.scales.equal(expected.scales)


def test_refuses_to_quantize() -> None:
    w = normal(2, 256, 128)
    w[1, 200, 3] = torch.nan
    with pytest.raises(QuantizationError, match=re.escape("the weight at [1, 200, 3] is nan")):
        BlockFp8.quantize(w)
    with pytest.raises(QuantizationError, match=re.escape("got [4, 4] torch.int8")):
        BlockFp8.quantize(torch.zeros(4, 4, dtype=torch.int8))
