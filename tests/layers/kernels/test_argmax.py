import pytest
import torch

from moezoo.layers.kernels.argmax import argmax, argmax_ref


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 4096), (5, 4097), (1, 20000)], ids=str)
def test_equals_torch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found = argmax(x)
    assert found.dtype == torch.int64
    assert torch.equal(found, argmax_ref(x))
    assert torch.equal(x.gather(1, found[:, None])[:, 0], x.amax(1))


def test_first_of_equals_nan_and_infinities(device: torch.device) -> None:
    x = torch.zeros(6, 9000, device=device)
    x[1, [8999, 4500]] = 1.0
    x[2] = -torch.inf
    x[3, 5000] = torch.nan
    x[3, 7] = torch.inf
    x[4] = -1.0
    x[4, 3] = -0.0
    x[4, 5] = 0.0
    x[5, 8191] = torch.inf
    assert argmax(x).tolist() == [0, 4500, 0, 5000, 3, 8191]
    assert torch.equal(argmax(x), argmax_ref(x))


def test_rows_that_lie_apart(device: torch.device) -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(argmax(x[:, 5:77]), x[:, 5:77].argmax(1))


def test_no_rows_and_what_does_not_fit(device: torch.device) -> None:
    assert argmax(torch.empty(0, 5, device=device)).shape == (0,)
    for wrong in (torch.zeros(3, 0), torch.zeros(4), torch.zeros(3, 4).T):
        with pytest.raises(ValueError, match="x must be"):
            argmax(wrong.to(device))
