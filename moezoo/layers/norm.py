"""Root-mean-square normalisation (Zhang and Sennrich, 2019), and layer normalisation."""

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from moezoo.device import runs_kernels

FEW_NUMBERS = 4096
"""Up to so many, or a single row, on a CPU one operation on twice as many is faster than ten. In
fp32, where the two round apart, it is that one always: rows do not depend on how many there are."""


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension [.., dim].

    Computed in fp32 and rounded once to the dtype of x.
    """

    offset: ClassVar[float] = 0.0

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.dim = dim
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._scaled(x, self.weight)

    def _scaled(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        many = x.dtype.itemsize == 2 and x.numel() > max(FEW_NUMBERS, self.dim)
        if not x.is_cpu or (many and torch.is_grad_enabled()):
            return F.rms_norm(x, (self.dim,), weight, self.eps)
        if many:
            # torch's rms_norm takes new memory in each of its operations: 512 rows of 256 numbers
            # in 0.5 ms, where this takes 0.2 (Intel Xeon).
            wide = x.float()
            norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            wide *= norms.square_().div_(self.dim).add_(self.eps).rsqrt_()
            wide *= weight
            return wide.to(x.dtype)
        # On a CPU torch's rms_norm is ten operations, its layer_norm is one. The numbers of (x, -x)
        # have mean 0 and variance mean(x^2). In a small model that is 27 us a token instead of 50.
        twice = torch.cat((weight, weight))
        both = torch.layer_norm(torch.cat((x, -x), -1), twice.shape, twice, None, self.eps)
        return both.narrow(-1, 0, self.dim)

    def add(
        self, x: torch.Tensor, update: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + update, and that sum, rounded to the dtype of x; x [.., dim]."""
        if x.is_cuda and runs_kernels(x, self.weight, update):
            from moezoo.layers.kernels.add_norm import add_rms_norm

            rows = None if update is None else update.reshape(-1, self.dim)
            normed, total = add_rms_norm(
                x.reshape(-1, self.dim), rows, self.weight, self.eps, offset=self.offset
            )
            return normed.view(x.shape), total.view(x.shape)
        if update is not None:
            x = x + update
        return self(x), x

    def of_sum(self, x: torch.Tensor, update: torch.Tensor | None) -> "NormOfSum":
        """What `add` computes, once somebody asks for it."""
        return NormOfSum(self, x, update)


class NormOfSum:
    """norm(x + update) and x + update, [.., dim], computed when first asked for.

    A layer that begins with a product of few tokens on CUDA lets the product's kernel compute them
    (`kernel_arguments`, `store`): in a decode step a launch costs more. Others take `normed`.
    """

    def __init__(self, norm: RMSNorm, x: torch.Tensor, update: torch.Tensor | None) -> None:
        self._norm = norm
        self._x = x
        self._update = update
        self._normed: torch.Tensor | None = None

    @property
    def normed(self) -> torch.Tensor:
        if self._normed is None:
            self._normed, self._x = self._norm.add(self._x, self._update)
            self._update = None
        return self._normed

    @property
    def sum(self) -> torch.Tensor:
        if self._update is not None:
            self._x, self._update = self._x + self._update, None
        return self._x

    def kernel_arguments(
        self, max_tokens: int, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> dict[str, Any] | None:
        """For a linear layer's kernel that takes up to max_tokens tokens; None if none runs."""
        if self._normed is not None or self._x.numel() > max_tokens * self._norm.dim:
            return None
        if not runs_kernels(self._x, self._update, self._norm.weight, weight, bias):
            return None
        return {
            "x": self._x.reshape(-1, self._norm.dim),
            "update": None if self._update is None else self._update.reshape(-1, self._norm.dim),
            "norm_weight": self._norm.weight,
            "eps": self._norm.eps,
            "offset": self._norm.offset,
        }

    def store(self, total: torch.Tensor, normed: torch.Tensor | None = None) -> None:
        """Keep what a kernel computed, rows [T, dim]."""
        shape = self._x.shape
        self._x, self._update = total.view(shape), None
        self._normed = None if normed is None else normed.view(shape)


class ZeroCenteredRMSNorm(RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), as Gemma and Qwen3-Next have it.

    The sum is fp32: in 16 bits it would lose the last digits of the weight.
    """

    offset = 1.0
    initial_values: ClassVar[dict[str, float]] = {"weight": 0.0}

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._scaled(x.float(), self.offset + self.weight.float()).to(x.dtype)


class LayerNorm(RMSNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (Ba et al., 2016)."""

    def __init__(self, dim: int, eps: float, *, bias: bool = True) -> None:
        super().__init__(dim, eps)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)

    def add(
        self, x: torch.Tensor, update: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if update is not None:
            x = x + update
        return self(x), x

    def of_sum(self, x: torch.Tensor, update: torch.Tensor | None) -> "NormOfSum":
        sums = NormOfSum(self, x, update)
        # The kernels that compute norms compute RMSNorm: here they find it done.
        _ = sums.normed
        return sums


def normed(x: torch.Tensor | NormOfSum) -> torch.Tensor:
    """For layers that take either: a tensor as it is, or the norm that is due."""
    return x.normed if isinstance(x, NormOfSum) else x


def is_hooked(module: nn.Module) -> bool:
    """Whether a call does more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def handed_to(module: nn.Module, x: torch.Tensor | NormOfSum) -> torch.Tensor | NormOfSum:
    """What a layer is called with: a tensor if it has hooks, or is not one of ours."""
    if not isinstance(x, NormOfSum):
        return x
    ours = type(module).__module__.startswith("moezoo.")
    return x if ours and not is_hooked(module) else x.normed
