"""Products with quantised weights: torch on the CPU, kernels on CUDA, an operator for each format.

Rounding points are those of quantised experts, see `moezoo.layers.moe.experts`: with fp8 weights x
is quantised in groups of 128 numbers of a token; with weight-only formats it is multiplied as it
is. Sums are fp32, and rounded once after the bias is added.

Legend: T tokens, N and K rows and columns of the weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moezoo.layers.pieces import PIECE, product_in_pieces
from moezoo.layers.quant import FORMATS, Format, Fp8Weights, WeightOnly
from moezoo.layers.quant.fp8 import BLOCK, FOR_LINEARS, quantize_rows, require_fp8


def quantized_linear(x: Tensor, weight: Format, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, [.., N] in x's dtype: x [.., K] fp32, bf16 or fp16, weight [N,
    K], bias [N].

    `torch.compile` and CUDA graphs work through it: while compiling it is the operator of the
    format, such as `moezoo::linear_int4`. Raises ValueError where a gradient is asked for or x is
    not as wide as the weight, and QuantizationError for fp8 on a GPU that does not multiply it.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            f"there is no gradient through {type(weight).__name__} weights; use torch.no_grad() or "
            "torch.inference_mode(), or load the model with quantization={'dense': 'dequantize'}"
        )
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x must be [.., {k}] for weights {[n, k]}, got {list(x.shape)}")
    rows = x.reshape(-1, k)
    if torch.compiler.is_compiling():
        y: Tensor = OPERATORS[type(weight)](rows, list(weight.tensors().values()), bias)
    else:
        y = _product(rows, weight, bias)
    return y.view(*x.shape[:-1], n)


def _product(x: Tensor, weight: Format, bias: Tensor | None) -> Tensor:
    """Multiply x [T, K] by the weights on its device; return [T, N]."""
    if not x.is_cuda:
        return _in_pieces(x, weight, bias)
    from moezoo.layers.kernels.one_matrix import linear_fp8, linear_weight_only

    with torch.cuda.device_of(x):
        if isinstance(weight, Fp8Weights):
            require_fp8(x.device, FOR_LINEARS)
            return linear_fp8(x, weight, bias)
        assert isinstance(weight, WeightOnly)
        return linear_weight_only(x, weight, bias)


def _in_pieces(x: Tensor, weight: Format, bias: Tensor | None) -> Tensor:
    """Multiply in fp32 on the CPU, some rows of the weights dequantised at a time."""
    n, k = weight.shape
    quantized = weight.quantizes_activations
    wide = quantize_rows(x).dequantize()[:, :k] if quantized else x.float()
    return product_in_pieces(
        wide,
        lambda start, stop: weight.rows(start, stop).dequantize(),
        bias,
        out=x.new_empty(len(x), n),
        step=max(1, PIECE // k // BLOCK) * BLOCK,
    )


def _operator(name: str, from_tensors: Any) -> Any:
    """Make the operator of a format; `from_tensors` is the format, called with its tensors in the
    order of its fields."""

    def linear(x: Tensor, weight: Sequence[Tensor | None], bias: Tensor | None) -> Tensor:
        return _product(x, from_tensors(*weight), bias)

    op = torch.library.custom_op(f"moezoo::linear_{name}", linear, mutates_args=())
    op.register_fake(lambda x, weight, bias: x.new_empty(len(x), len(weight[0])))
    return op


OPERATORS = {format_: _operator(name, format_) for name, format_ in FORMATS.items()}
