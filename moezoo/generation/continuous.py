"""Continuous batching (Yu et al., 2022): a prompt begins as soon as a row and pages are free.

The host reads the tokens of a step while the next one runs. By the time it sees that a sequence has
ended, one token more has been computed, which is dropped.
"""

import heapq
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from moezoo.device import HostCopies, is_out_of_memory, to_device
from moezoo.generation.engine import Engine
from moezoo.generation.graphs import batch_size
from moezoo.generation.pages import PAGE_SIZE, Allocation, PageAllocator
from moezoo.generation.prompts import Chunk, in_chunks, passes
from moezoo.generation.sampling import Sampler

MIN_CHUNK = 256
"""The fewest prompt tokens to which forward passes shrink when memory runs out."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """One prompt, and the tokens generated for it so far.

    `limit` is the most tokens to generate, 1 or more; `stream` has the uniform numbers of a seeded
    draw. `finish_reason` is set at the end: "stop", "length" or "error".
    """

    index: int
    prompt: list[int]
    limit: int
    stream: Sequence[float] = ()
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    _row: int | None = None
    _allocation: Allocation | None = None
    _num_launched: int = 0
    """Number of new tokens that are computed or being computed."""

    @property
    def written(self) -> list[int]:
        """Return the prompt's tokens and those generated so far."""
        return self.prompt + self.tokens


class Batcher:
    """Runs requests on an engine, which nothing else uses meanwhile.

    Args:
        ends: ids of end-of-text tokens, which are not kept.
        is_stopped: called after each new token of a request; True ends it.
    """

    def __init__(
        self,
        engine: Engine,
        sampler: Sampler,
        *,
        ends: set[int],
        is_stopped: Callable[[Request], bool] | None = None,
    ) -> None:
        self.engine = engine
        self.sampler = sampler
        self.ends = ends
        self.is_stopped = is_stopped
        self.chunk = engine.chunk
        self._pages = PageAllocator(engine.pages, share=engine.shares)
        self._waiting: deque[Request] = deque()
        self._rows: dict[int, Request] = {}
        self._num_rows = engine.num_rows
        self._free = list(range(engine.num_rows))
        self._on_device = engine.device.type == "cuda"
        self._in_flight: deque[tuple[HostCopies, list[Request | None]]] = deque()

    def run(self, requests: Iterator[Request]) -> Iterator[Request]:
        """Yield each request as it finishes; `requests` are read as rows become free."""
        self.engine.stop(range(self.engine.num_rows))  # of a run that was left halfway
        while True:
            missing = max(self._min_free_rows(), len(self._free)) - len(self._waiting)
            self._waiting.extend(islice(requests, max(0, missing)))
            if not (self._waiting or self._rows or self._in_flight):
                return
            admitted = False
            try:
                yield from self._admit()
                admitted = True
                launched = self._step()
            except (RuntimeError, MemoryError) as error:
                # Ranks cannot recover alone: the others wait in the middle of a forward pass.
                if not is_out_of_memory(error) or self.engine.peers is not None:
                    raise
                yield from self._collect_all()
                if not self._shrink(in_prefill=not admitted):
                    raise
                continue
            while len(self._in_flight) > int(launched and self._on_device):
                yield from self._collect()

    def _min_free_rows(self) -> int:
        """Number of free rows from which a prefill is worth interrupting the running rows."""
        return max(1, self._num_rows // 16)

    def _admit(self) -> Iterator[Request]:
        """Start waiting requests of up to `chunk` tokens; yield those that can never fit."""
        if not self._waiting or len(self._free) < min(self._min_free_rows(), len(self._waiting)):
            return
        started: list[Request] = []
        budget = self.chunk
        while self._waiting and self._free and budget > 0:
            request = self._waiting[0]
            tokens = request.written
            # The last new token is never put into the cache.
            kept = len(request.prompt) + request.limit - 1
            if kept > self._pages.total * PAGE_SIZE:
                self._waiting.popleft()
                request.finish_reason = "error"
                request.error = (
                    f"{kept} tokens of prompt and completion do not fit the KV cache of "
                    f"{self._pages.total * PAGE_SIZE}: shorten the prompt or max_new_tokens, or "
                    "give the cache more memory (cache_bytes)"
                )
                yield request
                continue
            allocation = self._pages.allocate(tokens, kept)
            if allocation is None:
                break
            budget -= len(tokens) - allocation.num_cached
            if budget < 0 and started:
                self._pages.release(allocation)
                break
            self._waiting.popleft()
            request._row, request._allocation = heapq.heappop(self._free), allocation
            self._rows[request._row] = request
            started.append(request)
        if started:
            self._prefill(started)

    def _prefill(self, requests: list[Request]) -> None:
        chunks: list[Chunk] = []
        for request in requests:
            assert request._row is not None and request._allocation is not None
            self.engine.assign(request._row, request._allocation.pages)
            start = request._allocation.num_cached
            chunks += in_chunks(request._row, request.written, self.chunk, start=start)
        for taken in passes(chunks, self.chunk):
            self._prefill_chunks(taken)

    def _prefill_chunks(self, chunks: list[Chunk]) -> None:
        logits = self.engine.prefill(chunks)
        whole = []
        for i, chunk in enumerate(chunks):
            request = self._rows[chunk.row]
            tokens = request.written
            if chunk.end == len(tokens):
                assert request._allocation is not None
                self._pages.written(request._allocation)
                step = len(request.tokens)
                self.sampler.start(chunk.row, tokens, request.stream, step=step)
                whole.append(i)
        if not whole:
            return
        rows = [chunks[i].row for i in whole]
        if len(whole) < len(chunks):
            logits = logits[to_device(torch.tensor(whole), logits.device)]
        drawn = self.sampler(logits, to_device(torch.tensor(rows), logits.device))
        self.engine.start(rows, [chunks[i].end for i in whole], drawn)
        self._read_later(drawn, rows)

    def _step(self) -> bool:
        """Compute one more token for every row; return whether there was a row."""
        if not self._rows:
            return False
        self._compact()
        highest = max(self._rows) + 1
        batch = min(batch_size(highest), self.engine.num_rows) if self._on_device else highest
        self.engine.step(batch, self.sampler)
        self._read_later(self.engine.ids[:batch], range(batch))
        return True

    def _read_later(self, tokens: Tensor, rows: Sequence[int]) -> None:
        """Start copying the new tokens of rows to the host; free rows that reach their limit."""
        requests = [self._rows.get(row) for row in rows]
        self._in_flight.append((HostCopies(tokens), requests))
        done = []
        for request in requests:
            if request is not None:
                request._num_launched += 1
                if request._num_launched == request.limit:
                    done.append(request)
        self._free_rows(done)

    def _free_rows(self, requests: list[Request]) -> None:
        rows = [request._row for request in requests if request._row is not None]
        if not rows:
            return
        self.engine.stop(rows)
        for request in requests:
            if request._row is not None:
                del self._rows[request._row]
                heapq.heappush(self._free, request._row)
                request._row = None

    def _collect(self) -> Iterator[Request]:
        """Read the oldest tokens that are being copied; yield the requests that they finish."""
        copies, requests = self._in_flight.popleft()
        (tokens,) = copies.wait()
        finished = []
        for request, token in zip(requests, tokens.tolist(), strict=True):
            if request is None or request.finish_reason is not None:
                continue
            if token in self.ends:
                request.finish_reason = "stop"
            else:
                request.tokens.append(token)
                if self.is_stopped is not None and self.is_stopped(request):
                    request.finish_reason = "stop"
                elif len(request.tokens) == request.limit:
                    request.finish_reason = "length"
            if request.finish_reason is not None:
                assert request._allocation is not None
                self._pages.release(request._allocation)
                finished.append(request)
        self._free_rows(finished)
        yield from finished

    def _collect_all(self) -> Iterator[Request]:
        while self._in_flight:
            yield from self._collect()

    def _compact(self) -> None:
        """Move the used rows to the front if that makes the batch smaller."""
        number, highest = len(self._rows), max(self._rows) + 1
        if self._on_device and batch_size(number) == batch_size(highest):
            return
        targets = [row for row in range(number) if row not in self._rows]
        if not targets:
            return
        sources = sorted(row for row in self._rows if row >= number)
        self.engine.move(sources, targets, self.sampler.state())
        for source, target in zip(sources, targets, strict=True):
            request = self._rows.pop(source)
            request._row = target
            self._rows[target] = request
        self._free = [row for row in range(self._num_rows) if row not in self._rows]

    def _shrink(self, *, in_prefill: bool) -> bool:
        """Restart all rows after memory ran out, with shorter chunks or fewer rows.

        Returns False where neither can shrink further.
        """
        running = sorted(self._rows.values(), key=lambda request: request.index)
        if self.chunk > MIN_CHUNK and (in_prefill or len(running) <= 1):
            self.chunk = max(MIN_CHUNK, self.chunk // 2)
        elif len(running) > 1:
            self._num_rows = len(running) // 2
        else:
            # With no row left there is nothing to restart: the last one has just ended.
            return not running
        self._free_rows(running)
        for request in reversed(running):
            assert request._allocation is not None
            self._pages.release(request._allocation)
            request._allocation = None
            request._num_launched = len(request.tokens)
            self._waiting.appendleft(request)
        self._free = list(range(self._num_rows))
        _log.warning(
            "out of memory: going on with at most %d prompts at once and %d prompt tokens in a "
            "forward pass",
            self._num_rows,
            self.chunk,
        )
        return True
