"""Section attention: the two attention kernels over a paged cache, alone.

Decoding: a token of each of several rows, beside the time in which the memory gives the keys and
values, and beside torch's scaled_dot_product_attention over the same keys and values without pages
(it chooses its kernel). Prompts: the FLOP of causal attention a second, beside torch's flash
attention and cuDNN's over packed keys. The shapes are those of the case's first layer; pages lie in
random order, and copies of the cache make more than twice the L2 cache, so that none is warm. All
in CUDA graphs; results are compared with the references before.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from roofline import causal_pairs
from subject import Row, Subject, spread
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from moezoo.generation.pages import PAGE_SIZE, num_pages
from moezoo.layers.mla import MultiHeadLatentAttention
from moezoo.tools.timing import Graph, in_turns

DECODED = ((1, 8192), (8, 2048), (8, 8192), (32, 2048), (32, 8192))
"""Numbers of rows, and of tokens in each row."""
PROMPTS = (2048, 8192)
L2_BYTES = 50 * 2**20
TOLERANCE = 2e-2
"""Largest allowed difference to the reference, relative to its largest number, in 16 bits."""
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Heads:
    """Numbers of heads of a layer's attention, and widths of its keys and values in the cache."""

    queries: int
    keys: int
    width: int
    value_width: int
    latent: bool

    @classmethod
    def of(cls, attention: Any) -> "Heads":
        if isinstance(attention, MultiHeadLatentAttention):
            latent = attention.kv_norm.dim
            return cls(attention.num_heads, 1, latent + attention.rope_dim, latent, True)
        dim = attention.head_dim
        return cls(attention.num_heads, attention.num_kv_heads, dim, dim, False)

    @property
    def token_numbers(self) -> int:
        return self.keys * (self.width if self.latent else self.width + self.value_width)


def section(subject: Subject, args: argparse.Namespace) -> Iterator[Row]:
    if subject.device.type != "cuda":
        return
    heads = Heads.of(subject.model.decoder.layers[0].attn)
    for batch, context in DECODED:
        row = subject.row("attention", kind="decode", batch=batch, context=context)
        row |= {"heads": vars(heads), "seconds": {}}
        fill(subject, row, decoding(subject, heads, batch, context))
        nbytes = batch * context * heads.token_numbers * subject.model.dtype.itemsize
        row["kv_bytes"] = nbytes
        for name, seconds in row["seconds"].items():
            share = nbytes / seconds["median"] / subject.ceilings.read_bytes_per_second
            row.setdefault("of_bandwidth", {})[name] = share
        yield row
    if heads.latent:  # prompts expand their latents
        attention = subject.model.decoder.layers[0].attn
        width = attention.nope_dim + attention.rope_dim
        heads = Heads(heads.queries, heads.queries, width, attention.v_dim, False)
    for num_tokens in PROMPTS:
        row = subject.row("attention", kind="prompt", batch=1, context=num_tokens)
        row |= {"heads": vars(heads), "seconds": {}}
        fill(subject, row, prompts(subject, heads, num_tokens))
        pairs = causal_pairs(num_tokens) * heads.queries
        row["flop"] = 2 * pairs * (heads.width + heads.value_width)
        for name, seconds in row["seconds"].items():
            share = row["flop"] / seconds["median"] / subject.ceilings.flop_per_second
            row.setdefault("of_peak", {})[name] = share
        yield row


Calls = list[Callable[[], Tensor]]


def fill(subject: Subject, row: Row, contenders: Iterator[tuple[str, Calls, Tensor]]) -> None:
    """Fill in the seconds of each call, after comparing its first result with the reference."""

    def measure(calls: Calls, expected: Tensor) -> dict[str, float]:
        found = calls[0]().float().view(expected.shape)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        if not error < TOLERANCE:
            raise ValueError(f"differs from the reference by {error:.1e} of its largest number")
        graph = Graph(calls)
        samples = in_turns({"": graph}, 100.0)[""]
        return spread(sample / graph.launches for sample in samples)

    for name, calls, expected in contenders:
        seconds = subject.attempt(row, name, partial(measure, calls, expected))
        if seconds is not None:
            row["seconds"][name] = seconds


def decoding(
    subject: Subject, heads: Heads, batch: int, context: int
) -> Iterator[tuple[str, Calls, Tensor]]:
    from moezoo.layers.kernels.decode_attention import decode_attention, decode_attention_ref

    each = num_pages(context)
    like = {"device": subject.device, "dtype": subject.model.dtype}
    nbytes = batch * context * heads.token_numbers * subject.model.dtype.itemsize
    copies = 1 + math.ceil(2 * L2_BYTES / nbytes)
    q = torch.randn(batch, heads.queries, heads.width, **like)
    pages = torch.randperm(batch * each, device=subject.device).int().view(batch, each)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=subject.device)
    scale = heads.width**-0.5

    def stored(width: int) -> Tensor:
        return torch.randn(batch * each * PAGE_SIZE, heads.keys, width, **like)

    caches = [
        (stored(heads.width), None if heads.latent else stored(heads.value_width))
        for _ in range(copies)
    ]
    options = {"value_dim": heads.value_width} if heads.latent else {}
    options |= {"page_size": PAGE_SIZE, "scale": scale}
    calls = [partial(decode_attention, q, *cache, pages, lengths, **options) for cache in caches]
    expected = decode_attention_ref(q, *caches[0], pages, lengths, **options).float()
    yield "moezoo", calls, expected
    del caches[1:], calls
    slots = (
        pages[..., None].long() * PAGE_SIZE + torch.arange(PAGE_SIZE, device=q.device)
    ).flatten(1)
    slots = slots[:, :context]
    keys, values = caches[0]
    k = keys[slots].transpose(1, 2)
    v = k[..., : heads.value_width] if values is None else values[slots].transpose(1, 2)
    dense = [(k, v), *((k.clone(), v.clone()) for _ in range(copies - 1))]
    attend = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    yield "sdpa", [partial(attend, q[:, :, None], *kv) for kv in dense], expected


def prompts(subject: Subject, heads: Heads, num_tokens: int) -> Iterator[tuple[str, Calls, Tensor]]:
    from moezoo.layers.kernels.prompt_attention import (
        prompt_attention,
        prompt_attention_ref,
        query_tiles,
    )

    like = {"device": subject.device, "dtype": subject.model.dtype}
    shapes = ((heads.queries, heads.width), (heads.keys, heads.width))
    q, k, v = (
        torch.randn(num_tokens, number, width, **like)
        for number, width in (*shapes, (heads.keys, heads.value_width))
    )
    scale = heads.width**-0.5
    pages = torch.randperm(num_pages(num_tokens), device=subject.device).int()
    positions = torch.arange(num_tokens, device=subject.device)
    slots = pages[positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
    keys, values = (x.new_zeros(len(pages) * PAGE_SIZE, *x.shape[1:]) for x in (k, v))
    keys[slots], values[slots] = k, v
    tiles = query_tiles([num_tokens], [num_tokens]).to(subject.device)
    options = {"page_size": PAGE_SIZE, "scale": scale}
    expected = prompt_attention_ref(q, keys, values, tiles, pages[None], **options).float()
    yield (
        "moezoo",
        [partial(prompt_attention, q, keys, values, tiles, pages[None], **options)],
        expected,
    )
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    gqa = heads.queries != heads.keys

    def attend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=gqa
            )
        return out[0].transpose(0, 1)

    for name, backend in PEERS.items():
        yield name, [partial(attend, backend)], expected


def figures(row: Row) -> list[str]:
    """Return the cells of a row of the table, in the order of COLUMNS."""
    shares = row.get("of_bandwidth") or row.get("of_peak") or {}
    names = itertools.chain(("moezoo",), ("sdpa",), PEERS)
    return [
        *(row["case"], row["kind"], str(row["batch"]), f"{row['context']:,}"),
        *(
            f"{1e6 * row['seconds'][name]['median']:,.0f} ({shares[name]:.0%})"
            if name in row["seconds"]
            else ""
            for name in names
        ),
    ]


COLUMNS = ("", "kind", "rows", "tokens", "moezoo us (of ceiling)", "sdpa", *PEERS)
