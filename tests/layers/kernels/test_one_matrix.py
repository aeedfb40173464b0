import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from kernels import fp8_cases
from kernels.test_weight_only import with_signs
from kernels.tile_cases import bulk_copies
from moezoo.layers.kernels import one_matrix
from moezoo.layers.kernels.one_matrix import (
    linear_fp8,
    linear_fp8_ref,
    linear_weight_only,
    linear_weight_only_ref,
)
from moezoo.layers.kernels.tiles import Tile
from moezoo.layers.quant import BlockFp8, ChannelFp8, Format, Int4, Int8, Mxfp4

WEIGHT_ONLY: dict[str, tuple[type[Format], dict[str, Any]]] = {
    "int8": (Int8, {}),
    "int8-32": (Int8, {"group_size": 32}),
    "int8-zeros": (Int8, {"group_size": 32, "zeros": True}),
    "int4-64": (Int4, {"group_size": 64}),
    "int4-zeros": (Int4, {"group_size": 32, "zeros": True}),
    "mxfp4": (Mxfp4, {}),
}


def operands(num_rows: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    x, w = (torch.randn(rows, k, generator=generator) for rows in (num_rows, n))
    # Rows of very different sizes, so that a scale in the wrong place shows.
    w *= (torch.rand(n, 1, generator=generator) * 1.75 + 0.25) * k**-0.5
    bias = torch.randn(n, generator=generator)
    return x.to(device), w.to(device), bias.to(device)


@pytest.mark.parametrize(("num_rows", "n"), [(1, 70), (7, 1), (37, 129), (0, 70)])
@pytest.mark.parametrize("kind", WEIGHT_ONLY)
@pytest.mark.sampled(n=7)
def test_weight_only_matches_reference(
    kind: str, num_rows: int, n: int, device: torch.device, dtype: torch.dtype
) -> None:
    x, w, bias = operands(num_rows, n, 192, device)
    cls, options = WEIGHT_ONLY[kind]
    args = (x.to(dtype), cls.quantize(w, **options), bias.to(dtype) if n == 70 else None)
    y = linear_weight_only(*args)
    assert_close(y, linear_weight_only_ref(*args))
    assert torch.equal(y, linear_weight_only(*args))


@pytest.mark.parametrize("kind", ["int8", "int8-32", "int4-64", "int4-zeros"])
def test_negative_scales(kind: str, device: torch.device) -> None:
    """The reference is what each code and scale stand for, without `dequantize`."""
    x, w, _ = operands(5, 33, 192, device)
    cls, options = WEIGHT_ONLY[kind]
    w = with_signs(cls.quantize(w, **options))
    codes = w.data.double()
    zeros = 0 if cls is Int8 else 8 if w.zeros is None else w.zeros.repeat_interleave(32, 1)
    if cls is Int4:
        codes = torch.stack((w.data % 16, w.data // 16), -1).flatten(1).double()
    scales = w.scales.double().repeat_interleave(192 // w.scales.shape[1], 1)
    weight = (codes - zeros) * scales
    assert w.dequantize(torch.float64).equal(weight.float().double())
    x = x.half()
    assert_close(linear_weight_only(x, w), (x.double() @ weight.T).half())


@pytest.mark.parametrize("cls", [Int4, Int8])
def test_columns_in_an_order(
    cls: type[Int4] | type[Int8], device: torch.device, dtype: torch.dtype
) -> None:
    x, w, _ = operands(5, 33, 96, device)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).to(device)
    held = replace(cls.quantize(w[:, order], group_size=32), order=order.int())
    x = x.to(dtype).mT.contiguous().mT
    assert_close(linear_weight_only(x, held), linear_weight_only_ref(x, held))


@pytest.mark.parametrize(("num_rows", "n", "k"), [(1, 70, 192), (37, 300, 130), (0, 70, 192)])
@pytest.mark.parametrize("cls", [BlockFp8, ChannelFp8])
@pytest.mark.usefixtures("fp8")
def test_fp8_matches_reference(
    cls: type[BlockFp8] | type[ChannelFp8],
    num_rows: int,
    n: int,
    k: int,
    device: torch.device,
) -> None:
    x, w, bias = (tensor.half() for tensor in operands(num_rows, n, k, device))
    args = (x, cls.quantize(w), bias if n == 70 else None)
    y = linear_fp8(*args)
    assert_close(y, linear_fp8_ref(*args))
    assert torch.equal(y, linear_fp8(*args))


@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("name", fp8_cases.TILES)
@pytest.mark.usefixtures("fp8")
@pytest.mark.sampled(n=2)
def test_a_scale_a_row_in_every_tile(name: str, width: int, device: torch.device) -> None:
    tile = replace(bulk_copies(fp8_cases.TILES[name], device), n=width)
    x, w, bias = (tensor.half() for tensor in operands(75, 400, 144, device))
    w = ChannelFp8.quantize(w)
    assert_close(linear_fp8(x, w, bias, tile=tile), linear_fp8_ref(x, w, bias))


def test_tiles_for_all_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_matrix, "multiprocessors", lambda device: 132)
    x, tile = torch.empty(20, 64), Tile(16, 256, 64, 4, 2)
    widths = [one_matrix._narrow(tile, x, n).n for n in (2**15, 2**14, 2**13, 2**10)]
    assert widths == [256, 128, 64, 64]
    assert one_matrix._narrow(replace(tile, n=32), x, 64).n == 32


@pytest.mark.parametrize("function", [linear_weight_only, linear_fp8])
def test_refuses(function: Any) -> None:
    cls = Int8 if function is linear_weight_only else BlockFp8
    x, w, bias = operands(3, 40, 64, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape("got [3, 63] and [40, 64]")):
        function(x[:, 1:], cls.quantize(w))
    with pytest.raises(ValueError, match=re.escape("bias must be [40], got [39]")):
        function(x, cls.quantize(w), bias[1:])
