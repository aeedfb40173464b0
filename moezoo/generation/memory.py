"""The memory of an engine's rows and pages, and how many of them fit."""

import torch

from moezoo.device import free_bytes
from moezoo.generation.graphs import unrecorded
from moezoo.generation.paged import ring_pages, row_state_bytes, token_bytes, windows
from moezoo.generation.pages import PAGE_SIZE, num_pages
from moezoo.generation.turns import smallest
from moezoo.layers.context import DenseContext
from moezoo.layers.decoder import Decoder
from moezoo.layers.mask import CausalMask

CPU_CACHE_BYTES = 4 * 2**30
"""The largest KV cache on a CPU by default."""


def row_bytes(decoder: Decoder, context: int) -> int:
    """Return the bytes of a row with pages for `context` tokens."""
    tokens = sum(token_bytes(decoder, window) for window in set(windows(decoder)))
    return num_pages(context) * PAGE_SIZE * tokens + row_state_bytes(decoder)


def rows_and_pages_that_fit(
    decoder: Decoder, *, num_rows: int, context: int, chunk: int, cache_bytes: int | None
) -> tuple[int, int]:
    """Return how many rows, at most `num_rows`, and pages an `Engine` has memory for.

    The memory is `cache_bytes`, or what is free. Where some layers have rings or states instead of
    pages, these take at most half of it. On a GPU where not everything is sure to fit, a forward
    pass of `chunk` tokens is made to measure what it takes beside the cache. Ranks that share
    experts get the numbers of the one with the least memory.

    Raises `ValueError` if `cache_bytes` has no room for one page, and the rings and states of a
    row.
    """
    weight = decoder.embed.weight
    page_bytes = token_bytes(decoder) * PAGE_SIZE
    own_bytes = row_state_bytes(decoder) + PAGE_SIZE * sum(
        token_bytes(decoder, window) * ring_pages(window, context=context, chunk=chunk)
        for window in set(windows(decoder))
        if window is not None
    )
    least = page_bytes + own_bytes
    if cache_bytes is None and weight.is_cpu:
        cache_bytes = max(CPU_CACHE_BYTES, least)
    elif cache_bytes is None:
        # The widest temporaries of sampling: scores sorted, and summed up in float64.
        logits = num_rows * decoder.embed.num_embeddings * 40
        (free,) = smallest(decoder, free_bytes(weight.device))
        cache_bytes = num_rows * (num_pages(context) * page_bytes + own_bytes)
        if cache_bytes + logits > free // 2:
            activations = _activation_bytes(decoder, min(chunk, context))
            cache_bytes = max(least, int(0.95 * free - 1.25 * activations - logits))
    if cache_bytes < least:
        raise ValueError(
            f"cache_bytes is {cache_bytes}, but one prompt of {PAGE_SIZE} tokens takes {least}"
        )
    if own_bytes:
        room = cache_bytes // 2 if page_bytes else cache_bytes
        num_rows = max(1, min(num_rows, room // own_bytes))
    wanted = num_rows * num_pages(context)
    if page_bytes:
        wanted = min(wanted, (cache_bytes - num_rows * own_bytes) // page_bytes)
    num_rows, wanted = smallest(decoder, num_rows, wanted)
    return num_rows, wanted


@torch.inference_mode()
def _activation_bytes(decoder: Decoder, num_tokens: int) -> int:
    device = decoder.embed.weight.device
    ids = torch.arange(num_tokens, device=device)[None]
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    context = DenseContext(decoder.rotation(ids), CausalMask(0, num_tokens, device))
    with unrecorded(decoder):
        decoder(decoder.embed(ids % decoder.embed.num_embeddings), context)
    return torch.cuda.max_memory_allocated(device) - before
