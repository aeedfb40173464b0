"""Bytes that a decoder reads for a step and FLOP that it computes for a prompt, by arithmetic."""

from collections.abc import Sequence

from torch import nn

from moezoo.generation.paged import attentions, token_bytes, windows
from moezoo.layers.decoder import Decoder
from moezoo.layers.mla import MultiHeadLatentAttention
from moezoo.layers.moe import FusedMoE


def expert_layers(decoder: Decoder) -> list[FusedMoE]:
    return [module for module in decoder.modules() if isinstance(module, FusedMoE)]


def expert_bytes(layer: FusedMoE) -> int:
    """Return the bytes of one expert."""
    tensors = (layer.w13, layer.w2, layer.bias13, layer.bias2)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None) // len(layer.w13)


def dense_bytes(decoder: Decoder) -> int:
    """Return the bytes of weights that every step reads: all but the experts and the embedding."""
    stacked = sum(expert_bytes(layer) * len(layer.w13) for layer in expert_layers(decoder))
    looked_up = 0 if decoder.lm_head is None else decoder.embed.weight.nbytes
    return _nbytes(decoder) - stacked - looked_up


def kv_bytes(decoder: Decoder, context: float) -> float:
    """Return the bytes of the cache that a row with `context` tokens reads."""
    return sum(
        token_bytes(decoder, window) * (context if window is None else min(context, window))
        for window in set(windows(decoder))
    )


def active_parameters(decoder: Decoder, k: int) -> int:
    """Return the parameters that each token of a prompt is multiplied by, the head excluded.

    `k` is the number of experts of a token.
    """
    experts = sum(
        (layer.w13[0].numel() + layer.w2[0].numel()) * (len(layer.w13) - k)
        for layer in expert_layers(decoder)
    )
    head = 0 if decoder.lm_head is None else decoder.lm_head.weight.numel()
    every = sum(parameter.numel() for parameter in decoder.parameters())
    return every - experts - head - decoder.embed.weight.numel()


def causal_pairs(num_tokens: int, window: int | None = None) -> int:
    """Return the number of pairs of a query and a key that it sees in a prompt."""
    seen = num_tokens if window is None else min(window, num_tokens)
    return seen * (seen + 1) // 2 + (num_tokens - seen) * seen


def prefill_flop(decoder: Decoder, k: int, num_tokens: int) -> int:
    """Return a prompt's FLOP: 2 per active parameter and token, the head once, and attention."""
    head = decoder.embed.weight.numel()
    attention = sum(
        2 * causal_pairs(num_tokens, window) * layer.num_heads * sum(_head_widths(layer))
        for layer, window in zip(attentions(decoder), windows(decoder), strict=True)
    )
    return 2 * active_parameters(decoder, k) * num_tokens + 2 * head + attention


def _head_widths(attention: nn.Module) -> tuple[int, int]:
    """Return the widths of a key and of a value that a prompt's attention multiplies."""
    if isinstance(attention, MultiHeadLatentAttention):
        return attention.nope_dim + attention.rope_dim, attention.v_dim
    return attention.head_dim, attention.head_dim


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def static_batch_seconds(
    lengths: Sequence[int],
    limits: Sequence[int],
    batch: int,
    *,
    token_seconds: float,
    step_seconds: float,
) -> float:
    """Return the seconds of static batches for prompts of `lengths` and `limits` new tokens.

    They are taken in order of their length. A batch is padded to its longest prompt, at
    `token_seconds` a token, padding included, and runs until its last row ends, at `step_seconds`
    a step; its first token comes of the prompt.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    seconds = 0.0
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        padded = len(rows) * max(lengths[row] for row in rows)
        steps = max(limits[row] for row in rows) - 1
        seconds += padded * token_seconds + steps * step_seconds
    return seconds
