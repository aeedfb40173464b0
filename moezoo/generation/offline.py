"""Offline generation: many prompts in, one completion each out.

A moezoo model completes them by continuous batching, as long as the settings are what its engine
does; another model, or other settings, by `model.generate` on one batch after the other.
"""

import copy
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import jinja2
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from moezoo.errors import MoEOutOfMemoryError
from moezoo.generation.continuous import Batcher, Request, is_out_of_memory
from moezoo.generation.engine import (
    CHUNK_TOKENS,
    Engine,
    EngineKeeper,
    rows_and_pages_that_fit,
    supports,
)
from moezoo.generation.sampling import Sampler, SeededDraw, uniforms, warpers
from moezoo.generation.turns import largest, limited
from moezoo.layers.decoder import Decoder

Messages = Sequence[Mapping[str, Any]]

DEFAULT_MAX_NEW_TOKENS = 256

DEFAULT_BATCH_SIZE = 8

MAX_CONTEXT = 2**17
"""Tokens of a text where the config sets no limit."""

_IN_ENGINE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_strings")

# Sampling settings as a greedy run has them; others make transformers warn that they go unused.
_NEUTRAL = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


@dataclass(frozen=True)
class Prompt:
    """What one completion starts from: a text, or chat messages with `role` and `content`."""

    id: int | str
    prompt: str | Messages

    @classmethod
    def from_record(cls, record: Mapping[str, Any], default_id: int) -> "Prompt":
        """Read `{"id": ..., "prompt": ...}` or `{"id": ..., "messages": [...]}`.

        Other keys are ignored.

        Raises:
            ValueError: a key is missing, given twice or of the wrong type.
        """
        id = default_id if record.get("id") is None else record["id"]
        if not (_is_integer(id) or isinstance(id, str)):
            raise ValueError(f"id must be a string or an integer, got {id!r}")
        prompt, messages = record.get("prompt"), record.get("messages")
        if (prompt is None) == (messages is None):
            raise ValueError(
                f'one of "prompt" and "messages" is needed, got the keys {sorted(record)}'
            )
        if messages is None:
            if not isinstance(prompt, str):
                raise ValueError(f'"prompt" must be a string, got {type(prompt).__name__}')
            return cls(id, prompt)
        if not (
            isinstance(messages, list | tuple)
            and messages
            and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages)
        ):
            raise ValueError('"messages" must be a non-empty list of objects with a "role"')
        return cls(id, messages)


@dataclass(frozen=True)
class Completion:
    """The completion of one prompt.

    `token_ids` end before the end-of-sequence token; `text` ends before the stop string.
    `finish_reason` is "stop" (the model ended, or a stop string came), "length" (`max_new_tokens`
    or the model's context is used up) or "error": this prompt alone failed, `error` says why.
    """

    id: int | str
    prompt: str | Messages
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "error"]
    num_prompt_tokens: int
    error: str | None = None


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str | Mapping[str, Any] | Prompt],
    *,
    generation_config: GenerationConfig | None = None,
    batch_size: int | None = None,
    batch_tokens: int = CHUNK_TOKENS,
    cache_bytes: int | None = None,
    seed: int | None = None,
    chat: bool = False,
    streamer: BaseStreamer | None = None,
    **overrides: Any,
) -> Iterator[Completion]:
    """Complete every prompt and yield the results as they finish, in whatever order.

    Prompts are read as they are needed. A prompt that cannot be completed (longer than the model's
    context or the whole KV cache, empty without a token to begin with, refused by the chat
    template) gives a completion with `finish_reason="error"`; the others go on. Prompts that begin
    with the same tokens compute them once.

    A model of moezoo runs with continuous batching: greedy or sampled, with `temperature`, `top_k`,
    `top_p`, `min_p`, `repetition_penalty` and `stop_strings`. Other settings, other models and
    streamers go through `model.generate`, batch by batch in the order of the prompts.

    Where experts are divided over ranks, every rank calls this and takes all completions. With
    dispatch="all_gather" ranks have the same prompts and get the same completions, those that the
    first one draws; with "all_to_all" each has prompts of its own, perhaps none, and its iterator
    ends when those of all have.

    Args:
        model: any transformers causal language model.
        tokenizer: its tokenizer.
        prompts: texts, records as `Prompt.from_record` reads them (the position is the default
            id), or `Prompt`s. Messages go through the tokenizer's chat template.
        generation_config: as in transformers; what it leaves unset comes from
            `model.generation_config`. `max_new_tokens` is 256 where neither sets it.
        batch_size: the most prompts at once; by default 256 on a GPU and 8 on a CPU or where
            batches go through `model.generate`.
        batch_tokens: the most prompt tokens in one forward pass; longer prompts take several.
        cache_bytes: memory of the KV cache; by default what is free on a GPU but for room for a
            forward pass, and 4 GiB at most on a CPU.
        seed: makes sampling repeatable: each prompt draws from its own stream of random numbers,
            which depends on the seed and the prompt's id alone, not on the batch it is in. (The
            logits themselves may differ in the last bit between batches, which can tip a draw.)
            None samples from torch's global random state.
        chat: wrap texts as the user's message of a chat.
        streamer: receives tokens as they come; needs `batch_size=1`.
        **overrides: fields of `GenerationConfig`, such as `max_new_tokens`, `do_sample`,
            `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `stop_strings`.

    Raises:
        ValueError: an option is unknown, out of range or contradicts another, a prompt is
            malformed, or `chat` is asked of a tokenizer without a chat template.
        ExpertMapError: ranks that have to have the same prompts have not.
        RankError: another rank died, hangs or failed.
        MoEOutOfMemoryError: one prompt alone does not fit the device; says what needs less.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("batch_tokens", batch_tokens),
        ("cache_bytes", cache_bytes),
    ):
        if value is not None and (not _is_integer(value) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if seed is not None and not _is_integer(seed):
        raise ValueError(f"seed must be an integer, or None to draw anew each time, got {seed!r}")
    if streamer is not None and batch_size != 1:
        raise ValueError(f"a streamer needs batch_size=1, got batch_size={batch_size}")
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {model.config.name_or_path!r} has no chat template; "
            "leave chat off, or set tokenizer.chat_template"
        )
    config = _resolve(model, tokenizer, generation_config, overrides)
    if seed is not None and config.do_sample and config.num_beams > 1:
        raise ValueError(f"seed needs num_beams=1, got num_beams={config.num_beams}")
    texts = _Texts(model, tokenizer, config, chat)
    given = (_as_prompt(item, index) for index, item in enumerate(prompts))
    if streamer is None and _in_engine(model, config):
        rows = batch_size or (256 if model.device.type == "cuda" else DEFAULT_BATCH_SIZE)
        if isinstance(prompts, Sized):
            rows = max(1, min(rows, len(prompts)))
        rows = limited(model.decoder, rows)
        batch_tokens = limited(model.decoder, batch_tokens)
        continuous = _ContinuousGenerator(texts, seed, rows, batch_tokens, cache_bytes)
        return continuous.run(given)
    peers = getattr(getattr(model, "decoder", None), "peers", None)
    if peers is not None and not peers.alike:
        raise ValueError(
            "a streamer, and settings that moezoo's engine does not do (it has greedy search and "
            f"sampling with {', '.join(_IN_ENGINE)}), need one process, or dispatch='all_gather': "
            "with 'all_to_all' each rank has prompts of its own"
        )
    batches = _BatchGenerator(texts, seed, streamer)
    return batches.run(given, batch_size or DEFAULT_BATCH_SIZE)


def _in_engine(model: PreTrainedModel, config: GenerationConfig) -> bool:
    """Whether the engine runs this model and does all that these settings ask for."""
    decoder = getattr(model, "decoder", None)
    if not isinstance(decoder, Decoder) or not supports(decoder) or config.num_beams != 1:
        return False
    if config.max_time is not None or config.cache_implementation not in (None, "dynamic"):
        return False
    generation_mode = config.get_generation_mode()
    if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return False
    # Some processors are made only where there are end-of-text tokens, or a prompt.
    config = copy.deepcopy(config)
    model._prepare_special_tokens(config, device="cpu")
    processors = model._get_logits_processor(
        config, input_ids_seq_length=1, encoder_input_ids=torch.zeros(1, 1).long(), device="cpu"
    )
    return {type(processor) for processor in processors} <= set(Sampler.PROCESSORS)


@dataclass(frozen=True)
class _Texts:
    """Prompts to tokens, and tokens to completions."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    chat: bool

    def encode(self, prompt: Prompt) -> tuple[list[int], int] | Completion:
        """The prompt's tokens and how many may follow; or its completion, if none can."""
        try:
            ids = encode(self.tokenizer, prompt, chat=self.chat)
        except (ValueError, jinja2.TemplateError) as error:
            return self.failed(prompt, 0, str(error))
        limit: int = self.config.max_new_tokens
        context = context_length(self.model) or MAX_CONTEXT
        limit = min(limit, context - len(ids))
        if limit < 1:
            too_long = (
                f"the prompt has {len(ids)} tokens and the model's context is {context}; "
                "shorten it to leave room for at least one more"
            )
            return self.failed(prompt, len(ids), too_long)
        return ids, limit

    def failed(self, prompt: Prompt, num_tokens: int, error: str) -> Completion:
        return Completion(prompt.id, prompt.prompt, "", (), "error", num_tokens, error=error)

    @property
    def ends(self) -> set[int]:
        return set(_as_list(self.config.eos_token_id))

    @property
    def stop_strings(self) -> list[str]:
        return _as_list(self.config.stop_strings)

    def has_stop(self, ids: list[int], new_ids: list[int]) -> bool:
        """Whether a stop string is in the text of the newest tokens."""
        # A character may take four tokens; a few more for those that write nothing.
        tail = new_ids[-4 * max(map(len, self.stop_strings)) - 8 :]
        near: str = self.tokenizer.decode(tail, skip_special_tokens=True)
        if not any(string in near for string in self.stop_strings):
            return False
        text = self.text(ids, new_ids)
        return any(string in text for string in self.stop_strings)

    def complete(
        self, prompt: Prompt, ids: list[int], new_ids: list[int], *, stopped: bool
    ) -> Completion:
        """`new_ids` without a token that ends the text, which is what `stopped` says came after."""
        text = self.text(ids, new_ids)
        if cuts := [text.index(string) for string in self.stop_strings if string in text]:
            stopped = True
            # the fewest tokens whose text holds a stop string
            stop = bisect_left(
                range(len(new_ids)),
                True,
                key=lambda n: any(s in self.text(ids, new_ids[:n]) for s in self.stop_strings),
            )
            new_ids, text = new_ids[:stop], text[: min(cuts)]
        return Completion(
            id=prompt.id,
            prompt=prompt.prompt,
            text=text,
            token_ids=tuple(new_ids),
            finish_reason="stop" if stopped else "length",
            num_prompt_tokens=len(ids),
        )

    def text(self, ids: list[int], new_ids: list[int]) -> str:
        # Decoded alone, a sentencepiece tokenizer would drop the space before the first new word.
        before: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        whole: str = self.tokenizer.decode([*ids, *new_ids], skip_special_tokens=True)
        if whole.startswith(before):
            return whole[len(before) :]
        return str(self.tokenizer.decode(new_ids, skip_special_tokens=True))


@dataclass(frozen=True)
class _ContinuousGenerator:
    """`generate` on moezoo's engine."""

    texts: _Texts
    seed: int | None
    batch_size: int
    batch_tokens: int
    cache_bytes: int | None

    def run(self, prompts: Iterator[Prompt]) -> Iterator[Completion]:
        """Nothing is allocated before the first completion is asked for."""
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
        keeper = getattr(model, "_engines", None)
        if isinstance(keeper, EngineKeeper):
            keeper.release()
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


@dataclass(frozen=True)
class _BatchGenerator:
    """`generate` by `model.generate`, on so many prompts at a time."""

    texts: _Texts
    seed: int | None
    streamer: BaseStreamer | None

    def run(self, prompts: Iterator[Prompt], batch_size: int) -> Iterator[Completion]:
        while batch := list(islice(prompts, batch_size)):
            try:
                completions = self._complete(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise MoEOutOfMemoryError(
                    f"{error}\n{_prompts(len(batch))} at once is too much for "
                    f"{self.texts.model.device}: "
                    + (
                        f"a batch size below {len(batch)} needs less"
                        if len(batch) > 1
                        else "a shorter prompt or a smaller max_new_tokens needs less"
                    )
                ) from error
            yield from completions

    def _complete(self, prompts: list[Prompt]) -> list[Completion]:
        completions: dict[int, Completion] = {}
        encoded: dict[int, list[int]] = {}
        limits: dict[int, int] = {}
        for row, prompt in enumerate(prompts):
            found = self.texts.encode(prompt)
            if isinstance(found, Completion):
                completions[row] = found
            else:
                encoded[row], limits[row] = found
        # Rows that would run over the context stop earlier, so each limit is a batch of its own.
        for limit in sorted(set(limits.values()), reverse=True):
            rows = [row for row in encoded if limits[row] == limit]
            new_ids = self._generate(
                [prompts[row].id for row in rows], [encoded[row] for row in rows], limit
            )
            ends = {self.texts.config.pad_token_id, *self.texts.ends}
            for row, ids in zip(rows, new_ids, strict=True):
                stop = next((i for i, token in enumerate(ids) if token in ends), None)
                completions[row] = self.texts.complete(
                    prompts[row], encoded[row], ids[:stop], stopped=stop is not None
                )
        return [completions[row] for row in range(len(prompts))]

    def _generate(
        self, prompt_ids: list[int | str], rows: list[list[int]], num_new_tokens: int
    ) -> list[list[int]]:
        """The new tokens of each row, whatever follows the end of a row still among them."""
        model = self.texts.model
        config = copy.deepcopy(self.texts.config)
        length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), length), config.pad_token_id or 0)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, length - len(ids) :] = torch.tensor(ids)
            attention_mask[row, length - len(ids) :] = 1
        config.max_new_tokens = num_new_tokens
        arguments: dict[str, Any] = {}
        if config.stop_strings is not None:
            arguments["tokenizer"] = self.texts.tokenizer
        if self.streamer is not None:
            arguments["streamer"] = self.streamer
        if config.do_sample and self.seed is not None:
            numbers = torch.tensor(
                [uniforms(self.seed, id, num_new_tokens) for id in prompt_ids],
                dtype=torch.float64,
                device=model.device,
            )
            draw = SeededDraw(self.texts.config, numbers, length)
            arguments["logits_processor"] = LogitsProcessorList([draw])
            config.update(do_sample=False, **_NEUTRAL)
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
            **arguments,
        )
        new_ids: list[list[int]] = output[:, length:].tolist()
        return new_ids


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool = False) -> list[int]:
    """The tokens of a prompt; of an empty one the first token that a text can have.

    Messages, and with `chat` texts too, go through the tokenizer's chat template.

    Raises:
        ValueError: there is no template, no first token, or the text is not valid Unicode.
        jinja2.TemplateError: the template refuses the messages.
    """
    messages: Messages
    if isinstance(prompt.prompt, str):
        if not chat:
            return _ids(tokenizer, prompt.prompt) or [_first_token(tokenizer)]
        messages = [{"role": "user", "content": prompt.prompt}]
    elif tokenizer.chat_template is None:
        raise ValueError("the prompt holds messages but the tokenizer has no chat template")
    else:
        messages = prompt.prompt
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    # the template writes the special tokens itself
    return _ids(tokenizer, text, add_special_tokens=False)


def _ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    text.encode()  # a lone surrogate raises here, and names itself
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids)


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the prompt is empty and the tokenizer has no beginning- or end-of-text token")


def _prompts(number: int) -> str:
    return "1 prompt" if number == 1 else f"{number} prompts"


def check_options(**options: Any) -> None:
    """Raise `ValueError` for fields of `GenerationConfig` that are out of range."""
    _check(GenerationConfig(**options))


def _check(config: GenerationConfig) -> None:
    if config.do_sample:
        warpers(config, torch.device("cpu"))  # each refuses what it cannot do
    penalty = config.repetition_penalty
    if penalty is not None and not 0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty must be above 0 and finite, got {penalty}")
    if config.num_beams is not None and config.num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {config.num_beams}")
    for string in _as_list(config.stop_strings):
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop_strings must be texts that are not empty, got {string!r}")


def _as_prompt(item: str | Mapping[str, Any] | Prompt, index: int) -> Prompt:
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        return Prompt(index, item)
    if isinstance(item, Mapping):
        try:
            return Prompt.from_record(item, default_id=index)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
    raise ValueError(f"prompt {index} must be a string, a mapping or a Prompt, got {type(item)}")


def _resolve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    overrides: dict[str, Any],
) -> GenerationConfig:
    """Every field set: from the overrides, else the config given, else the model's own."""
    given = GenerationConfig() if generation_config is None else generation_config
    if given.max_length is not None or overrides.get("max_length") is not None:
        raise ValueError("max_length counts prompt and completion together; use max_new_tokens")
    config, _ = model._prepare_generation_config(given)
    if unknown := config.update(**overrides):
        raise ValueError(f"unknown generation options: {', '.join(sorted(unknown))}")
    config.max_length = None
    if config.max_new_tokens is None:
        config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    if config.num_return_sequences != 1:
        raise ValueError(
            "num_return_sequences must be 1, every prompt gets one completion; "
            f"got {config.num_return_sequences}"
        )
    if config.pad_token_id is None:
        known = [tokenizer.pad_token_id, *_as_list(config.eos_token_id)]
        config.pad_token_id = next((token for token in known if token is not None), None)
    _check(config)
    return config


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens a text may have, if the config says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, int | str) else list(value)
