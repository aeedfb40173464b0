"""Linear layers, those that share an input, and which routine multiplies 16-bit numbers on the CPU.

Two routines of torch do: oneDNN's on processors with 16-bit instructions (AVX-512 or AMX), and
otherwise its own, which computes one row after the other.
"""

from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moezoo.device import runs_kernels
from moezoo.layers.norm import NormOfSum, normed
from moezoo.layers.pieces import PIECE, product_in_pieces
from moezoo.layers.quant import Format, QuantizedWeights
from moezoo.layers.quantized_linear import quantized_linear

ONEDNN_DTYPES = tuple(
    dtype
    for dtype, supported in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    )
    if supported
)
"""The 16-bit types that oneDNN multiplies on this processor."""

LARGE = 2**20
"""Weights of a matrix from which oneDNN multiplies a single row faster than torch's own routine, if
by `torch.mv`: 70 us each at 1024 x 1024, 913 and 1,725 at 6144 x 2048 (Intel Xeon with AMX)."""

FP32_ROWS = 4
"""From this many rows on, a product through fp32 is faster than torch's own 16-bit routine."""

FEW_ROWS = 8
"""Up to this many rows on CUDA a kernel reads the weights faster than cuBLAS does."""

NORM_ROWS = 2
"""Up to this many rows that kernel computes the norm of x as well, faster than another launch."""


class _Switch:
    """torch's process-wide switch of oneDNN: off while anybody is within."""

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


class _Lifted:
    """What `_Switch` holds off, on again for a product."""

    def __enter__(self) -> None:
        if _switch.holders:
            onednn: Any = torch.backends.mkldnn
            onednn.enabled = _switch.before

    def __exit__(self, *_: object) -> None:
        if _switch.holders:
            onednn: Any = torch.backends.mkldnn
            onednn.enabled = False


_switch = _Switch()
_lifted = _Lifted()


def without_onednn() -> AbstractContextManager[None]:
    """Run torch's own 16-bit products on the CPU, where oneDNN would.

    For a product with a single row they read the weights 1.6 times as fast as oneDNN, 3.5 times
    where the weights are small (AMD EPYC, torch 2.13). With more rows oneDNN is the faster one, and
    with a single one of a `LARGE` matrix `torch.mv` with it, which `one_row` takes all the same.
    torch's switch is one for the process: it stays off until the last thread that asked has left.
    """
    return _switch if ONEDNN_DTYPES else nullcontext()


def one_row(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """weight [M, N] @ x [N] + bias [M], on the CPU, by the faster routine within
    `without_onednn`."""
    with _lifted if _is_large(weight) else nullcontext():
        return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)


def _is_large(weight: torch.Tensor) -> bool:
    return weight.numel() >= LARGE and weight.dtype in ONEDNN_DTYPES


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [.., N], weight [M, N], bias [M] -> x @ weight.T + bias, [.., M] in x's dtype.

    Accumulated in fp32 and rounded once. On a processor without 16-bit instructions, many rows of
    16 bit are multiplied in fp32: twice as fast with 8 rows, 6 times with 64 (AMD EPYC with AVX2).
    On CUDA a kernel of our own takes few rows.
    """
    if not weight.numel():  # between layers of width 0
        return F.linear(x, weight, bias)
    if x.is_cuda and x.numel() <= FEW_ROWS * x.shape[-1] and runs_kernels(x, weight, bias):
        from moezoo.layers.kernels.few_rows import few_rows_linear

        return few_rows_linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    if x.is_cpu and x.numel() == x.shape[-1] and _is_large(weight):
        return one_row(weight, x.reshape(-1), bias).view(*x.shape[:-1], -1)
    if (
        x.numel() < FP32_ROWS * x.shape[-1]
        or not x.is_cpu
        or x.dtype.itemsize != 2
        or x.dtype in ONEDNN_DTYPES
        # Backward would keep the widened weights.
        or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    ):
        return F.linear(x, weight, bias)
    wide = x.reshape(-1, x.shape[-1]).float()
    out = product_in_pieces(
        wide,
        lambda start, stop: weight[start:stop].float(),
        bias,
        out=x.new_empty(wide.shape[0], weight.shape[0]),
        step=max(1, PIECE // weight.shape[1]),
    )
    return out.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """`nn.Linear`, multiplied as `linear` does, or as `quantized_linear` after `quantize_`."""

    weight: nn.Parameter | QuantizedWeights  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        if isinstance(self.weight, QuantizedWeights):
            raise ValueError("quantised weights are not reset; build the layer anew")
        super().reset_parameters()

    def quantize_(self, weight: Format) -> None:
        """Put weight [N, K] in the place of the parameter. It needs no gradient, and none comes
        through it.

        Raises ValueError for another shape, or what is of no format.
        """
        if not isinstance(weight, Format):
            raise ValueError(
                f"weight is a {type(weight).__name__}, expected weights of a format, such as "
                "Int8.quantize(w) makes them"
            )
        if weight.shape != self.weight.shape:
            raise ValueError(f"weight must be {list(self.weight.shape)}, got {list(weight.shape)}")
        del self.weight
        self.weight = QuantizedWeights(weight)

    def forward(self, x: torch.Tensor | NormOfSum) -> torch.Tensor:
        weight, bias = self.weight, self.bias  # a module looks them up anew each time
        if isinstance(weight, QuantizedWeights):
            return quantized_linear(normed(x), weight(), bias)
        if not isinstance(x, NormOfSum):
            return linear(x, weight, bias)
        arguments = x.kernel_arguments(NORM_ROWS, weight, bias)
        if arguments is None:
            return linear(x.normed, weight, bias)
        from moezoo.layers.kernels.few_rows import add_norm_linear

        y, total = add_norm_linear(weight=weight, bias=bias, **arguments)
        x.store(total)
        return y.view(*x.sum.shape[:-1], -1)


class FusedLinear(Linear):
    """Several projections of one input, stacked by rows: one matrix product instead of several.

    `weight` is [sum(part_sizes), in_features], `bias` [sum(part_sizes)] where there is one.
    `part_sizes` says where saving cuts the rows again.
    """

    def __init__(self, in_features: int, part_sizes: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(part_sizes), bias=bias)
        self.part_sizes = part_sizes

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[.., in_features] -> one [.., size] a part, views of one product."""
        return self(x).split_with_sizes(self.part_sizes, -1)
