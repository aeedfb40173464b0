"""The engine that a model keeps from one call to the next, as long as it is still the model's."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn

from moezoo.device import free_bytes
from moezoo.generation.engine import Engine
from moezoo.generation.graphs import batch_size, captures_steps
from moezoo.generation.memory import row_bytes
from moezoo.generation.pages import num_pages
from moezoo.generation.turns import largest, limited
from moezoo.layers.decoder import Decoder

KEPT_BYTES = 4 * 2**30
"""The largest KV cache that is kept between two calls of `model.generate`."""


class EngineKeeper:
    """Keeps a model's engine, and with it the graphs of its steps, from one call to the next.

    One call has it at a time: another thread's gets one of its own, and what a call leaves behind
    that fails is not used again. Nor is that of a decoder with modules of others, adapters for
    instance: a switch of theirs may change what a step does. A copy of the model gets a keeper of
    its own.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._engine: Engine | None = None
        self._made_for: tuple[int, ...] = ()

    def __deepcopy__(self, memo: object) -> "EngineKeeper":
        return EngineKeeper()

    def __reduce__(self) -> tuple[type["EngineKeeper"], tuple[()]]:
        return EngineKeeper, ()

    def release(self) -> None:
        """Give back the memory of the engine that is kept."""
        with self._lock:
            self._engine = None

    def has_room(self, decoder: Decoder, rows: int, context: int) -> bool:
        """Whether the GPU has memory for `rows` rows of `context` tokens, and some to spare."""
        with self._lock:
            kept = 0 if self._engine is None else self._engine.cache.nbytes
        return rows * row_bytes(decoder, context) <= 0.9 * (
            free_bytes(decoder.embed.weight.device) + kept
        )

    @contextmanager
    def engine(self, decoder: Decoder, rows: int, context: int) -> Iterator[Engine]:
        """An engine with the number of rows that `rows` take, with pages for `context` in each."""
        # Rows that fill up a batch are tokens as well.
        size, pages = max(rows, limited(decoder, batch_size(rows))), rows * num_pages(context)
        made_for = fingerprint(decoder)
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is None or made_for != self._made_for:
                engine = None
            elif engine.num_rows != size or engine.context < context or engine.pages < pages:
                engine = None  # its memory may be needed
        # A rank that records steps would wait for those that have them.
        (anew,) = largest(decoder, engine is None)
        if anew:
            engine = None
        if engine is None:
            room = 2 ** max(9, (context - 1).bit_length())
            if size * row_bytes(decoder, room) <= KEPT_BYTES:
                engine = Engine(decoder, num_rows=size, context=room)
            else:  # it will not be kept, and all memory may be needed
                engine = Engine(decoder, num_rows=size, context=context, pages=pages)
        engine.captures = captures_steps(decoder)
        yield engine
        if engine.cache.nbytes <= KEPT_BYTES and not has_modules_of_others(decoder):
            with self._lock:
                self._engine, self._made_for = engine, made_for


def has_modules_of_others(decoder: nn.Module) -> bool:
    """Whether there are modules of other packages, of whose state `fingerprint` sees too little."""
    packages = {type(module).__module__.partition(".")[0] for module in decoder.modules()}
    return not packages <= {"moezoo", "torch"}


def fingerprint(decoder: nn.Module) -> tuple[int, ...]:
    """Other numbers once a module or the memory of a tensor is another: old graphs are stale."""
    modules = (id(module) for module in decoder.modules())
    tensors = itertools.chain(decoder.parameters(), decoder.buffers())
    return (*modules, *(tensor.data_ptr() for tensor in tensors))
