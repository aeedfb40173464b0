"""Attention to the keys that an indexer chooses, in torch.

Legend: B batch, T new tokens, S keys (cached and new), N heads, D key width, M heads of the
indexer, I width of its keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SCORES = 2**27
"""Of an indexer's heads at a time, 512 MB."""


class Chooser(NamedTuple):
    """What the indexer asks of keys: queries [B, T, M, I], and what each head counts, fp32
    [B, T, M]. A query sees the `topk` keys of the largest sum of positive scores."""

    queries: Tensor
    weights: Tensor
    topk: int

    def of(self, tokens: slice) -> "Chooser":
        return Chooser(self.queries[:, tokens], self.weights[:, tokens], self.topk)

    def transposed(self) -> "Chooser":
        """T as B, and B as T."""
        return Chooser(self.queries.transpose(0, 1), self.weights.transpose(0, 1), self.topk)

    def chosen(self, keys: Tensor, allowed: Tensor | None) -> Tensor:
        """keys [B, S, I] and those allowed, bool broadcastable to [B, 1, T, S] -> bool of this
        shape."""
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
    """q [B, T, N, D], stored [B, S, D + I], the keys of attention and those of the indexer; the
    first `dim` numbers of the former are the values -> [B, T, N, dim].

    `allowed` is bool or, to be added to scores, float, broadcastable to [B, 1, T, S].
    """
    batch, length = q.shape[:2]
    keys, index_keys = stored.split_with_sizes((q.shape[-1], stored.shape[-1] - q.shape[-1]), -1)
    if allowed is not None and allowed.dtype != torch.bool:
        allowed = allowed > torch.finfo(allowed.dtype).min / 2
    if allowed is not None:
        allowed = allowed.expand(batch, 1, length, keys.shape[1])
    step = max(1, SCORES // (batch * chooser.queries.shape[2] * keys.shape[1]))
    out = []
    for start in range(0, length, step):
        tokens = slice(start, start + step)
        seen = None if allowed is None else allowed[:, :, tokens]
        mask = chooser.of(tokens).chosen(index_keys, seen)
        own = q[:, tokens].transpose(1, 2)
        k = keys[:, None].expand(-1, own.shape[1], -1, -1)
        attended = F.scaled_dot_product_attention(own, k, k, attn_mask=mask, scale=scale)
        out.append(attended[..., :dim].transpose(1, 2))
    return torch.cat(out, 1)
