"""Mxfp4 against transformers' decoder and against every number that there is."""

import itertools

import pytest
import torch
from torch import Tensor

from moezoo.errors import QuantizationError
from moezoo.layers.quant import Mxfp4

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_every_code() -> None:
    data = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.arange(120, 136, dtype=torch.uint8).view(16, 1)
    found = Mxfp4(data, scales).dequantize()
    signed = [*VALUES, *(-value for value in VALUES)]
    for high, low in itertools.product(range(16), range(16)):
        expected = [signed[low] * 2.0 ** (120 + high - 127), signed[high] * 2.0 ** (high - 7)]
        assert found[high, 2 * low : 2 * low + 2].tolist() == expected


def test_extreme_scales() -> None:
    data = torch.full((2, 16), 0x11, dtype=torch.uint8)
    found = Mxfp4(data, torch.tensor([[0], [254]], dtype=torch.uint8)).dequantize()
    assert found[:, 0].tolist() == [2.0**-128, 2.0**126]


def test_equals_transformers() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    if not hasattr(mxfp4, "convert_moe_packed_tensors"):
        pytest.skip("this transformers has no convert_moe_packed_tensors")
    q = Mxfp4.quantize(normal(3, 10, 96) * 3)
    blocks = q.data.unflatten(-1, (-1, 16))
    theirs = mxfp4.convert_moe_packed_tensors(blocks, q.scales, dtype=torch.float32)
    assert torch.equal(theirs.mT, q.dequantize())


def test_rounds_to_nearest_even() -> None:
    """With the scale of 1 that a 6 and its neighbours fix."""
    for sign in (1.0, -1.0):
        numbers = [0.2, 0.25, 0.3, 0.75, 1.1, 1.25, 1.75, 2.4, 2.5, 3.4, 3.5, 4.9, 5.0, 5.1]
        rounded = [0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 4.0, 4.0, 4.0, 6.0]
        # 6, 3 and 1.5 keep the scale: halved they clip, doubled they lose 1.5 and 0.5.
        w = sign * torch.tensor([*numbers, *[6.0, 3.0, 1.5, 0.5] * 4, 6.0, 6.0])
        q = Mxfp4.quantize(w[None])
        assert q.scales.tolist() == [[127]]
        assert (sign * q.dequantize()[0]).tolist()[: len(rounded)] == rounded
        assert torch.equal(q.dequantize()[0, len(rounded) :], w[len(rounded) :])


def test_least_error_of_all_scales() -> None:
    w = normal(40, 32)
    found = (Mxfp4.quantize(w).dequantize() - w).square().sum(-1)
    standard = torch.frexp(w.abs().amax(-1)).exponent - 3
    table = torch.tensor([*VALUES, *(-value for value in VALUES)])
    for shift in range(-3, 4):
        numbers = table * torch.exp2((standard + shift).float())[:, None]
        error = (w[:, :, None] - numbers[:, None]).abs().amin(-1).square().sum(-1)
        assert (found <= error * 1.0001).all()
        if shift == 0:
            assert found.sum() <= 0.94 * error.sum()


def test_negative_zero_and_small_numbers() -> None:
    w = torch.zeros(2, 32)
    w[0, 0] = 2.0**-140
    w[1, :2] = torch.tensor([3e38, -3e38])
    q = Mxfp4.quantize(w)
    assert q.dequantize().isfinite().all()
    torch.testing.assert_close(q.dequantize()[1, :2], w[1, :2], rtol=0.2, atol=0)


def test_refuses_columns() -> None:
    with pytest.raises(QuantizationError, match="a scale for 32 columns, which does not divide 48"):
        Mxfp4.quantize(torch.ones(2, 48))
