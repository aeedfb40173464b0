"""Kernels run on CUDA where there is one, and in Triton's interpreter otherwise."""

import importlib.util

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cpu":
        import triton

        if not triton.knobs.runtime.interpret:
            pytest.skip("Triton's interpreter is off: its kernels run on the GPU")
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if request.param == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 matrices wrongly")
    return request.param


@pytest.fixture(autouse=True)
def nan_filled_cuda_buffers(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch.empty` gives NaN on CUDA too; whole numbers get the largest there is."""
    if "gpu" not in request.keywords:
        return
    empty = torch.empty

    def filled(*size: int, **settings: object) -> torch.Tensor:
        tensor = empty(*size, **settings)
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor.fill_(torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", filled)
