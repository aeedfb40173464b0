import pytest
import torch
from torch import Tensor

from moezoo.layers.kernels.row_format import (
    RowFormat,
    local_rows_ref,
    pack_rows_ref,
    unpack_rows_ref,
)
from moezoo.layers.kernels.wire_rows import local_rows, pack_rows, unpack_rows
from moezoo.layers.quant.fp8 import quantize_rows

SLOTS, FIRST, STOP = 9, 3, 7


def inputs(
    num_tokens: int, hidden: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    weights = torch.rand(num_tokens, k, generator=generator)
    slots = torch.randint(-1, SLOTS, (num_tokens, k), generator=generator).int()
    return x.to(device), weights.to(device), slots.to(device)


def expected_rows(slots: Tensor, num_rows: int) -> list[list[int]]:
    told = [[s - FIRST if FIRST <= s < STOP else -1 for s in row] for row in slots.tolist()]
    return told + [[-1] * slots.shape[1]] * (num_rows - len(told))


@pytest.mark.parametrize("octets", [False, True], ids=["model", "fp8"])
@pytest.mark.parametrize("packed_by", ["kernel", "reference"])
@pytest.mark.parametrize(("hidden", "k"), [(1, 1), (41, 3), (300, 8), (1500, 6)])
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(0, 0), (0, 2), (1, 1), (13, 20)])
@pytest.mark.sampled(n=3)
def test_what_is_packed_comes_back(
    num_tokens: int,
    num_rows: int,
    hidden: int,
    k: int,
    packed_by: str,
    octets: bool,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    """Each of the two takes what the other packed."""
    if octets:
        request.getfixturevalue("fp8")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if (dtype, device.type, packed_by) == (torch.bfloat16, "cpu", "reference") and octets:
            continue  # the interpreter cuts bits off where it should round
        form = RowFormat(hidden, k, dtype, octets)
        x, weights, slots = inputs(num_tokens, hidden, k, dtype, device)
        ways = (pack_rows, unpack_rows_ref), (pack_rows_ref, unpack_rows)
        pack, unpack = ways[packed_by == "reference"]
        rows = pack(form, x, weights, slots, num_rows)
        assert rows.shape == (num_rows, form.width) and form.width % 128 == 0
        back, back_weights, local = unpack(form, rows, FIRST, STOP)
        right = quantize_rows(x).dequantize()[:, :hidden].to(dtype) if octets else x
        assert back.shape == (num_rows, hidden) and back.dtype == dtype
        assert torch.equal(back[:num_tokens], right)
        assert torch.equal(back_weights[:num_tokens], weights)
        assert local.tolist() == expected_rows(slots, num_rows)
        assert back_weights.is_contiguous() and local.dtype == torch.int32


def test_local_rows(device: torch.device) -> None:
    _, _, slots = inputs(300, 4, 5, torch.float32, device)
    for way in (local_rows, local_rows_ref):
        for given in (slots, slots.long(), slots.mT.contiguous().mT):
            assert way(given, FIRST, STOP).tolist() == expected_rows(slots, 300)
        assert way(slots[:0], FIRST, STOP).shape == (0, 5)


def test_refuses() -> None:
    form = RowFormat(8, 2, torch.float32)
    x, weights, slots = inputs(3, 8, 2, torch.float32, torch.device("cpu"))
    for given in (
        (x[:, :7], weights, slots, 3),
        (x.half(), weights, slots, 3),
        (x, weights, slots, 2),
    ):
        with pytest.raises(
            ValueError, match=r"x must be \[3, 8\] torch.float32 and slots \[3, 2\]"
        ):
            pack_rows(form, *given)
