"""Multi-head latent attention (DeepSeek-V2, 2024).

Legend: B batch, T new tokens, S keys (cached and new), N heads, C latent width, R rotated width.
"""

import math
from typing import Any, ClassVar

import torch
from torch import nn

from moezoo.device import runs_kernels
from moezoo.layers.context import Context, Keys
from moezoo.layers.linear import FusedLinear, Linear
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.norm import NormOfSum, RMSNorm, input_for, is_hooked
from moezoo.layers.onednn import ONEDNN_DTYPES
from moezoo.layers.rope import Rotate, Rotation


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply x [B, T, N, i] by each head's weight [N, i, o]; return [B, T, N, o]."""
    rows = x.flatten(0, 1).transpose(0, 1)
    if x.is_cpu and x.dtype.itemsize == 2 and (rows.shape[1] == 1 or x.dtype not in ONEDNN_DTYPES):
        # Without oneDNN torch computes head by head, up to 7 times as slowly.
        out = torch.bmm(rows.float(), weight.float()).type_as(x)
    else:
        out = torch.bmm(rows, weight)
    return out.transpose(0, 1).view(*x.shape[:3], weight.shape[2])


def absorbed(q: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Project q [B, T, N, nope_dim + R] into the latents' space by key [N, nope_dim, C]; return
    [B, T, N, C + R], whose last R numbers are those of q."""
    if runs_kernels(q, key):
        from moezoo.layers.kernels.per_head import FEW_ROWS, absorb_query

        if q.shape[0] * q.shape[1] <= FEW_ROWS:
            return absorb_query(q.flatten(0, 1), key).unflatten(0, q.shape[:2])
    nope_dim = key.shape[1]
    return torch.cat((_per_head(q[..., :nope_dim], key), q[..., nope_dim:]), -1)


def expanded(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Project x [B, T, N, C] from the latents' space by value [N, v_dim, C]; return
    [B, T, N, v_dim]."""
    if runs_kernels(x, value):
        from moezoo.layers.kernels.per_head import FEW_ROWS, expand_values

        if x.shape[0] * x.shape[1] <= FEW_ROWS:
            return expand_values(x.flatten(0, 1), value).unflatten(0, x.shape[:2])
    return _per_head(x, value.transpose(1, 2))


class LowRankLinear(nn.Module):
    """Projection b(norm(a(x))) through a bottleneck of `rank`, as MLA has for its queries."""

    def __init__(
        self, in_features: int, rank: int, out_features: int, *, norm: RMSNorm, bias: bool = False
    ) -> None:
        super().__init__()
        self.a = Linear(in_features, rank, bias=bias)
        self.norm = norm
        self.b = Linear(rank, out_features, bias=False)

    def forward(self, x: torch.Tensor | NormOfSum) -> torch.Tensor:
        a = self.a
        return self.b(self.norm(a(input_for(a, x))))


def yarn_softmax_factor(rope_parameters: dict[str, Any]) -> float:
    """Return the factor of the softmax scale for YaRN in DeepSeek's models, its mscale squared."""
    mscale = rope_parameters.get("mscale_all_dim") or 0.0
    factor = rope_parameters.get("factor") or 1.0
    if rope_parameters.get("rope_type", "default") == "default" or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2


class MultiHeadLatentAttention(SequenceMixer):
    """Attention in which the keys and values of all heads are projections of one latent per token.

    The cache holds the latent and the rotated key that all heads share: C + R numbers a token. With
    few new tokens the heads' key and value projections are absorbed into the query and the output,
    so that attention runs over the latents themselves; with many, keys and values are expanded. `q`
    projects [B, T, H] to [B, T, N * (nope_dim + rope_dim)]. The weight of `kv_b` is used as one
    matrix for each head, so it is not held quantised. Where `kv_b` is hooked, or a module of others
    such as an adapter, keys and values are always expanded, as only then it is called.
    """

    keep_dense: ClassVar[tuple[str, ...]] = ("kv_b",)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        q: nn.Module,
        *,
        kv_norm: RMSNorm,
        nope_dim: int,
        rope_dim: int,
        v_dim: int,
        rotate: Rotate,
        scale: float,
        bias: bool = False,
    ) -> None:
        super().__init__()
        latent_dim = kv_norm.dim
        self.latent_dim = latent_dim
        self.q = q
        self.kv_a = FusedLinear(hidden_size, (latent_dim, rope_dim), bias)
        self.kv_norm = kv_norm
        self.kv_b = Linear(latent_dim, num_heads * (nope_dim + v_dim), bias=False)
        self.o = Linear(num_heads * v_dim, hidden_size, bias=bias)
        self.num_heads = num_heads
        self.nope_dim = nope_dim
        self.rope_dim = rope_dim
        self.v_dim = v_dim
        self.rotate = rotate
        self.scale = scale
        # Per key and head, expanding costs C * (nope + v) products once and nope + R + v a query;
        # absorbing costs 2C + R a query. Below this many queries absorbing is cheaper.
        extra = 2 * latent_dim - nope_dim - v_dim
        self.absorb_below = latent_dim * (nope_dim + v_dim) / extra if extra > 0 else math.inf

    def forward(
        self, x: torch.Tensor | NormOfSum, context: Context, layer_idx: int
    ) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]; latents and rotated keys go to the cache, C + R a token."""
        project, compress = self.q, self.kv_a
        q = project(input_for(project, x)).unflatten(-1, (self.num_heads, -1))
        q, keys = context.append_latents(self, q, compress(input_for(compress, x)), layer_idx)
        if context.num_queries < self.absorb_below and self.absorbs:
            out = self._attend_to_latents(q, keys, context)
        else:
            out = self._attend_to_heads(q, keys, context)
        return self.o(out.flatten(2))

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shape of what the cache stores of a token: the latent and the rotated key, [1, C + R]."""
        return ((1, self.latent_dim + self.rope_dim),)

    @property
    def has_usual_latents(self) -> bool:
        """Whether `stored` is not overridden, so that the kernel that norms, rotates and stores
        replaces it."""
        return type(self).stored is MultiHeadLatentAttention.stored

    def stored(self, latents: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Return what the cache stores of latents [B, T, C + R]: the first C normalised, the last R
        rotated."""
        latent, k_rope = latents.split_with_sizes((self.latent_dim, self.rope_dim), -1)
        k_rope = self.rotate(k_rope.unsqueeze(2), rotation).squeeze(2)
        return torch.cat((self.kv_norm(latent), k_rope), -1)

    def rotated(self, q: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Return q [B, T, N, nope_dim + R] with its last R numbers rotated."""
        q_nope, q_rope = q.split_with_sizes((self.nope_dim, self.rope_dim), -1)
        return torch.cat((q_nope, self.rotate(q_rope, rotation)), -1)

    @property
    def absorbs(self) -> bool:
        """Whether `kv_b` does no more than multiply by its weight, so that it can be absorbed."""
        kv_b = self.kv_b
        return type(kv_b) in (Linear, nn.Linear) and not is_hooked(kv_b)

    def _projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of `kv_b` as key and value projections, [N, nope_dim, C] and
        [N, v_dim, C]."""
        weight = self.kv_b.weight
        assert isinstance(weight, torch.Tensor), "loaders leave what is in keep_dense as it is"
        key, value = weight.unflatten(0, (self.num_heads, -1)).split_with_sizes(
            (self.nope_dim, self.v_dim), 1
        )
        return key, value

    def _heads(self, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Expand latents [B, S, C] into all heads' keys, [B, N, S, nope_dim], and values,
        [B, N, S, v_dim]."""
        kv = self.kv_b(latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return kv.split_with_sizes((self.nope_dim, self.v_dim), -1)

    def _attend_to_latents(self, q: torch.Tensor, keys: Keys, context: Context) -> torch.Tensor:
        """Attend with q [B, T, N, ..] to the latents; return [B, T, N, v_dim]."""
        key, value = self._projections()
        q = absorbed(q, key)
        out = context.attend(q, keys, scale=self.scale, value_dim=self.latent_dim)
        return expanded(out, value)

    def _attend_to_heads(self, q: torch.Tensor, keys: Keys, context: Context) -> torch.Tensor:
        """Attend with q [B, T, N, ..] to keys and values that are expanded from the latents; return
        [B, T, N, v_dim]."""
        latents = context.latents(keys)
        latent, k_rope = latents.split_with_sizes((self.latent_dim, self.rope_dim), -1)
        k, v = self._heads(latent)
        return context.attend_to(q, k, v, shared_keys=k_rope, scale=self.scale)
