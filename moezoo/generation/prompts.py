"""Chunks of prompts: what a forward pass of several of them needs, and their attention.

Legend: T new tokens of all chunks, C chunks, N tiles of queries, S keys (cached and new), Hq query
heads, Hk key heads, D key width, Dv value width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.generation.paged import PagedCache, PagedContext, Window, slots_of
from moezoo.generation.pages import PAGE_SIZE
from moezoo.layers.attention import CausalMask, Keys, attend
from moezoo.layers.kernels.windows import first_key
from moezoo.layers.rope import Rotation

PROMPT_SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048)
"""Passes that are CUDA graphs have room for so many tokens."""


@dataclass(frozen=True)
class Chunk:
    """Tokens of a row's prompt, of which `start` tokens are in the cache already."""

    row: int
    tokens: Sequence[int]
    start: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


def in_chunks(row: int, tokens: Sequence[int], limit: int, *, start: int = 0) -> Iterator[Chunk]:
    """A row's tokens from `start` on, at most `limit` in a chunk."""
    for first in range(start, len(tokens), limit):
        yield Chunk(row, tokens[first : first + limit], first)


def passes(chunks: Iterable[Chunk], limit: int) -> Iterator[list[Chunk]]:
    """The chunks in order, as many together as have at most `limit` tokens."""
    taken: list[Chunk] = []
    room = limit
    for chunk in chunks:
        if len(chunk.tokens) > room:
            yield taken
            taken, room = [], limit
        taken.append(chunk)
        room -= len(chunk.tokens)
    if taken:
        yield taken


@dataclass(frozen=True)
class Sizes:
    """Room for so many tokens, chunks and tiles; what is not filled does nothing."""

    tokens: int
    chunks: int
    tiles: int

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> "Sizes":
        return cls(sum(len(chunk.tokens) for chunk in chunks), len(chunks), len(_tiles(chunks)[0]))

    def rounded(self) -> "Sizes":
        """The next of few sizes, so that few graphs serve all."""
        from moezoo.layers.kernels.prompt_attention import TILE

        tokens = next((size for size in PROMPT_SIZES if size >= self.tokens), self.tokens)
        chunks = 1 << (self.chunks - 1).bit_length()
        # Each chunk may begin a tile that it does not fill.
        return Sizes(tokens, chunks, tokens // TILE + chunks)

    @property
    def numbers(self) -> int:
        return 3 * self.tokens + self.chunks + 5 * self.tiles


@dataclass(frozen=True)
class PromptInputs:
    """Chunks as int32 tensors, one behind another in the same memory.

    tokens, positions and rows [T], where a row of -1 marks a place that is not filled; `last` [C]
    is the place of each chunk's last token; tiles [5, N] as `prompt_attention` takes them.
    """

    tokens: Tensor
    positions: Tensor
    rows: Tensor
    last: Tensor
    tiles: Tensor

    @classmethod
    def views(cls, memory: Tensor, sizes: Sizes) -> "PromptInputs":
        """Of int32 [sizes.numbers]."""
        parts = memory.split([sizes.tokens] * 3 + [sizes.chunks, 5 * sizes.tiles])
        tokens, positions, rows, last, tiles = parts
        return cls(tokens, positions, rows, last, tiles.view(5, -1))


def packed(chunks: Sequence[Chunk], sizes: Sizes) -> Tensor:
    """The memory of `PromptInputs` on the host."""
    memory = torch.zeros(sizes.numbers, dtype=torch.int32)
    inputs = PromptInputs.views(memory, sizes)
    inputs.rows.fill_(-1)
    first = 0
    for i, chunk in enumerate(chunks):
        places = slice(first, first + len(chunk.tokens))
        inputs.tokens[places] = torch.tensor(chunk.tokens, dtype=torch.int32)
        inputs.positions[places] = torch.arange(chunk.start, chunk.end, dtype=torch.int32)
        inputs.rows[places] = chunk.row
        first = places.stop
        inputs.last[i] = first - 1
    tiles = _tiles(chunks)
    inputs.tiles[:, : tiles.shape[1]] = tiles
    return memory


def _tiles(chunks: Sequence[Chunk]) -> Tensor:
    """What `query_tiles` makes of them, with rows of the page tables for the sequences' numbers."""
    from moezoo.layers.kernels.prompt_attention import query_tiles

    tiles = query_tiles([len(chunk.tokens) for chunk in chunks], [chunk.end for chunk in chunks])
    tiles[0] = torch.tensor([chunk.row for chunk in chunks], dtype=torch.int32)[tiles[0].long()]
    return tiles


def key_places(chunks: Sequence[Chunk]) -> Tensor:
    """int32 [2, S] on the host: rows and positions of all tokens that the chunks see."""
    rows = [torch.full((chunk.end,), chunk.row, dtype=torch.int32) for chunk in chunks]
    positions = [torch.arange(chunk.end, dtype=torch.int32) for chunk in chunks]
    return torch.stack((torch.cat(rows), torch.cat(positions)))


def slots_of_rows(table: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """int64 [T]: the slots of `positions` of `rows`, -1 where the row is."""
    pages = table[rows.clamp(min=0), positions // PAGE_SIZE].long()
    return torch.where(rows >= 0, pages * PAGE_SIZE + positions % PAGE_SIZE, -1)


@dataclass(frozen=True)
class PromptContext(PagedContext):
    """Chunks of prompts on a GPU, their tokens at `positions` int [1, T].

    `packed_slots` has the slots of all keys, int64 [S], sequence by sequence, for attention that
    unfolds them first.
    """

    rotation: Rotation
    cache: PagedCache
    slots: dict[Window, Tensor]
    num_queries: int
    positions: Tensor
    tiles: Tensor
    tables: dict[Window, Tensor]
    packed_slots: Tensor

    def latents(self, keys: Keys) -> Tensor:
        return keys.keys[self.packed_slots].transpose(0, 1)

    def attend(
        self,
        q: Tensor,
        keys: Keys,
        *,
        window: int | None = None,
        scale: float,
        value_dim: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        from moezoo.layers.kernels.prompt_attention import prompt_attention

        values = keys.keys[..., :value_dim] if keys.values is None else keys.values
        return prompt_attention(
            q[0],
            keys.keys,
            values,
            self.tiles,
            self.tables[window],
            page_size=PAGE_SIZE,
            scale=scale,
            window=window,
            sinks=sinks,
        )[None]

    def attend_to(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        from moezoo.layers.kernels.prompt_attention import prompt_attention

        k, v = k[0].transpose(0, 1), v[0].transpose(0, 1)
        return prompt_attention(q[0], k, v, self.tiles, scale=scale)[None]


@dataclass(frozen=True)
class TorchPromptContext(PagedContext):
    """Chunks of prompts, in torch.

    `num_new` counts the new tokens of each sequence, which are at `positions` int [1, T];
    seen[window] has the slots of all its keys, int64 [S_b], as far as a layer with that window sees
    them.
    """

    rotation: Rotation
    cache: PagedCache
    slots: dict[Window, Tensor]
    positions: Tensor
    num_new: list[int]
    seen: dict[Window, list[Tensor]]

    @property
    def num_queries(self) -> int:
        return max(self.num_new)

    def latents(self, keys: Keys) -> Tensor:
        return keys.keys[torch.cat(self.seen[None])].transpose(0, 1)

    def attend(
        self,
        q: Tensor,
        keys: Keys,
        *,
        window: int | None = None,
        scale: float,
        value_dim: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        k = [keys.keys[slots] for slots in self.seen[window]]
        if keys.values is None:
            v = [one[..., :value_dim] for one in k]
        else:
            v = [keys.values[slots] for slots in self.seen[window]]
        return self._attend(q, k, v, window, scale, sinks)

    def attend_to(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        lengths = [len(slots) for slots in self.seen[None]]
        keys, values = (x[0].transpose(0, 1).split(lengths) for x in (k, v))
        return self._attend(q, keys, values, None, scale)

    def _attend(
        self,
        q: Tensor,
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        window: Window,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q [1, T, Hq, D], k [S_b, Hk, D] and v [S_b, Hk, Dv] of each sequence."""
        attended = []
        for queries, keys, values in zip(q[0].split(self.num_new), k, v, strict=True):
            mask = CausalMask(len(keys) - len(queries), len(queries), q.device)
            one_q, one_k, one_v = (x.transpose(0, 1)[None] for x in (queries, keys, values))
            out = attend(one_q, one_k, one_v, mask, window=window, scale=scale, sinks=sinks)
            attended.append(out[0].transpose(0, 1))
        return torch.cat(attended)[None]


def torch_context(
    chunks: Sequence[Chunk],
    positions: Tensor,
    rotation: Rotation,
    cache: PagedCache,
    tables: dict[Window, Tensor],
) -> TorchPromptContext:
    slots, seen = {}, {}
    for window, table in tables.items():

        def of(chunk: Chunk, first: int, table: Tensor = table) -> Tensor:
            positions = torch.arange(first, chunk.end, device=table.device)
            return slots_of(table[chunk.row, None], positions[None])[0]

        slots[window] = torch.cat([of(chunk, chunk.start) for chunk in chunks])
        seen[window] = [
            of(chunk, 0 if window is None else max(0, first_key(chunk.start, window)))
            for chunk in chunks
        ]
    num_new = [len(chunk.tokens) for chunk in chunks]
    return TorchPromptContext(rotation, cache, slots, positions, num_new, seen)
