"""Softmax attention in torch, with sinks where a layer has them.

Legend: B batch, T new tokens, S keys (cached and new), Hq query heads, Hk key heads, D key width,
Dv value width.
"""

from typing import Any

import torch
from torch.nn import functional as F

from moezoo.layers.mask import CausalMask


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: CausalMask,
    *,
    window: int | None = None,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute softmax attention, q [B, Hq, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv]
    -> [B, Hq, T, Dv].

    Query head h reads key head h // (Hq / Hk). A query sees the `window` newest keys up to its own.
    `sinks` [Hq] are an extra score for each head, that of a key without a value.
    """
    groups = q.shape[1] // k.shape[1]
    if sinks is not None:
        allowed = mask(k.shape[2], window)
        if allowed is not None:
            allowed = F.pad(allowed, (0, 1), value=allowed.dtype == torch.bool)
        out = _masked_attention(*_with_sink_key(q, k, v, sinks / scale), allowed, scale)
        return out[..., : v.shape[-1]]
    if mask.is_plain(k.shape[2], window):
        causal = False
        if q.shape[2] > 1:  # under torch.compile the comparison itself is not a bool
            causal = True
        return _fused_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=groups > 1)
    return _masked_attention(q, k, v, mask(k.shape[2], window), scale)


def _masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attend to the keys where `allowed`, broadcastable to [B, heads, T, S], says so."""
    groups = q.shape[1] // k.shape[1]
    if q.shape[2] == 1:
        # With one query, the heads that share keys become the rows of one product.
        rows = q.view(*k.shape[:2], groups, -1)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=allowed, scale=scale)
        return out.reshape(*q.shape[:3], -1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return _fused_attention(q, k, v, attn_mask=allowed, scale=scale)


def _fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Call torch's attention with keys and values padded to one width on a CPU.

    With different widths torch has no fused kernel there: it stores all scores, and takes twenty
    times as long for a prompt of 512 tokens.
    """
    width = v.shape[-1]
    more = k.shape[-1] - width
    if more and q.is_cpu and q.shape[2] > 1:
        q, k, v = (F.pad(x, (0, max(0, side))) for x, side in ((q, -more), (k, -more), (v, more)))
    return F.scaled_dot_product_attention(q, k, v, **options)[..., :width]


SINK_COLUMNS = 8
"""Columns that `_with_sink_key` adds to a head: fused kernels need a width that 8 divides."""


def _with_sink_key(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add SINK_COLUMNS columns to q, k and v, and a key of value 0 whose product with a query is
    the sink of its head, `sinks` [Hq].

    With it any attention kernel of torch has sinks. In the added columns queries have the sink, as
    a sum of two numbers since it may need more than 16 bits, and all other keys are 0.
    """
    high = sinks.to(q.dtype)
    low = (sinks - high).to(q.dtype)
    columns = F.pad(torch.stack((high, low), -1), (0, SINK_COLUMNS - 2))
    q = torch.cat((q, columns[:, None].expand(*q.shape[:-1], SINK_COLUMNS)), -1)
    k, v = F.pad(k, (0, SINK_COLUMNS, 0, 1)), F.pad(v, (0, SINK_COLUMNS, 0, 1))
    k[..., -1, -SINK_COLUMNS : 2 - SINK_COLUMNS] = 1
    return q, k, v
