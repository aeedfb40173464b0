"""Which routine multiplies 16-bit numbers on the CPU.

torch has two: oneDNN's on processors with 16-bit instructions (AVX-512 or AMX), and otherwise its
own, which computes one row after the other.
"""

from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch

ONEDNN_DTYPES = tuple(
    dtype
    for dtype, supported in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    )
    if supported
)
"""The 16-bit dtypes that oneDNN multiplies on this processor."""

LARGE_MATRIX = 2**20
"""Number of weights from which `torch.mv` with oneDNN multiplies a single row faster than torch's
own routine: 70 us each at 1024 x 1024, 913 and 1,725 at 6144 x 2048 (Intel Xeon with AMX)."""

FP32_ROWS = 4
"""Number of rows from which a product in fp32 is faster than torch's own 16-bit routine."""


class _SwitchedOff:
    """Context manager that turns oneDNN off, by torch's process-wide switch, while any thread is in
    it."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.holders = 0
        self.before = True

    def __enter__(self) -> None:
        with self.lock:
            if self.holders == 0:
                onednn: Any = torch.backends.mkldnn
                self.before = onednn.enabled
                onednn.enabled = False
            self.holders += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.holders -= 1
            if self.holders == 0:
                onednn: Any = torch.backends.mkldnn
                onednn.enabled = self.before


class _Restored:
    """Context manager that turns oneDNN on again for one product within `_SwitchedOff`."""

    def __enter__(self) -> None:
        if _switched_off.holders:
            onednn: Any = torch.backends.mkldnn
            onednn.enabled = _switched_off.before

    def __exit__(self, *_: object) -> None:
        if _switched_off.holders:
            onednn: Any = torch.backends.mkldnn
            onednn.enabled = False


_switched_off = _SwitchedOff()
_restored = _Restored()


def without_onednn() -> AbstractContextManager[None]:
    """Return a context in which torch's own routine does 16-bit products on the CPU, not oneDNN.

    For a single row that routine reads the weights 1.6 times as fast as oneDNN, 3.5 times where
    they are small (AMD EPYC, torch 2.13). oneDNN is faster for more rows, and for a single row of a
    matrix of `LARGE_MATRIX` weights, for which `matvec` turns it on again. torch's switch is one
    for the process: it stays off until the last thread has left the context.
    """
    return _switched_off if ONEDNN_DTYPES else nullcontext()


def matvec(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return weight [M, N] @ x [N] + bias [M] by the faster routine on a CPU, also within
    `without_onednn`."""
    with _restored if is_large(weight) else nullcontext():
        return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)


def is_large(weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies a single row by this matrix faster than torch's own routine."""
    return weight.numel() >= LARGE_MATRIX and weight.dtype in ONEDNN_DTYPES
