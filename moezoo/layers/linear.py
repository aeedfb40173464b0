"""Linear layers, and layers that compute several projections of one input in one product."""

import torch
from torch import nn
from torch.nn import functional as F

from moezoo.device import runs_kernels
from moezoo.layers.norm import NormOfSum, normed
from moezoo.layers.onednn import FP32_ROWS, ONEDNN_DTYPES, is_large, matvec
from moezoo.layers.pieces import PIECE, product_in_pieces
from moezoo.layers.quant import Format, QuantizedWeights
from moezoo.layers.quantized_linear import quantized_linear

FEW_ROWS = 8
"""Largest number of rows on CUDA for which our own kernel reads the weights faster than cuBLAS."""

NORM_ROWS = 2
"""Largest number of rows for which that kernel computes the norm of x too, instead of a launch of
its own."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [.., N] @ weight.T [N, M] + bias [M], [.., M] in x's dtype.

    Accumulated in fp32 and rounded once. On a processor without 16-bit instructions, many rows of
    16 bit are multiplied in fp32: twice as fast with 8 rows, 6 times with 64 (AMD EPYC with AVX2).
    On CUDA a kernel of our own takes few rows.
    """
    if not weight.numel():  # between layers of width 0
        return F.linear(x, weight, bias)
    if x.is_cuda and x.numel() <= FEW_ROWS * x.shape[-1] and runs_kernels(x, weight, bias):
        from moezoo.layers.kernels.few_rows import few_rows_linear

        return few_rows_linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    if x.is_cpu and x.numel() == x.shape[-1] and is_large(weight):
        return matvec(weight, x.reshape(-1), bias).view(*x.shape[:-1], -1)
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
    """`nn.Linear` that multiplies by `linear`, or by `quantized_linear` after `quantize_`."""

    weight: nn.Parameter | QuantizedWeights  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        if isinstance(self.weight, QuantizedWeights):
            raise ValueError("quantised weights are not reset; build the layer anew")
        super().reset_parameters()

    def quantize_(self, weight: Format) -> None:
        """Replace the parameter by a quantised weight [N, K], through which there is no gradient.

        Raises ValueError if the shape differs, or `weight` is not of a `Format`.
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

    def dequantize_(self, dtype: torch.dtype) -> None:
        """Make a quantised weight a parameter of `dtype` again, which gets no gradient until it is
        asked to."""
        held = self.weight
        if isinstance(held, QuantizedWeights):
            del self.weight
            self.weight = nn.Parameter(held.dequantize(dtype), requires_grad=False)

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
    `part_sizes` are the rows of each projection: loading joins them, saving cuts them apart.
    """

    def __init__(self, in_features: int, part_sizes: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(part_sizes), bias=bias)
        self.part_sizes = part_sizes

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the projections of x [.., in_features], each [.., size], views of one product."""
        return self(x).split_with_sizes(self.part_sizes, -1)
