"""Runs a decoder over a paged KV cache: prompts in chunks, then one token per row and step.

On a GPU a step, sampling included, is a CUDA graph that is captured once for each size of batch. It
reads its input tokens where the step before left them, so that steps follow each other without the
host.

Legend: R rows, B rows of a step, T tokens, V vocabulary, P pages of a row.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.device import device_made_current, runs_kernels, to_device
from moezoo.generation.graphs import GRAPH_TOKENS, captures_steps, record
from moezoo.generation.paged import (
    DecodeContext,
    PagedCache,
    Window,
    attentions,
    ring_pages,
    slots_of,
    windows,
)
from moezoo.generation.pages import PAGE_SIZE, num_pages
from moezoo.generation.prompts import (
    Chunk,
    PromptContext,
    PromptInputs,
    Sizes,
    in_chunks,
    key_places,
    packed,
    passes,
    slots_of_rows,
    torch_context,
)
from moezoo.generation.sampling import Sampler
from moezoo.generation.turns import limited, pass_without_tokens
from moezoo.layers.decoder import Decoder
from moezoo.layers.rope import Rotation

CHUNK_TOKENS = 8192
"""Most prompt tokens in one forward pass, by default."""


class Engine:
    """A batch of `num_rows` sequences (rows) of at most `context` tokens each, with their KV cache.

    Args:
        decoder: a decoder that `supports` accepts.
        pages: number of pages for all rows together; by default enough for `context` tokens in
            each.
        chunk: the most tokens in one call of `prefill`.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_rows: int,
        context: int,
        pages: int | None = None,
        chunk: int = CHUNK_TOKENS,
    ) -> None:
        self.decoder = decoder
        self.peers = decoder.peers
        self.num_rows = num_rows
        self.context = context
        self.chunk = chunk = limited(decoder, chunk)
        self.pages = num_rows * num_pages(context) if pages is None else pages
        self.device = decoder.embed.weight.device
        self.cache = PagedCache(
            decoder, pages=self.pages, num_rows=num_rows, context=context, chunk=chunk
        )
        self.ids = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        """The next token of each row, not in the cache yet."""
        self.lengths = torch.zeros(num_rows, dtype=torch.int32, device=self.device)
        """Number of tokens of each row in the cache; 0 for a row without a sequence."""
        kinds = list(dict.fromkeys([None, *windows(decoder)]))
        self._tables = torch.zeros(
            len(kinds), num_rows, num_pages(context), dtype=torch.int32, device=self.device
        )
        self.tables: dict[Window, Tensor] = dict(zip(kinds, self._tables, strict=True))
        for window, table in self.tables.items():
            if window is not None:
                ring = ring_pages(window, context=context, chunk=chunk)
                first = torch.arange(num_rows, device=self.device)[:, None] * ring
                table.copy_(first + torch.arange(table.shape[1], device=self.device) % ring)
        self.captures = captures_steps(decoder)
        agreed = None if self.peers is None else self.peers.chosen
        self.greedy = Sampler.greedy(num_rows, self.device, agreed=agreed)
        self._graphs: dict[tuple[int, Sampler | None], tuple[Any, Tensor]] = {}
        self._empty_graphs: dict[int, Any] = {}
        """Graphs of steps in which this rank has no rows, by the largest number on another rank."""
        self._prompt_graphs: dict[Sizes, tuple[Tensor, Any, Tensor] | None] = {}
        """Input memory, graph and logits of prompt passes; None for a size that was seen once."""
        self._pool: Any = None
        self._recorders: set[nn.Module | None] = set()
        """Recorders that graphs write to; held here so that their memory is not freed."""
        self._unfolds = any(len(layer.cache_shapes) == 1 for layer in attentions(decoder))
        self.shares = set(self.tables) == {None} and not any(self.cache.states)
        """Whether sequences may share the pages of a common prefix. A sliding window's ring of
        pages belongs to one sequence, and so does a state, which is not kept page by page."""

    @torch.inference_mode()
    def assign(self, row: int, pages: Sequence[int]) -> None:
        """Set the pages of a row."""
        table = torch.tensor(pages, dtype=torch.int32)
        self.tables[None][row, : len(pages)] = to_device(table, self.device)

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Put the chunks' tokens into the cache; return logits [len(chunks), V] of their last ones.

        On a GPU a pass of few tokens is a CUDA graph from the second of its size on, since
        launching its kernels takes longer than running them. There are no graphs where each rank
        has tokens of its own, as ranks then exchange their numbers.
        """
        if self.peers is None:
            return self._prefill_alone(chunks)
        with self.peers.forward_pass(self.peers.begin(0, [chunk.tokens for chunk in chunks])):
            return self._prefill_alone(chunks)

    def _prefill_alone(self, chunks: Sequence[Chunk]) -> Tensor:
        if not runs_kernels(self.decoder.embed.weight):
            return self._prefill_in_torch(chunks)
        exact = Sizes.of(chunks)
        fresh = all(chunk.start == 0 for chunk in chunks)
        if self._records(exact, fresh=fresh):
            sizes = exact.rounded()
            if sizes in self._prompt_graphs:
                logits = self._replay_prefill(chunks, sizes)
                return logits[: len(chunks)].clone()
            self._prompt_graphs[sizes] = None
        inputs = PromptInputs.views(to_device(packed(chunks, exact), self.device), exact)
        keys = None
        if self._unfolds and not fresh:
            rows, positions = to_device(key_places(chunks), self.device)
            keys = slots_of_rows(self.tables[None], rows, positions)
        longest = max(len(chunk.tokens) for chunk in chunks)
        return self._prefill(inputs, longest, keys, chunks)

    def _records(self, sizes: Sizes, *, fresh: bool) -> bool:
        """Whether a prompt pass may be a graph: sizes alone decide its shapes, on all ranks."""
        unfolds = self._unfolds and not fresh
        same_tokens = self.peers is None or self.peers.same_tokens
        return (
            self.captures
            and same_tokens
            and sizes.tokens <= GRAPH_TOKENS
            and not (unfolds or any(self.cache.states))
        )

    def _prefill(
        self,
        inputs: PromptInputs,
        longest: int,
        key_slots: Tensor | None,
        chunks: Sequence[Chunk],
    ) -> Tensor:
        """Run the chunks on a GPU and return the logits of each one's last token.

        `longest` is a bound for a chunk's tokens. Without `key_slots` chunks attend to their own
        keys only.
        """
        slots = {
            window: slots_of_rows(table, inputs.rows, inputs.positions)
            for window, table in self.tables.items()
        }
        context = PromptContext(
            self.decoder.rotation(inputs.positions[None]),
            self.cache,
            slots,
            chunks,
            num_queries=longest,
            positions=inputs.positions[None],
            tiles=inputs.tiles,
            tables=self.tables,
            packed_slots=slots[None].clamp(min=0) if key_slots is None else key_slots,
        )
        hidden = self.decoder(self.decoder.embed(inputs.tokens[None]), context)[0]
        return self.decoder.logits(hidden[inputs.last])

    def _replay_prefill(self, chunks: Sequence[Chunk], sizes: Sizes) -> Tensor:
        packed_chunks = packed(chunks, sizes)
        recorded = self._prompt_graphs[sizes]
        if recorded is None:
            # The input is filled in first: what runs while recording writes to the cache as well.
            memory = to_device(packed_chunks, self.device)
            inputs = PromptInputs.views(memory, sizes)
            graph, logits = self._record(lambda: self._prefill(inputs, sizes.tokens, None, ()))
            recorded = self._prompt_graphs[sizes] = memory, graph, logits
        memory, graph, logits = recorded
        memory.copy_(packed_chunks.pin_memory(), non_blocking=True)
        graph.replay()
        self.decoder.end_step()
        return logits

    def _prefill_in_torch(self, chunks: Sequence[Chunk]) -> Tensor:
        positions = torch.cat([torch.arange(chunk.start, chunk.end) for chunk in chunks])
        tokens = torch.tensor(list(itertools.chain.from_iterable(c.tokens for c in chunks)))
        last = torch.tensor(list(itertools.accumulate(len(chunk.tokens) for chunk in chunks))) - 1
        positions = positions[None].to(self.device)
        rotation = self.decoder.rotation(positions)
        context = torch_context(chunks, positions, rotation, self.cache, self.tables)
        hidden = self.decoder(self.decoder.embed(tokens[None].to(self.device)), context)[0]
        return self.decoder.logits(hidden[last.to(self.device)])

    def prefill_all(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prefill whole prompts into the rows 0, 1, ..; return the logits of their last tokens."""
        chunks = itertools.chain.from_iterable(
            in_chunks(row, prompt, self.chunk) for row, prompt in enumerate(prompts)
        )
        ends = []
        for taken in passes(chunks, self.chunk):
            logits = self.prefill(taken)
            ends += [
                logits[i : i + 1]
                for i, chunk in enumerate(taken)
                if chunk.end == len(prompts[chunk.row])
            ]
        return torch.cat(ends)

    @torch.inference_mode()
    def start(self, rows: Sequence[int], lengths: Sequence[int], tokens: Tensor) -> None:
        """Set the next tokens of rows, int64 [len(rows)], which have `lengths` in the cache."""
        at = to_device(torch.tensor(rows), self.device)
        self.ids[at] = tokens
        self.lengths[at] = to_device(torch.tensor(lengths, dtype=torch.int32), self.device)

    @torch.inference_mode()
    def stop(self, rows: Sequence[int]) -> None:
        """Free rows: steps no longer compute anything for them."""
        self.lengths[to_device(torch.tensor(rows), self.device)] = 0

    @torch.inference_mode()
    def move(self, sources: Sequence[int], targets: Sequence[int], more: Iterable[Tensor]) -> None:
        """Move the sequences of the source rows to the target rows, which have none.

        `more` are further tensors with the state of rows, [R, ..] each.
        """
        source, target = (to_device(torch.tensor(x), self.device) for x in (sources, targets))
        states = itertools.chain.from_iterable(self.cache.states)
        for state in (self.ids, self.lengths, *self.tables.values(), *states, *more):
            held = state[target]
            state[target] = state[source]
            state[source] = held
        self.lengths[source] = 0

    @torch.inference_mode()
    def step(self, batch: int, sampler: Sampler | None = None) -> Tensor:
        """Put the next token of the first `batch` rows into the cache, and compute what follows.

        Returns logits [batch, V], valid until the next step. A sampler writes the tokens that it
        draws to `ids`; without one the caller does. Where another rank has more rows, the step has
        as many.
        """
        if self.peers is None:
            return self._replay(batch, sampler) if self.captures else self._step(batch, sampler)
        turn = self.peers.begin(batch)
        with self.peers.forward_pass(turn):
            if turn.capacity is None or not self.captures:
                return self._step(batch, sampler)
            return self._replay(turn.capacity, sampler)

    @torch.inference_mode()
    def finish(self, sampler: Sampler | None = None) -> None:
        """Make the forward passes that other ranks still have; their steps use such a sampler."""
        if self.peers is None:
            return
        while (turn := self.peers.begin(0)).goes_on:
            if turn.capacity is None or not self.captures:
                pass_without_tokens(self.decoder, turn)
                continue
            with self.peers.forward_pass(turn):
                self._require_graphs(turn.capacity, sampler)
                self._empty_graphs[turn.capacity].replay()
                self.decoder.end_step(dummy=True)

    def _replay(self, batch: int, sampler: Sampler | None) -> Tensor:
        self._require_graphs(batch, sampler)
        graph, logits = self._graphs[batch, sampler]
        graph.replay()
        self.decoder.end_step()
        return logits

    def _require_graphs(self, batch: int, sampler: Sampler | None) -> None:
        """Capture the graphs of a step that are missing, with rows and without.

        Capturing runs the step, so all ranks do it together, each for all that any may need.
        """
        if (batch, sampler) not in self._graphs:
            self._graphs[batch, sampler] = self._capture(batch, sampler)
        if self.peers is None or self.peers.same_tokens or batch in self._empty_graphs:
            return
        step = partial(self.peers.step_without_tokens, self.decoder)
        self._empty_graphs[batch], _ = self._record(step)

    def _step(self, batch: int, sampler: Sampler | None) -> Tensor:
        tables = {window: table[:batch] for window, table in self.tables.items()}
        if self.captures and type(self.decoder.embed) is nn.Embedding:
            from moezoo.layers.kernels.step_inputs import step_inputs

            with device_made_current(self.ids):
                rows, (cos, sin), slots = step_inputs(
                    self.ids[:batch],
                    self.lengths[:batch],
                    self._tables[:, :batch],
                    page_size=PAGE_SIZE,
                    embedding=self.decoder.embed.weight,
                    rotation=self._rotation,
                )
            x, rotation = rows[None], (cos[None, :, None], sin[None, :, None])
            by_window = dict(zip(tables, slots, strict=True))
        else:
            x, rotation, by_window = self._step_inputs_in_torch(batch, tables)
        context = DecodeContext(rotation, self.cache, by_window, tables, self.lengths[:batch])
        hidden = self.decoder(x, context)
        logits = self.decoder.logits(hidden[0])
        if sampler is not None:
            self.ids[:batch] = sampler(logits, slice(0, batch))
        return logits

    def _step_inputs_in_torch(
        self, batch: int, tables: dict[Window, Tensor]
    ) -> tuple[Tensor, Rotation, dict[Window, Tensor]]:
        lengths = self.lengths[:batch]
        lengths += lengths > 0
        positions = (lengths - 1).clamp(min=0).long()
        slots = {
            window: torch.where(lengths > 0, slots_of(table, positions[:, None])[:, 0], -1)
            for window, table in tables.items()
        }
        rotation = self.decoder.rotation(positions[None])
        return self.decoder.embed(self.ids[None, :batch]), rotation, slots

    @cached_property
    def _rotation(self) -> Rotation:
        """Rotation of every position that a row may reach: two tensors [positions, D]."""
        positions = torch.arange(self._tables.shape[2] * PAGE_SIZE, device=self.device)
        cos, sin = self.decoder.rotation(positions[None])
        return cos[0, :, 0], sin[0, :, 0]

    def _capture(self, batch: int, sampler: Sampler | None) -> tuple[Any, Tensor]:
        state = [self.ids, self.lengths, *([] if sampler is None else sampler.state())]
        before = [x.clone() for x in state]
        # With lengths of 0 no row is used: a step that only runs to be captured changes no state.
        self.lengths.zero_()
        recorded = self._record(lambda: self._step(batch, sampler))
        for x, old in zip(state, before, strict=True):
            x.copy_(old)
        return recorded

    def _record(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        """Return a CUDA graph of `run`, and the tensors that hold its result."""
        graph, result = record(self.decoder, run, self._pool)
        self._recorders.add(self.decoder.recorder)
        self._pool = graph.pool()
        return graph, result


def supports(decoder: Decoder) -> bool:
    """Whether an `Engine` can run a decoder: on one device, with a rotation that is independent of
    the sequence's length."""
    devices = {parameter.device for parameter in decoder.parameters()}
    return len(devices) == 1 and not decoder.rope.depends_on_length
