"""Offline generation: many prompts in, one completion each out, in input order.

Legend: B prompts of a batch, T prompt tokens, V vocabulary.
"""

import copy
import json
import math
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any, Literal

import jinja2
import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from moezoo.errors import MoEOutOfMemoryError

Messages = Sequence[Mapping[str, Any]]

DEFAULT_MAX_NEW_TOKENS = 256

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


class SeededDraw(LogitsProcessor):
    """Sample from a table of uniform numbers instead of the global random state.

    Applies the warpers of `config`, draws by inverting the cumulative distribution in float64, and
    leaves the drawn token as the only one with a finite score, so that a greedy loop picks it.

    Args:
        config: resolved sampling settings.
        uniforms: float64 [B, steps] in [0, 1), on the device of the scores.
        prompt_length: number of columns of `input_ids` at the first step, padding included.
    """

    def __init__(
        self, config: GenerationConfig, uniforms: torch.Tensor, prompt_length: int
    ) -> None:
        self.warpers = _warpers(config, uniforms.device)
        self.uniforms = uniforms
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] -> [B, V], zero at the drawn token and -inf elsewhere."""
        cumulative = self.warpers(input_ids, scores).softmax(-1, dtype=torch.float64).cumsum(-1)
        step = input_ids.shape[1] - self.prompt_length
        target = self.uniforms[:, step, None] * cumulative[:, -1:]
        # right=True: the first token whose cumulative probability exceeds the target, so never one
        # of probability zero
        token = torch.searchsorted(cumulative, target, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str | Mapping[str, Any] | Prompt],
    *,
    generation_config: GenerationConfig | None = None,
    batch_size: int = 8,
    seed: int | None = None,
    chat: bool = False,
    streamer: BaseStreamer | None = None,
    **overrides: Any,
) -> Iterator[Completion]:
    """Complete every prompt and yield the results in the order of the prompts.

    Prompts are read as they are needed, `batch_size` at a time. A prompt that cannot be completed
    (longer than the model's context, empty without a token to begin with, refused by the chat
    template) gives a completion with `finish_reason="error"`; the others go on.

    Args:
        model: any transformers causal language model.
        tokenizer: its tokenizer.
        prompts: texts, records as `Prompt.from_record` reads them (the position is the default
            id), or `Prompt`s. Messages go through the tokenizer's chat template.
        generation_config: as in transformers; what it leaves unset comes from
            `model.generation_config`. `max_new_tokens` is 256 where neither sets it.
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
        MoEOutOfMemoryError: a batch does not fit the device; says what needs less.
    """
    if not _is_integer(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
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
    batch = _BatchGenerator(model, tokenizer, config, seed, chat, streamer)
    return batch.run((_as_prompt(item, index) for index, item in enumerate(prompts)), batch_size)


@dataclass(frozen=True)
class _BatchGenerator:
    """`generate` after its arguments are checked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    seed: int | None
    chat: bool
    streamer: BaseStreamer | None

    def run(self, prompts: Iterator[Prompt], batch_size: int) -> Iterator[Completion]:
        while batch := list(islice(prompts, batch_size)):
            try:
                completions = self._complete(batch)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                raise MoEOutOfMemoryError(
                    f"{error}\n{_prompts(len(batch))} at once is too much for {self.model.device}: "
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
        for row, prompt in enumerate(prompts):
            try:
                encoded[row] = encode(self.tokenizer, prompt, chat=self.chat)
            except (ValueError, jinja2.TemplateError) as error:
                completions[row] = Completion(
                    prompt.id, prompt.prompt, "", (), "error", 0, error=str(error)
                )
        limits = {row: self._num_new_tokens(ids) for row, ids in encoded.items()}
        # Rows that would run over the context stop earlier, so each limit is a batch of its own.
        for limit in sorted(set(limits.values()), reverse=True):
            rows = [row for row in encoded if limits[row] == limit]
            if limit < 1:
                for row in rows:
                    completions[row] = self._too_long(prompts[row], len(encoded[row]))
                continue
            new_ids = self._generate(
                [prompts[row].id for row in rows], [encoded[row] for row in rows], limit
            )
            for row, ids in zip(rows, new_ids, strict=True):
                completions[row] = self._decode(prompts[row], encoded[row], ids)
        return [completions[row] for row in range(len(prompts))]

    def _num_new_tokens(self, ids: list[int]) -> int:
        limit: int = self.config.max_new_tokens
        context = context_length(self.model)
        return limit if context is None else min(limit, context - len(ids))

    def _too_long(self, prompt: Prompt, num_tokens: int) -> Completion:
        error = (
            f"the prompt has {num_tokens} tokens and the model's context is "
            f"{context_length(self.model)}; shorten it to leave room for at least one more"
        )
        return Completion(prompt.id, prompt.prompt, "", (), "error", num_tokens, error=error)

    def _generate(
        self, prompt_ids: list[int | str], rows: list[list[int]], num_new_tokens: int
    ) -> list[list[int]]:
        """The new tokens of each row, whatever follows the end of a row still among them."""
        length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), length), self.config.pad_token_id or 0)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, length - len(ids) :] = torch.tensor(ids)
            attention_mask[row, length - len(ids) :] = 1
        config = copy.deepcopy(self.config)
        config.max_new_tokens = num_new_tokens
        arguments: dict[str, Any] = {}
        if config.stop_strings is not None:
            arguments["tokenizer"] = self.tokenizer
        if self.streamer is not None:
            arguments["streamer"] = self.streamer
        if config.do_sample and self.seed is not None:
            uniforms = torch.tensor(
                [_uniforms(self.seed, id, num_new_tokens) for id in prompt_ids],
                dtype=torch.float64,
                device=self.model.device,
            )
            draw = SeededDraw(self.config, uniforms, length)
            arguments["logits_processor"] = LogitsProcessorList([draw])
            config.update(do_sample=False, **_NEUTRAL)
        output = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=attention_mask.to(self.model.device),
            generation_config=config,
            **arguments,
        )
        new_ids: list[list[int]] = output[:, length:].tolist()
        return new_ids

    def _decode(self, prompt: Prompt, ids: list[int], new_ids: list[int]) -> Completion:
        ends = {self.config.pad_token_id, *_as_list(self.config.eos_token_id)}
        stop = next((i for i, token in enumerate(new_ids) if token in ends), None)
        new_ids = new_ids[:stop]
        text = self._text(ids, new_ids)
        stop_strings = _as_list(self.config.stop_strings)
        if cuts := [text.index(string) for string in stop_strings if string in text]:
            # the fewest tokens whose text holds a stop string
            stop = bisect_left(
                range(len(new_ids)),
                True,
                key=lambda n: any(s in self._text(ids, new_ids[:n]) for s in stop_strings),
            )
            new_ids, text = new_ids[:stop], text[: min(cuts)]
        return Completion(
            id=prompt.id,
            prompt=prompt.prompt,
            text=text,
            token_ids=tuple(new_ids),
            finish_reason="length" if stop is None else "stop",
            num_prompt_tokens=len(ids),
        )

    def _text(self, ids: list[int], new_ids: list[int]) -> str:
        # Decoded alone, a sentencepiece tokenizer would drop the space before the first new word.
        before: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        whole: str = self.tokenizer.decode([*ids, *new_ids], skip_special_tokens=True)
        if whole.startswith(before):
            return whole[len(before) :]
        return str(self.tokenizer.decode(new_ids, skip_special_tokens=True))


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


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether a device has no room; torch's CPU allocator has no class of its own for that."""
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return out_of_memory or "can't allocate memory" in str(error)


def _prompts(number: int) -> str:
    return "1 prompt" if number == 1 else f"{number} prompts"


def check_options(**options: Any) -> None:
    """Raise `ValueError` for fields of `GenerationConfig` that are out of range."""
    _check(GenerationConfig(**options))


def _check(config: GenerationConfig) -> None:
    if config.do_sample:
        _warpers(config, torch.device("cpu"))  # each refuses what it cannot do
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


def _warpers(config: GenerationConfig, device: torch.device) -> LogitsProcessorList:
    """What transformers applies to the logits of a sampled step, in its order."""
    warpers: list[LogitsProcessor] = []
    if config.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_h is not None:
        warpers.append(TopHLogitsWarper(config.top_h))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p not in (None, 1.0):
        warpers.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        warpers.append(MinPLogitsWarper(config.min_p))
    if config.typical_p not in (None, 1.0):
        warpers.append(TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff:
        warpers.append(EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff:
        warpers.append(EtaLogitsWarper(config.eta_cutoff, device=str(device)))
    return LogitsProcessorList(warpers)


def _uniforms(seed: int, prompt_id: int | str, steps: int) -> list[float]:
    digest = sha256(json.dumps([seed, prompt_id]).encode()).digest()
    draw = random.Random(digest)
    return [draw.random() for _ in range(steps)]


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens a text may have, if the config says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, int | str) else list(value)
