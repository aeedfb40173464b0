"""The engine that a model keeps between calls of `generate`."""

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
"""Size of the largest KV cache that is kept between two calls of `model.generate`."""


class EngineKeeper:
    """Keeps a model's engine, with its KV cache and CUDA graphs, from one call to the next.

    One call uses it at a time: a call in another thread makes an engine of its own. The engine of a
    call that fails is not kept, nor that of a decoder with modules of other packages, such as
    adapters, whose switches may change what a step computes. A copy of the model gets a keeper of
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
        """Drop the engine that is kept, and with it its memory."""
        with self._lock:
            self._engine = None

    def has_room(self, decoder: Decoder, rows: int, context: int) -> bool:
        """Whether `rows` rows of `context` tokens take at most 90 % of the GPU's free memory, the
        kept cache included."""
        with self._lock:
            kept = 0 if self._engine is None else self._engine.cache.nbytes
        return rows * row_bytes(decoder, context) <= 0.9 * (
            free_bytes(decoder.embed.weight.device) + kept
        )

    @contextmanager
    def engine(self, decoder: Decoder, rows: int, context: int) -> Iterator[Engine]:
        """Lend an engine for at least `rows` rows of up to `context` tokens: the kept one, or new.

        It may have more rows, since graphs are made for few sizes of batch. It is kept afterwards
        if the block raises nothing and its cache takes at most `KEPT_BYTES`.
        """
        # The rows that pad a batch count towards the ranks' limit of tokens.
        size, pages = max(rows, limited(decoder, batch_size(rows))), rows * num_pages(context)
        made_for = fingerprint(decoder)
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is None or made_for != self._made_for:
                engine = None
            elif engine.num_rows != size or engine.context < context or engine.pages < pages:
                engine = None  # its memory may be needed
        # If one rank makes a new engine, all do: capturing steps takes all of them.
        (anew,) = largest(decoder, engine is None)
        if anew:
            engine = None
        if engine is None:
            room = 2 ** max(9, (context - 1).bit_length())
            if size * row_bytes(decoder, room) <= KEPT_BYTES:
                engine = Engine(decoder, num_rows=size, context=room)
            else:  # too large to be kept: make it no larger than this call needs
                engine = Engine(decoder, num_rows=size, context=context, pages=pages)
        engine.captures = captures_steps(decoder)
        yield engine
        if engine.cache.nbytes <= KEPT_BYTES and not has_modules_of_others(decoder):
            with self._lock:
                self._engine, self._made_for = engine, made_for


def has_modules_of_others(decoder: nn.Module) -> bool:
    """Whether a module is from a package other than moezoo and torch.

    `fingerprint` does not see all state of such modules.
    """
    packages = {type(module).__module__.partition(".")[0] for module in decoder.modules()}
    return not packages <= {"moezoo", "torch"}


def fingerprint(decoder: nn.Module) -> tuple[int, ...]:
    """Return numbers that change when a module or a tensor's memory is replaced.

    CUDA graphs that were captured before are then stale.
    """
    modules = (id(module) for module in decoder.modules())
    tensors = itertools.chain(decoder.parameters(), decoder.buffers())
    return (*modules, *(tensor.data_ptr() for tensor in tensors))
