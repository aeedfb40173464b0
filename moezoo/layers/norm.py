"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

import torch
from torch import nn
from torch.nn import functional as F

from moezoo.device import runs_kernels


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension [.., dim].

    Computed in fp32 and rounded once to the dtype of x.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.dim = dim
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu:
            return F.rms_norm(x, (self.dim,), self.weight, self.eps)
        # On a CPU torch's rms_norm is ten operations, its layer_norm is one. The numbers of (x, -x)
        # have mean 0 and variance mean(x^2). In a small model that is 27 us a token instead of 50.
        one = self.weight
        weight = torch.cat((one, one))
        both = torch.layer_norm(torch.cat((x, -x), -1), weight.shape, weight, None, self.eps)
        return both.narrow(-1, 0, self.dim)

    def add(
        self, x: torch.Tensor, update: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + update, and that sum, rounded to the dtype of x; x [.., dim]."""
        if runs_kernels(x, self.weight):
            from moezoo.layers.kernels.add_norm import add_rms_norm

            rows = None if update is None else update.reshape(-1, self.dim)
            normed, total = add_rms_norm(x.reshape(-1, self.dim), rows, self.weight, self.eps)
            return normed.view(x.shape), total.view(x.shape)
        if update is not None:
            x = x + update
        return self(x), x
