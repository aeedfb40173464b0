"""Latent attention to the few keys that an indexer chooses (DeepSeek-V3.2, 2025).

Legend: B batch, T new tokens, S keys (cached and new), N heads, C latent width, R rotated width,
M heads of the indexer, I width of its keys.
"""

from typing import Any

import torch
from torch import Tensor

from moezoo.layers.chosen_keys import Chooser
from moezoo.layers.context import Context, whole_keys
from moezoo.layers.linear import Linear
from moezoo.layers.mla import LowRankLinear, MultiHeadLatentAttention, absorbed, expanded
from moezoo.layers.norm import LayerNorm, NormOfSum, normed
from moezoo.layers.rope import Rotate, Rotation


class SparseLatentAttention(MultiHeadLatentAttention):
    """Latent attention to `topk` keys, which an indexer chooses by keys of its own.

    The cache holds the indexer's keys beside the latents, C + R + I numbers a token. `rotate_index`
    rotates the first R numbers of the indexer's queries and keys. `layer_type` is the layer's type
    in `config.layer_types`. It has no kernels, and steps are not captured.
    """

    prevents_capture = True

    def __init__(
        self,
        *arguments: Any,
        index_heads: int,
        index_dim: int,
        topk: int,
        rotate_index: Rotate,
        layer_type: str,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        assert isinstance(self.q, LowRankLinear), "the indexer shares its bottleneck"
        hidden_size = self.kv_a.in_features
        self.index_q = Linear(self.q.a.out_features, index_heads * index_dim, bias=False)
        self.index_k = Linear(hidden_size, index_dim, bias=False)
        self.index_norm = LayerNorm(index_dim, 1e-6)
        self.index_weights = Linear(hidden_size, index_heads, bias=False)
        self.index_heads = index_heads
        self.index_dim = index_dim
        self.topk = topk
        self.rotate_index = rotate_index
        self.layer_type = layer_type

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shape of what the cache stores of a token: latent, rotated key and indexer's key,
        [1, C + R + I]."""
        return ((1, self.kv_norm.dim + self.rope_dim + self.index_dim),)

    def forward(self, x: Tensor | NormOfSum, context: Context, layer_idx: int) -> Tensor:
        x = normed(x)
        assert isinstance(self.q, LowRankLinear)
        low = self.q.norm(self.q.a(x))
        q = self.q.b(low).unflatten(-1, (self.num_heads, -1))
        new = torch.cat((self.kv_a(x), self.index_norm(self.index_k(x))), -1)
        q, keys = context.append_latents(self, q, new, layer_idx)
        queries = self.index_q(low).unflatten(-1, (self.index_heads, -1))
        weights = self.index_weights(x).float() * (self.index_heads * self.index_dim) ** -0.5
        queries = self.rotate_index(queries, context.rotation)
        chooser = Chooser(queries, weights, self.topk)
        if not self.absorbs:
            chooser = chooser._replace(expand=self._keys_and_values)
            out = context.attend_to_chosen(q, keys, chooser, scale=self.scale, value_dim=self.v_dim)
            return self.o(out.flatten(2))
        key, value = self._projections()
        out = context.attend_to_chosen(
            absorbed(q, key), keys, chooser, scale=self.scale, value_dim=self.kv_norm.dim
        )
        return self.o(expanded(out, value).flatten(2))

    def _keys_and_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Expand latents [B, S, C + R] into keys [B, N, S, nope_dim + R] and values
        [B, N, S, v_dim]."""
        latent, k_rope = latents.split_with_sizes((self.latent_dim, self.rope_dim), -1)
        k, v = self._heads(latent)
        return whole_keys(k, k_rope), v

    def stored(self, latents: Tensor, rotation: Rotation) -> Tensor:
        """Norm and rotate latents [B, T, C + R + I] for the cache; the last I are normalised
        already."""
        width = self.kv_norm.dim + self.rope_dim
        own, index = latents.split_with_sizes((width, self.index_dim), -1)
        index = self.rotate_index(index.unsqueeze(2), rotation).squeeze(2)
        return torch.cat((super().stored(own, rotation), index), -1)
