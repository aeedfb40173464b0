"""The module that holds a quantised weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.layers.quant.format import Format, rows_at_a_time
from moezoo.layers.quant.kind import Kind


class QuantizedWeights(nn.Module):
    """A format's tensors as parameters under their field names, without gradients; None where the
    format leaves one out. `forward()` returns the format. `kind` describes it; a loader that knows
    more of it than the tensors show replaces it.

    A cast of the model to another dtype leaves the tensors as they are.
    """

    def __init__(self, weights: Format) -> None:
        super().__init__()
        self.kind = Kind.of_weights(weights)
        tensors = weights.tensors()
        self.keep_dtype = tuple(tensors)
        for name, tensor in tensors.items():
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)

    def forward(self) -> Any:
        return self.kind.format(**{name: getattr(self, name) for name in self.keep_dtype})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight in 16 or 32 bits, [.., N, K]. Of its fp32 no more is there at a time
        than an expert, or some rows of a matrix."""
        weights: Format = self()
        out = torch.empty(weights.shape, dtype=dtype, device=weights.device)
        if out.ndim > 2:
            for i, part in enumerate(out):
                part.copy_(weights[i].dequantize(dtype))
            return out
        for _, rows in rows_at_a_time(out[None], weights.rows_per_scale):
            out[rows] = weights.rows(rows.start, rows.stop).dequantize(dtype)
        return out

    @property
    def shape(self) -> torch.Size:
        shape: torch.Size = self().shape
        return shape

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.kind.format.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeights":
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        return self
