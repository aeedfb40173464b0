"""Dense feed-forward layers: the first layers of many models, and shared experts."""

import torch
from torch import nn

from moezoo.device import runs_kernels
from moezoo.layers.linear import FusedLinear, Linear
from moezoo.layers.moe import ACTIVATIONS
from moezoo.layers.norm import NormOfSum, normed


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), x [.., H] -> [.., H]; `gate_up` has gate rows, then up."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: str, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_up = FusedLinear(hidden_size, (intermediate_size, intermediate_size), bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor | NormOfSum) -> torch.Tensor:
        x = normed(x)
        gate_up = self.gate_up(x)
        if runs_kernels(gate_up):
            from moezoo.layers.kernels.gated import gate

            rows = gate(gate_up.reshape(-1, gate_up.shape[-1]), self.activation)
            return self.down(rows.view(*x.shape[:-1], -1))
        gates, ups = gate_up.chunk(2, -1)
        return self.down(ACTIVATIONS[self.activation](gates) * ups)


class SigmoidGatedMLP(GatedMLP):
    """A shared expert with its own gate: sigmoid(x @ gate.T) * mlp(x), as in Qwen2-MoE."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str) -> None:
        super().__init__(hidden_size, intermediate_size, activation=activation)
        self.gate = Linear(hidden_size, 1, bias=False)

    def forward(self, x: torch.Tensor | NormOfSum) -> torch.Tensor:
        x = normed(x)
        return torch.sigmoid(self.gate(x)) * super().forward(x)
