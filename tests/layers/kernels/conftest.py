"""Kernels run on CUDA where there is one, and in Triton's interpreter otherwise."""

import importlib.util
from functools import cache
from typing import Any

import pytest
import torch

from moezoo.layers.kernels.overlap import capability

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*"]


def patch_language_once() -> None:
    """Triton's interpreter looks for all that there is to patch in triton.language at each call of
    a device function, a third of its time, though the launch around the call has patched it."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    call = interpreter.InterpretedFunction.__call__

    @cache
    def languages(fn: Any) -> list[Any]:
        return [x for x in fn.__globals__.values() if x is tl or x is tl.core]

    def patch_if_needed(fn: Any) -> None:
        if any(tl.core.is_builtin(language.load) for language in languages(fn)):
            patch(fn)

    def device_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        interpreter._patch_lang = patch_if_needed
        try:
            return call(self, *args, **kwargs)
        finally:
            interpreter._patch_lang = patch

    interpreter.InterpretedFunction.__call__ = device_call


if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    patch_language_once()


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


@pytest.fixture
def fp8(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter rounds to fp8 wrongly (subnormals, carries) and reads its NaN as a number:
    torch does both for it."""
    if device.type == "cuda":
        if capability(device) < (8, 9):
            pytest.skip("no fp8 products")
        return
    import numpy as np
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.name == "fp8e4nv":
            numbers = torch.from_numpy(values.view(np.uint8).copy()).view(torch.float8_e4m3fn)
            kind = {"fp16": torch.float16, "fp32": torch.float32}[target.name]
            return numbers.to(kind).numpy().view(f"uint{target.primitive_bitwidth}")
        if target.name == "fp8e4nv":
            assert source.name == "fp32"
            numbers = torch.from_numpy(values.view(np.float32).copy()).to(torch.float8_e4m3fn)
            return numbers.view(torch.uint8).numpy()
        return convert(values, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


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
