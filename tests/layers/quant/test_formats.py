"""What holds of every format."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from moezoo.errors import QuantizationError
from moezoo.layers.quant import (
    BlockFp8,
    ChannelFp8,
    Format,
    Int4,
    Int8,
    Mxfp4,
    QuantizedWeights,
    format,
)

KINDS: dict[str, tuple[type[Format], dict[str, Any]]] = {
    "block-fp8": (BlockFp8, {}),
    "channel-fp8": (ChannelFp8, {}),
    "tensor-fp8": (ChannelFp8, {"granularity": "tensor"}),
    "int8": (Int8, {}),
    "int8-groups": (Int8, {"group_size": 32}),
    "int8-zeros": (Int8, {"group_size": 64, "zeros": True}),
    "int8-rows": (Int8, {"zeros": True}),
    "int4": (Int4, {}),
    "int4-zeros": (Int4, {"group_size": 64, "zeros": True}),
    "int4-rows": (Int4, {"group_size": -1}),
    "mxfp4": (Mxfp4, {}),
}
LOSS = {"fp8": 0.03, "int8": 0.02, "int4": 0.14, "mxfp4": 0.13}
"""Norm of the error of normal weights over theirs, at most."""

kinds = pytest.mark.parametrize("kind", KINDS)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def quantized(kind: str, w: Tensor) -> Format:
    cls, options = KINDS[kind]
    return cls.quantize(w, **options)


def same(a: Format, b: Format) -> bool:
    """Bit for bit."""
    pairs = zip(a.tensors().values(), b.tensors().values(), strict=True)
    return type(a) is type(b) and all(
        x is y or torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs
    )


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 192), (2, 2, 5, 64), (1, 1, 128)], ids=str)
def test_is_near_the_weights(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    w = normal(*shape).to(dtype)
    q = quantized(kind, w)
    assert q.shape == shape
    back = q.dequantize()
    assert back.dtype == torch.float32
    loss = next(loss for name, loss in LOSS.items() if name in kind)
    assert (back - w).norm() <= loss * w.float().norm()
    assert torch.equal(q.dequantize(torch.bfloat16), back.bfloat16())
    assert all(t is None or t.is_contiguous() for t in q.tensors().values())


@kinds
def test_what_it_has_is_kept(kind: str) -> None:
    """Rows and matrices are quantised apart from one another, and zeros stay zeros."""
    w = normal(3, 4, 128).half()
    w[1] = 0
    q = quantized(kind, w)
    assert same(q[2], quantized(kind, w[2]))
    assert not q.dequantize()[1].any()
    assert same(quantized(kind, w.mT.contiguous().mT), q)
    tiny = w * 2**-20
    assert (quantized(kind, tiny).dequantize() - tiny).norm() <= 0.3 * tiny.float().norm()


@kinds
def test_in_parts(kind: str) -> None:
    w = normal(3, 256, 128)
    q = quantized(kind, w)
    assert same(q.in_parts(2), q.map(lambda tensor: tensor.unflatten(1, (2, -1))))
    assert torch.equal(q.in_parts(2).dequantize().flatten(1, 2), q.dequantize())


@kinds
def test_works_on_some_rows_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(3, 2, 7, 128)
    expected = quantized(kind, w)
    for values in (128 * 3, 128 * 15, 1):
        monkeypatch.setattr(format, "_CHUNK", {"cpu": values})
        assert same(quantized(kind, w), expected)
    none = quantized(kind, w[:0])
    assert none.shape == (0, 2, 7, 128)


@kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_refuses_to_quantize(kind: str, value: float) -> None:
    w = normal(2, 3, 128)
    w[1, 2, 50] = value
    with pytest.raises(QuantizationError, match=r"the weight at \[1, 2, 50\] is -?(nan|inf),"):
        quantized(kind, w)
    cls, options = KINDS[kind]
    with pytest.raises(QuantizationError, match=r"experts\.w2: the scale of"):
        cls.quantize_unchecked(w, **options).check_values("experts.w2")
    with pytest.raises(QuantizationError, match=re.escape("got [4, 64] torch.int8")):
        quantized(kind, torch.zeros(4, 64, dtype=torch.int8))


@kinds
def test_on_meta(kind: str) -> None:
    q = quantized(kind, normal(2, 2, 5, 128))
    options: dict[str, Any] = {}
    if isinstance(q, Int8 | Int4):
        options = {"group_size": q.group_size, "dtype": torch.float32, "ordered": True}
        options["zeros"] = q.zeros is not None
    meta = type(q).on_meta(*q.shape, **options).tensors()
    for name, tensor in q.tensors().items():
        if name == "order":
            assert meta[name].shape == (2, 2, 128) and meta[name].dtype == torch.int32
        elif tensor is None:
            assert meta[name] is None
        else:
            assert (meta[name].shape, meta[name].dtype) == (tensor.shape, tensor.dtype)


@kinds
def test_module(kind: str) -> None:
    q = quantized(kind, normal(2, 5, 64))
    module = QuantizedWeights(q)
    expected = {name: tensor for name, tensor in q.tensors().items() if tensor is not None}
    assert module.state_dict().keys() == expected.keys()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert set(expected) <= set(module.keep_dtype)
    assert module.shape == q.shape
    assert same(module.to(torch.float16)(), q)
    assert str(module) == f"QuantizedWeights([2, 5, 64], {q.name})"


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("channel-fp8", {"scales": (3,)}),
        ("int8", {"scales": (4, 6)}),
        ("int8", {"zeros": (4, 3)}),
        ("int8", {"order": (4, 96)}),
        ("int4", {"scales": (4, 6)}),
        ("int4", {"zeros": (4, 1)}),
        ("int4", {"order": (48,)}),
        ("mxfp4", {"scales": (4, 2)}),
    ],
)
def test_refuses_shapes_and_dtypes(kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = quantized(kind, normal(4, 96)).tensors()
    ((name, shape),) = shapes.items()
    found = tensors[name]
    dtype = found.dtype if found is not None else torch.int32 if name == "order" else torch.uint8
    with pytest.raises(QuantizationError, match=f"Quantization error: .*{name} of .*must be"):
        type(quantized(kind, normal(4, 96)))(**tensors | {name: torch.zeros(shape, dtype=dtype)})
    if found is not None:
        with pytest.raises(QuantizationError, match=rf"{name} of data .*got .* torch\.int64"):
            KINDS[kind][0](**tensors | {name: found.long()})


@kinds
def test_refuses_data(kind: str) -> None:
    tensors = quantized(kind, normal(4, 64)).tensors()
    data = tensors["data"]
    assert data is not None
    for wrong in (data.float(), data[0]):
        with pytest.raises(QuantizationError, match=r"data must be \[.., N, K"):
            KINDS[kind][0](**tensors | {"data": wrong})


@kinds
def test_refuses_scales(kind: str) -> None:
    q = quantized(kind, normal(4, 64))
    place = (2,) + (0,) * (q.scales.ndim - 1) if q.scales.shape[0] == 4 else (0, 0)
    wrong = (255,) if q.scales.dtype == torch.uint8 else (math.nan, math.inf, 0.0, -1.0)
    for value in wrong:
        q.scales[place] = value
        with pytest.raises(
            QuantizationError, match=re.escape(f"w2: the scale of {q.unit} {list(place)} is ")
        ):
            q.check_values("w2")


@kinds
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)], ids=str)
def test_no_rows(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantizationError, match="with N and K above 0, got"):
        quantized(kind, torch.ones(shape))


def test_a_granularity_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="granularity is 'x', expected 'channel' or 'tensor'"):
        ChannelFp8.quantize(normal(2, 32), granularity="x")


def test_weights_are_compared_without_a_look_at_their_values():
    a, b = (Int8.quantize(torch.ones(4, 32)) for _ in range(2))
    assert a == a and a != b and len({a, b}) == 2
