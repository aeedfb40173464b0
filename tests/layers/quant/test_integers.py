"""Int8 and Int4 against their definition, and the search for scales against round-to-nearest."""

import re

import pytest
import torch
from torch import Tensor

from moezoo.errors import QuantizationError
from moezoo.layers.quant import Int4, Int8
from moezoo.layers.quant.groups import default_group_size, pack, unpack

GAINS = {"normal": (0.92, 0.96), "heavy": (0.93, 0.975), "outliers": (0.945, 0.98)}
"""Norm of the search's error over that of round-to-nearest, at most: symmetric, with zeros."""


def weights(kind: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(*shape, generator=generator)
    if kind == "heavy":  # Student's t with 4 degrees of freedom
        chi = torch.randn(4, *shape, generator=generator).square().mean(0)
        return w / chi.sqrt()
    if kind == "outliers":
        w[..., ::50] *= 8
    return w


def decoded(q: Int8 | Int4) -> Tensor:
    """Number by number, for two dimensions."""
    rows, columns = q.shape
    out = torch.zeros(rows, columns)
    for n in range(rows):
        for j in range(columns):
            group = j // q.group_size
            if isinstance(q, Int8):
                code = int(q.data[n, j])
                code += 0 if q.zeros is None else 128 - int(q.zeros[n, group])
            else:
                code = int(q.data[n, j // 2]) >> (4 * (j % 2)) & 15
                code -= 8 if q.zeros is None else int(q.zeros[n, group])
            k = j if q.order is None else int(q.order[j])
            out[n, k] = code * float(q.scales[n, group])
    return out


@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8(group_size: int, dtype: torch.dtype) -> None:
    w = weights("normal", 3, 192).to(dtype)
    q = Int8.quantize(w, group_size=group_size)
    assert q.scales.dtype == dtype
    assert q.group_size == (192 if group_size == -1 else group_size)
    assert torch.equal(q.dequantize(), decoded(q))
    scales = q.scales.float().repeat_interleave(q.group_size, -1)
    largest = w.float().abs().unflatten(-1, (-1, q.group_size)).amax(-1)
    torch.testing.assert_close(q.scales, (largest / 127).to(dtype))
    # A scale that was rounded down clips by half a step of its dtype, 127 times.
    step = 0.5 + 127 * torch.finfo(dtype).eps / 2
    assert ((q.dequantize() - w).abs() <= step * scales * 1.0001).all()


@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_with_zero_points(group_size: int, dtype: torch.dtype) -> None:
    w = (weights("normal", 3, 192) + 2).to(dtype)
    q = Int8.quantize(w, group_size=group_size, zeros=True)
    assert q.zeros is not None and q.zeros.shape == q.scales.shape
    assert torch.equal(q.dequantize(), decoded(q))
    groups = w.float().unflatten(-1, (-1, q.group_size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    torch.testing.assert_close(q.scales, ((high - low) / 255).to(dtype))
    assert torch.equal(q.zeros, (-low / q.scales.float()).round().to(torch.uint8))
    scales = q.scales.float().repeat_interleave(q.group_size, -1)
    # Half a step, of the largest one if the zero point was rounded up.
    step = 1 + 255 * torch.finfo(dtype).eps / 2
    assert ((q.dequantize() - w).abs() <= step * scales * 1.0001).all()
    symmetric = Int8.quantize(w, group_size=group_size)
    assert (q.dequantize() - w).norm() < (symmetric.dequantize() - w).norm()


def test_int8_of_all_codes_and_zero_points() -> None:
    data = torch.arange(-128, 128).to(torch.int8).expand(256, -1)
    zeros = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    found = Int8(data, torch.full((256, 1), 0.5), zeros).dequantize()
    assert torch.equal(found, 0.5 * (torch.arange(256) - torch.arange(256).unsqueeze(1)))
    assert Int8(data, torch.ones(256, 1), torch.full_like(zeros, 128)).dequantize().equal(data)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
def test_int4(group_size: int, zeros: bool) -> None:
    w = weights("normal", 3, 192).bfloat16() + 0.5
    q = Int4.quantize(w, group_size=group_size, zeros=zeros)
    assert (q.scales.dtype, q.zeros is None) == (torch.bfloat16, not zeros)
    assert torch.equal(q.dequantize(), decoded(q))
    assert torch.equal(unpack(q.data), unpack(pack(unpack(q.data))))
    # Every weight has the nearest of its group's 16 numbers.
    codes = torch.arange(16.0) - (8 if q.zeros is None else q.zeros.float().unsqueeze(-1))
    numbers = (codes * q.scales.float().unsqueeze(-1)).unsqueeze(-2)
    groups = w.float().unflatten(-1, (-1, q.group_size)).unsqueeze(-1)
    least = (groups - numbers).abs().amin(-1).flatten(-2)
    torch.testing.assert_close((q.dequantize() - w).abs(), least)


@pytest.mark.parametrize("zeros", [False, True])
def test_round_to_nearest(zeros: bool) -> None:
    """What others call so: the scale at which the 15 steps between the codes just reach."""
    w = weights("normal", 5, 128)
    q = Int4.quantize(w, group_size=64, zeros=zeros, search=False)
    groups = w.unflatten(-1, (-1, 64))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    steps = high - low if zeros else 2 * torch.maximum(high, -low)
    torch.testing.assert_close(q.scales, steps / 15)
    if q.zeros is not None:
        assert torch.equal(q.zeros, (-low / q.scales).round().to(torch.uint8))


@pytest.mark.parametrize("kind", GAINS)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_search_beats_round_to_nearest(kind: str, zeros: bool, group_size: int) -> None:
    w = weights(kind, 64, 512).bfloat16()

    def errors(search: bool) -> Tensor:
        q = Int4.quantize(w, group_size=group_size, zeros=zeros, search=search)
        return (q.dequantize() - w).unflatten(-1, (-1, q.group_size)).norm(dim=-1)

    found, nearest = errors(True), errors(False)
    assert (found <= nearest * 1.0001).all()
    assert found.norm() <= GAINS[kind][zeros] * nearest.norm()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("cls", [Int8, Int4])
def test_order(cls: type[Int8] | type[Int4], zeros: bool) -> None:
    order = torch.stack([torch.randperm(64) for _ in range(3)]).int()
    w = weights("normal", 3, 5, 64)
    in_order = w.gather(-1, order.long().unsqueeze(1).expand(w.shape))
    q = cls.quantize(in_order, group_size=32, zeros=zeros)
    ordered = cls(q.data, q.scales, q.zeros, order)
    assert torch.equal(ordered[1].dequantize(), decoded(ordered[1]))
    assert (ordered.dequantize() - w).norm() <= 0.12 * w.norm()
    parts = ordered[1].in_parts(5)
    assert torch.equal(parts.dequantize().flatten(0, 1), ordered[1].dequantize())


def test_group_sizes() -> None:
    assert [default_group_size(k) for k in (2048, 192, 96)] == [128, 64, 32]
    with pytest.raises(QuantizationError, match=re.escape("none of the group sizes [128, 64, 32]")):
        default_group_size(48)
    for cls in (Int8, Int4):
        with pytest.raises(QuantizationError, match="group_size 128 of 192 columns: expected"):
            cls.quantize(torch.ones(2, 192), group_size=128)
        with pytest.raises(QuantizationError, match="group_size 48 of 192 columns: expected"):
            cls.quantize(torch.ones(2, 192), group_size=48)
    with pytest.raises(QuantizationError, match="two columns of int4 share a byte, got 33"):
        Int4.quantize(torch.ones(2, 33), group_size=-1)
    assert Int8.quantize(torch.ones(2, 33)).shape == (2, 33)
