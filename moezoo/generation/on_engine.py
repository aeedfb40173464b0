"""Completions by continuous batching, on moezoo's engine."""

from collections.abc import Iterator
from dataclasses import dataclass

from moezoo.device import is_out_of_memory
from moezoo.errors import MoEOutOfMemoryError
from moezoo.generation.continuous import Batcher, Request
from moezoo.generation.engine import Engine
from moezoo.generation.memory import rows_and_pages_that_fit
from moezoo.generation.sampling import Sampler, uniforms
from moezoo.generation.texts import MAX_CONTEXT, Completion, Prompt, Texts, context_length
from moezoo.generation.turns import largest


@dataclass(frozen=True)
class ContinuousGenerator:
    """Completes prompts on moezoo's engine: the fast way of `offline.generate`."""

    texts: Texts
    seed: int | None
    batch_size: int
    batch_tokens: int
    cache_bytes: int | None

    def run(self, prompts: Iterator[Prompt]) -> Iterator[Completion]:
        """Yield completions as they finish; memory is allocated when the first one is asked for."""
        model, config = self.texts.model, self.texts.config
        started: dict[int, Prompt] = {}
        failed: list[Completion] = []
        try:
            engine, sampler = self._engine()
            stops = self.texts.has_stop if self.texts.stop_strings else None
            batcher = Batcher(
                engine,
                sampler,
                ends=self.texts.ends,
                is_stopped=stops and (lambda request: stops(request.prompt, request.tokens)),
            )
            for request in batcher.run(self._requests(prompts, started, failed)):
                yield from failed
                failed.clear()
                yield self._completion(started.pop(request.index), request)
            yield from failed
            engine.finish(sampler)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if model.decoder.peers is not None:
                raise MoEOutOfMemoryError(
                    f"on rank {model.mesh.rank}, without which the others end too: {error}\n"
                    "smaller batch_size, batch_tokens and cache_bytes need less"
                ) from error
            raise MoEOutOfMemoryError(
                f"{error}\n"
                f"one prompt alone is too much for {model.device} beside a KV cache of its size: a "
                f"smaller cache_bytes or max_new_tokens (now {config.max_new_tokens}), or a "
                "shorter prompt, needs less"
            ) from error

    def _engine(self) -> tuple[Engine, Sampler]:
        model, config = self.texts.model, self.texts.config
        decoder = model.decoder
        model.release_engine()
        context = context_length(model) or MAX_CONTEXT
        if decoder.peers is not None:
            decoder.peers.same(batch_tokens=self.batch_tokens, cache_bytes=self.cache_bytes or 0)
        (rows,) = largest(decoder, self.batch_size)
        rows, pages = rows_and_pages_that_fit(
            decoder,
            num_rows=rows,
            context=context,
            chunk=self.batch_tokens,
            cache_bytes=self.cache_bytes,
        )
        engine = Engine(
            decoder, num_rows=rows, context=context, pages=pages, chunk=self.batch_tokens
        )
        sampler = Sampler(
            config,
            num_rows=rows,
            vocab_size=decoder.embed.num_embeddings,
            device=model.device,
            steps=None if self.seed is None else min(config.max_new_tokens, context),
            agreed=None if decoder.peers is None else decoder.peers.chosen,
        )
        return engine, sampler

    def _requests(
        self, prompts: Iterator[Prompt], started: dict[int, Prompt], failed: list[Completion]
    ) -> Iterator[Request]:
        for index, prompt in enumerate(prompts):
            encoded = self.texts.encode(prompt)
            if isinstance(encoded, Completion):
                failed.append(encoded)
                continue
            ids, limit = encoded
            stream: list[float] = []
            if self.seed is not None and self.texts.config.do_sample:
                stream = uniforms(self.seed, prompt.id, limit)
            started[index] = prompt
            yield Request(index, ids, limit, stream)

    def _completion(self, prompt: Prompt, request: Request) -> Completion:
        if request.error is not None:
            return self.texts.failed(prompt, len(request.prompt), request.error)
        return self.texts.complete(
            prompt, request.prompt, request.tokens, stopped=request.finish_reason == "stop"
        )
