"""Forward passes over chunks of several prompts: their inputs and their attention.

Legend: T new tokens of all chunks, C chunks, N tiles of queries, S keys (cached and new), Hq query
heads, Hk key heads, D key width, Dv value width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from moezoo.device import to_device
from moezoo.generation.paged import PagedCache, PagedContext, Window, slots_of
from moezoo.generation.pages import PAGE_SIZE
from moezoo.layers.chosen_keys import Chooser, attend_to_chosen
from moezoo.layers.context import Keys, whole_keys
from moezoo.layers.kernels.windows import first_key
from moezoo.layers.mask import CausalMask
from moezoo.layers.rope import Rotation
from moezoo.layers.softmax_attention import attend
from moezoo.layers.states import StateLayer, States

PROMPT_SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048)
"""Numbers of tokens that the CUDA graphs of prompt passes have room for."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a row's prompt, after `start` tokens that are in the cache already."""

    row: int
    tokens: Sequence[int]
    start: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


def in_chunks(row: int, tokens: Sequence[int], limit: int, *, start: int = 0) -> Iterator[Chunk]:
    """Split a row's tokens from `start` on into chunks of at most `limit`."""
    for first in range(start, len(tokens), limit):
        yield Chunk(row, tokens[first : first + limit], first)


def passes(chunks: Iterable[Chunk], limit: int) -> Iterator[list[Chunk]]:
    """Group the chunks in order into passes of at most `limit` tokens."""
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
    """Numbers of tokens, chunks and tiles that a prompt pass has room for."""

    tokens: int
    chunks: int
    tiles: int

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> "Sizes":
        return cls(sum(len(chunk.tokens) for chunk in chunks), len(chunks), len(_tiles(chunks)[0]))

    def rounded(self) -> "Sizes":
        """Return the next larger of a few sizes, so that few graphs serve all passes."""
        from moezoo.layers.kernels.prompt_attention import TILE

        tokens = next((size for size in PROMPT_SIZES if size >= self.tokens), self.tokens)
        chunks = 1 << (self.chunks - 1).bit_length()
        # Each chunk may end with a tile that it does not fill.
        return Sizes(tokens, chunks, tokens // TILE + chunks)

    @property
    def numbers(self) -> int:
        """The length of the memory of `PromptInputs`."""
        return 3 * self.tokens + self.chunks + 5 * self.tiles


@dataclass(frozen=True)
class PromptInputs:
    """The chunks of a pass as int32 tensors, which lie one behind another in the same memory.

    tokens, positions and rows are [T], with a row of -1 at places that are not filled; `last` [C]
    is the place of each chunk's last token; tiles [5, N] are those of `prompt_attention`.
    """

    tokens: Tensor
    positions: Tensor
    rows: Tensor
    last: Tensor
    tiles: Tensor

    @classmethod
    def views(cls, memory: Tensor, sizes: Sizes) -> "PromptInputs":
        """Return views of memory int32 [sizes.numbers]."""
        parts = memory.split([sizes.tokens] * 3 + [sizes.chunks, 5 * sizes.tiles])
        tokens, positions, rows, last, tiles = parts
        return cls(tokens, positions, rows, last, tiles.view(5, -1))


def packed(chunks: Sequence[Chunk], sizes: Sizes) -> Tensor:
    """Return the memory of `PromptInputs`, filled with the chunks, on the host."""
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
    """Return `query_tiles` of the chunks, with their rows in place of the sequences' numbers."""
    from moezoo.layers.kernels.prompt_attention import query_tiles

    tiles = query_tiles([len(chunk.tokens) for chunk in chunks], [chunk.end for chunk in chunks])
    tiles[0] = torch.tensor([chunk.row for chunk in chunks], dtype=torch.int32)[tiles[0].long()]
    return tiles


def key_places(chunks: Sequence[Chunk]) -> Tensor:
    """Return row and position of all tokens that chunks attend to: int32 [2, S], on the host."""
    rows = [torch.full((chunk.end,), chunk.row, dtype=torch.int32) for chunk in chunks]
    positions = [torch.arange(chunk.end, dtype=torch.int32) for chunk in chunks]
    return torch.stack((torch.cat(rows), torch.cat(positions)))


def slots_of_rows(table: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Return the slots, int64 [T], of positions [T] in rows [T]; -1 where the row is -1."""
    pages = table[rows.clamp(min=0), positions // PAGE_SIZE].long()
    return torch.where(rows >= 0, pages * PAGE_SIZE + positions % PAGE_SIZE, -1)


SHORT = 64
"""Chunks of up to so many tokens share one rectangle."""


@dataclass(frozen=True)
class Rectangle:
    """C chunks of about the same length, padded on the right to [C, T].

    rows int64 [C]; `begins` bool [C], whether a chunk is its row's first; places int64 [C, T], the
    places of its tokens among those of all chunks; `real` bool [C, T], False at padding, or None
    without any; `filled` int64, the flat indices of the places that are not padding.
    """

    rows: Tensor
    begins: Tensor
    places: Tensor
    real: Tensor | None
    filled: Tensor

    def states(self, kept: States) -> States:
        """Return the states of its rows, from those of all rows [R, ..]; zeros at a row's start."""
        return tuple(
            state[self.rows].masked_fill(self.begins.view(-1, *(1,) * (state.dim() - 1)), 0)
            for state in kept
        )


def rectangles(chunks: Sequence[Chunk], device: torch.device) -> list[Rectangle]:
    """Group the chunks into few rectangles, each padded by at most half, or to at most SHORT.

    Raises `ValueError` for two chunks of one row, which would have to be computed in turn.
    """
    if len({chunk.row for chunk in chunks}) < len(chunks):
        raise ValueError("two chunks of one row in a pass, and its layers have states")
    firsts = accumulate((len(chunk.tokens) for chunk in chunks), initial=0)
    by_size: dict[int, list[tuple[int, Chunk]]] = {}
    for first, chunk in zip(firsts, chunks, strict=False):
        size = max(SHORT, 1 << (len(chunk.tokens) - 1).bit_length())
        by_size.setdefault(size, []).append((first, chunk))
    return [_rectangle(found, device) for found in by_size.values()]


def _rectangle(found: Sequence[tuple[int, Chunk]], device: torch.device) -> Rectangle:
    lengths = torch.tensor([len(chunk.tokens) for _, chunk in found])[:, None]
    steps = torch.arange(int(lengths.max()))
    real = steps < lengths
    firsts = torch.tensor([first for first, _ in found])[:, None]
    places = firsts + torch.minimum(steps, lengths - 1)
    return Rectangle(
        to_device(torch.tensor([chunk.row for _, chunk in found]), device),
        to_device(torch.tensor([chunk.start == 0 for _, chunk in found]), device),
        to_device(places, device),
        None if real.all() else to_device(real, device),
        to_device(real.flatten().nonzero().flatten(), device),
    )


class ChunkContext(PagedContext):
    """The base of the contexts of prompts: chunks with chosen keys one by one, and states in
    rectangles."""

    chunks: Sequence[Chunk]

    def _attend_to_chosen(
        self, q: Tensor, stored: Sequence[Tensor], chooser: Chooser, scale: float, dim: int
    ) -> Tensor:
        """Attend from q [1, T, N, D] to the chosen keys of each sequence, stored [S_b, ..]."""
        attended, start = [], 0
        for chunk, keys in zip(self.chunks, stored, strict=True):
            tokens = slice(start, start + len(chunk.tokens))
            mask = CausalMask(chunk.start, len(chunk.tokens), q.device)
            allowed = mask(len(keys), None)
            own = chooser.of(tokens)
            attended.append(
                attend_to_chosen(q[:, tokens], keys[None], allowed, own, scale=scale, dim=dim)
            )
            start = tokens.stop
        return torch.cat(attended, 1)

    def recur(self, layer: StateLayer, inputs: tuple[Tensor, ...], layer_idx: int) -> Tensor:
        kept = self.cache.states[layer_idx]
        out = inputs[0].new_empty(0)
        for rectangle in self._rectangles:
            given = tuple(x[0][rectangle.places] for x in inputs)
            mixed, after = layer.mix(given, rectangle.states(kept), rectangle.real)
            for state, new in zip(kept, after, strict=True):
                state.index_copy_(0, rectangle.rows, new.to(state.dtype))
            if len(self._rectangles) == 1 and len(rectangle.rows) == 1:
                return mixed
            if not out.numel():
                out = mixed.new_empty(inputs[0].shape[1], mixed.shape[-1])
            places = rectangle.places.flatten()[rectangle.filled]
            out.index_copy_(0, places, mixed.flatten(0, 1)[rectangle.filled])
        return out[None]

    @cached_property
    def _rectangles(self) -> list[Rectangle]:
        return rectangles(self.chunks, self.rotation[0].device)


@dataclass(frozen=True)
class PromptContext(ChunkContext):
    """The context of chunks of prompts on a GPU, with their tokens at positions int [1, T].

    packed_slots int64 [S] are the slots of all keys, sequence by sequence, for attention that
    unfolds them first. `chunks` are for layers with a state.
    """

    rotation: Rotation
    cache: PagedCache
    slots: dict[Window, Tensor]
    chunks: Sequence[Chunk]
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

    def attend_to_chosen(
        self, q: Tensor, keys: Keys, chooser: Chooser, *, scale: float, value_dim: int
    ) -> Tensor:
        slots = self.packed_slots.split([chunk.end for chunk in self.chunks])
        stored = [keys.keys[own].squeeze(1) for own in slots]
        return self._attend_to_chosen(q, stored, chooser, scale, value_dim)

    def attend_to(
        self, q: Tensor, k: Tensor, v: Tensor, *, shared_keys: Tensor, scale: float
    ) -> Tensor:
        from moezoo.layers.kernels.prompt_attention import prompt_attention

        k, v = k[0].transpose(0, 1), v[0].transpose(0, 1)
        (shared_keys,) = shared_keys
        return prompt_attention(q[0], k, v, self.tiles, scale=scale, shared_keys=shared_keys)[None]


@dataclass(frozen=True)
class TorchPromptContext(ChunkContext):
    """The context of chunks of prompts in torch, with their tokens at positions int [1, T].

    seen[window] has, for each chunk, the slots int64 [S_b] of the keys that a layer with that
    window attends to.
    """

    rotation: Rotation
    cache: PagedCache
    slots: dict[Window, Tensor]
    chunks: Sequence[Chunk]
    positions: Tensor
    seen: dict[Window, list[Tensor]]

    @property
    def num_queries(self) -> int:
        return max(self._num_new)

    @property
    def _num_new(self) -> list[int]:
        return [len(chunk.tokens) for chunk in self.chunks]

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

    def attend_to_chosen(
        self, q: Tensor, keys: Keys, chooser: Chooser, *, scale: float, value_dim: int
    ) -> Tensor:
        stored = [keys.keys[slots].squeeze(1) for slots in self.seen[None]]
        return self._attend_to_chosen(q, stored, chooser, scale, value_dim)

    def attend_to(
        self, q: Tensor, k: Tensor, v: Tensor, *, shared_keys: Tensor, scale: float
    ) -> Tensor:
        k = whole_keys(k, shared_keys)
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
        """Attend from q [1, T, Hq, D] to k [S_b, Hk, D] and v [S_b, Hk, Dv] of each sequence."""
        attended = []
        for queries, keys, values in zip(q[0].split(self._num_new), k, v, strict=True):
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
    """Return the context of chunks whose rows have the pages `tables`."""
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
    return TorchPromptContext(rotation, cache, slots, chunks, positions, seen)
