"""ChannelFp8 against its definition."""

from typing import Literal

import pytest
import torch

from moezoo.layers.quant import ChannelFp8


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_definition(granularity: Literal["channel", "tensor"], dtype: torch.dtype) -> None:
    w = torch.randn(2, 2, 7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    w *= torch.logspace(-3, 3, 7, dtype=dtype).unsqueeze(-1)
    q = ChannelFp8.quantize(w, granularity=granularity)
    largest = w.float().abs().amax(-1 if granularity == "channel" else (-2, -1), keepdim=True)
    scales = (largest / 448).expand(2, 2, 7, 1)
    torch.testing.assert_close(q.scales, scales.squeeze(-1))
    assert torch.equal(q.dequantize(), q.data.float() * q.scales.unsqueeze(-1))
    # Half a step of 3 bits of mantissa, or of the subnormal numbers.
    step = w.float().abs() / 16 + scales * 2**-10
    assert ((q.dequantize() - w).abs() <= step * 1.01).all()
