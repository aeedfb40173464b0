"""The activations that `activation` may name, and how they join gate and up, in torch.

The names are those of transformers' `hidden_act`, aliases included. Names that share a function
share its kernel: `ACTIVATIONS[name].__name__` is what the Triton kernels know it by.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_tanh": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
}


@dataclass(frozen=True)
class Gating:
    """A gated activation: activation(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset).

    Without a gate it is activation(up). gpt-oss, for one, gates by
    Gating("quick_gelu", limit=7.0, up_offset=1.0).

    Raises ValueError for an activation that is not in `ACTIVATIONS`.
    """

    activation: str = "silu"
    limit: float | None = None
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}"
            )

    @classmethod
    def of(cls, activation: "str | Gating") -> "Gating":
        return activation if isinstance(activation, Gating) else cls(activation)

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return the activation of gate and up, or of up alone if there is no gate."""
        if len(parts) == 1:
            return ACTIVATIONS[self.activation](parts[0])
        gate, up = parts
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        h = ACTIVATIONS[self.activation](gate)
        return h * (up + self.up_offset if self.up_offset else up)


def in_parts(w13: Tensor, bias13: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """View w13 [E, 2I, H] as [E, 2, I, H] and bias13 [E, 2I] as [E, 2, I].

    A w13 of four dimensions is returned as it is, with its bias.
    """
    if w13.ndim != 3:
        return w13, bias13
    return w13.unflatten(1, (2, -1)), None if bias13 is None else bias13.unflatten(1, (2, -1))
