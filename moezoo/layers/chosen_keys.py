"""Attention to the keys that an indexer chooses, in torch.

Legend: B batch, T new tokens, S keys (cached and new), N heads, D key width, M heads of the
indexer, I width of its keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_SCORES = 2**27
"""Largest number of an indexer's fp32 scores in memory at a time: 512 MB."""


class Chooser(NamedTuple):
    """An indexer's queries [B, T, M, I] and the weights of its heads, fp32 [B, T, M].

    A token sees the `topk` keys with the largest weighted sum of the heads' positive scores.
    `expand`, if given, computes all heads' keys [B, N, S, D] and values from those that are stored.
    """

    queries: Tensor
    weights: Tensor
    topk: int
    expand: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def of(self, tokens: slice) -> "Chooser":
        """Return the chooser of some of the T tokens."""
        return self._replace(queries=self.queries[:, tokens], weights=self.weights[:, tokens])

    def transposed(self) -> "Chooser":
        """Return the chooser with the dimensions B and T exchanged."""
        queries, weights = self.queries.transpose(0, 1), self.weights.transpose(0, 1)
        return self._replace(queries=queries, weights=weights)

    def chosen(self, keys: Tensor, allowed: Tensor | None) -> Tensor:
        """Return which of the keys [B, S, I] are chosen, bool [B, 1, T, S], among those that are
        `allowed`, bool broadcastable to that shape."""
        scores = torch.einsum("btmi,bsi->btms", self.queries.float(), keys.float()).relu()
        scores = torch.einsum("btm,btms->bts", self.weights, scores)[:, None]
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        best = scores.topk(min(self.topk, keys.shape[1])).indices
        found = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        return found if allowed is None else found & allowed


def attend_to_chosen(
    q: Tensor, stored: Tensor, allowed: Tensor | None, chooser: Chooser, *, scale: float, dim: int
) -> Tensor:
    """Attend with q [B, T, N, D] to the chosen keys; return [B, T, N, dim].

    stored [B, S, D + I] has each token's key for attention, whose first `dim` numbers are its
    value, and then its key for the indexer. If the chooser has `expand`, it makes keys and values
    of the first part. `allowed` is broadcastable to [B, 1, T, S], bool or a float to be added to
    scores.
    """
    batch, length = q.shape[:2]
    index_dim = chooser.queries.shape[-1]
    keys, index_keys = stored.split_with_sizes((stored.shape[-1] - index_dim, index_dim), -1)
    if chooser.expand is None:
        k = v = keys[:, None].expand(-1, q.shape[2], -1, -1)
    else:
        k, v = chooser.expand(keys)
    if allowed is not None and allowed.dtype != torch.bool:
        allowed = allowed > torch.finfo(allowed.dtype).min / 2
    if allowed is not None:
        allowed = allowed.expand(batch, 1, length, keys.shape[1])
    step = max(1, MAX_SCORES // (batch * chooser.queries.shape[2] * keys.shape[1]))
    out = []
    for start in range(0, length, step):
        tokens = slice(start, start + step)
        seen = None if allowed is None else allowed[:, :, tokens]
        mask = chooser.of(tokens).chosen(index_keys, seen)
        own = q[:, tokens].transpose(1, 2)
        attended = F.scaled_dot_product_attention(own, k, v, attn_mask=mask, scale=scale)
        out.append(attended[..., :dim].transpose(1, 2))
    return torch.cat(out, 1)
