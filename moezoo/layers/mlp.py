"""Dense feed-forward layers: the first layers of many models, and shared experts."""

import torch
from torch import nn

from moezoo.device import runs_kernels
from moezoo.layers.kernels.shared_expert import SharedExpert
from moezoo.layers.linear import FusedLinear, Linear
from moezoo.layers.moe import ACTIVATIONS
from moezoo.layers.norm import NormOfSum, is_hooked, normed
from moezoo.layers.quant import QuantizedWeights

SHARED_COLUMNS = 8192
"""Largest width of an MLP that a kernel computes beside routed experts, as a program holds a row of
`down`."""


class GatedMLP(nn.Module):
    """MLP down(activation(gate(x)) * up(x)), x [.., H] -> [.., H]; `gate_up` has gate rows, then up
    rows.

    Called with a contiguous `addend_` [.., H] it returns the sum with it, perhaps in that tensor.
    On CUDA the sum of many rows is rounded once; few rows, and all on a CPU, are rounded before the
    sum too. I may be 0, for shared experts of a config that has none.
    """

    adds = True

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: str, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_up = FusedLinear(hidden_size, (intermediate_size, intermediate_size), bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = activation

    def forward(
        self, x: torch.Tensor | NormOfSum, addend_: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = normed(x)
        gate_up = self.gate_up(x)
        if (
            gate_up.is_cuda  # first, because listing the parameters takes 3 us
            and gate_up.numel()
            and runs_kernels(gate_up, addend_, *self.down.parameters())
        ):
            rows = gate_up.reshape(-1, gate_up.shape[-1])
            weight = _dense_weight(self.down, Linear)
            y = None if weight is None else self._few_rows(rows, weight, addend_)
            if y is not None:
                return y.view(x.shape)
            from moezoo.layers.kernels.gated import gate

            h = gate(rows, self.activation)
            if addend_ is not None and weight is not None and self.down.bias is None:
                return addend_.view(-1, x.shape[-1]).addmm_(h, weight.T).view(x.shape)
            h = h.view(*x.shape[:-1], -1)
        else:
            gates, ups = gate_up.chunk(2, -1)
            h = ACTIVATIONS[self.activation](gates) * ups
        y = self.down(h)
        return y if addend_ is None else y + addend_

    def _few_rows(
        self, gate_up: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Compute all that follows gate_up [T, 2I] in one launch, or return None where that is not
        faster; `weight` is that of `down`."""
        from moezoo.layers.kernels.few_rows import gated_linear, takes_gated

        if not takes_gated(gate_up, weight):
            return None
        if addend is not None:
            addend = addend.reshape(-1, addend.shape[-1])
        bias = self.down.bias
        return gated_linear(gate_up, weight, bias, activation=self.activation, addend=addend)

    def as_shared_expert(self, x: torch.Tensor) -> SharedExpert | None:
        """Return what the kernel for routed experts needs to add this layer's output for x [T, H];
        None if it cannot compute it."""
        w13, w2 = _dense_weight(self.gate_up, FusedLinear), _dense_weight(self.down, Linear)
        if type(self) not in (GatedMLP, SigmoidGatedMLP) or w13 is None or w2 is None:
            return None
        no_bias = self.gate_up.bias is None and self.down.bias is None
        dense = w13.stride(1) == w2.stride(1) == 1
        fits = 0 < w2.shape[1] <= SHARED_COLUMNS
        return SharedExpert(w13, w2) if no_bias and dense and fits else None


def _dense_weight(layer: nn.Module, kind: type[Linear]) -> nn.Parameter | None:
    """Return the weight [N, K] of a layer whose class is exactly `kind`; None for other layers, and
    if the layer is quantised or hooked."""
    if type(layer) is not kind or is_hooked(layer) or isinstance(layer.weight, QuantizedWeights):
        return None
    return layer.weight


class SigmoidGatedMLP(GatedMLP):
    """Shared expert with a gate of its own: sigmoid(x @ gate.T) * mlp(x), as in Qwen2-MoE."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str) -> None:
        super().__init__(hidden_size, intermediate_size, activation=activation)
        self.gate = Linear(hidden_size, 1, bias=False)

    def forward(
        self, x: torch.Tensor | NormOfSum, addend_: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = normed(x)
        y = torch.sigmoid(self.gate(x)) * super().forward(x)
        return y if addend_ is None else y + addend_

    def as_shared_expert(self, x: torch.Tensor) -> SharedExpert | None:
        shared = super().as_shared_expert(x)
        return None if shared is None else shared._replace(logits=self.gate(x).flatten())
