"""Root-mean-square normalisation (Zhang and Sennrich, 2019), and layer normalisation."""

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from moezoo.device import runs_kernels

FEW_NUMBERS = 4096
"""Number of elements up to which, on a CPU, one operation on twice as many is faster than ten. A
single row, and fp32, always take the one operation: in fp32 the two ways round differently, and a
row must not depend on the number of rows."""


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
            # torch's rms_norm allocates memory in each of its operations: 512 rows of 256 numbers
            # take 0.5 ms, and 0.2 ms in place (Intel Xeon).
            wide = x.float()
            norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            wide *= norms.square_().div_(self.dim).add_(self.eps).rsqrt_()
            wide *= weight
            return wide.to(x.dtype)
        # On a CPU torch's rms_norm is ten operations, its layer_norm is one. The numbers of (x, -x)
        # have mean 0 and variance mean(x^2). In a small model a token takes 27 us so, not 50.
        twice = torch.cat((weight, weight))
        both = torch.layer_norm(torch.cat((x, -x), -1), twice.shape, twice, None, self.eps)
        return both.narrow(-1, 0, self.dim)

    def add(
        self, x: torch.Tensor, update: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm of x + update and that sum, both [.., dim] in the dtype of x."""
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
        """Return what `add` computes, which is computed when it is first needed."""
        return NormOfSum(self, x, update)


class NormOfSum:
    """norm(x + update) and x + update, [.., dim], computed when they are first needed.

    Where a layer begins with a product of few tokens on CUDA, the product's kernel computes them
    (`kernel_arguments`, `store`), as a launch of their own takes longer. Other layers use `normed`.
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
        """Return the arguments for a kernel that computes sum, norm and a linear layer of up to
        max_tokens tokens; None where it cannot run."""
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
        """Keep the sum, and the norm if it is given, that a kernel computed, [T, dim] each."""
        shape = self._x.shape
        self._x, self._update = total.view(shape), None
        self._normed = None if normed is None else normed.view(shape)


class ZeroCenteredRMSNorm(RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), as in Gemma and Qwen3-Next.

    1 + weight is fp32: in 16 bits it would lose the last digits of the weight.
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
        # Kernels would compute RMSNorm; they do not if the norm is there already.
        _ = sums.normed
        return sums


def normed(x: torch.Tensor | NormOfSum) -> torch.Tensor:
    """Return x if it is a tensor, and its norm if it is a `NormOfSum`."""
    return x.normed if isinstance(x, NormOfSum) else x


def is_hooked(module: nn.Module) -> bool:
    """Whether the module has hooks or a `forward` of its own, so that a call does more than its
    class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def input_for(module: nn.Module, x: torch.Tensor | NormOfSum) -> torch.Tensor | NormOfSum:
    """Return what to call `module` with: x, or its norm if the module has hooks or is not ours, and
    so expects a tensor."""
    if not isinstance(x, NormOfSum):
        return x
    ours = type(module).__module__.startswith("moezoo.")
    return x if ours and not is_hooked(module) else x.normed
