"""Prompts and completions, and how their texts become tokens and back."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moezoo.generation.settings import as_list, is_integer

Messages = Sequence[Mapping[str, Any]]

MAX_CONTEXT = 2**17
"""The context length in tokens where the config sets none."""


@dataclass(frozen=True)
class Prompt:
    """The start of one completion: a text, or chat messages with `role` and `content`."""

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
        if not (is_integer(id) or isinstance(id, str)):
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


@dataclass(frozen=True)
class Texts:
    """Encodes prompts, and makes completions of generated tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    chat: bool

    def encode(self, prompt: Prompt) -> tuple[list[int], int] | Completion:
        """Return the prompt's tokens and how many may follow, or a failed completion."""
        try:
            ids = encode(self.tokenizer, prompt, chat=self.chat)
            check_vocabulary(self.model, ids)
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
        return set(as_list(self.config.eos_token_id))

    @property
    def stop_strings(self) -> list[str]:
        return as_list(self.config.stop_strings)

    def has_stop(self, ids: list[int], new_ids: list[int]) -> bool:
        """Whether the newest of `new_ids` complete a stop string."""
        # A character takes up to four tokens; eight more for tokens without text.
        tail = new_ids[-4 * max(map(len, self.stop_strings)) - 8 :]
        near: str = self.tokenizer.decode(tail, skip_special_tokens=True)
        if not any(string in near for string in self.stop_strings):
            return False
        text = self.text(ids, new_ids)
        return any(string in text for string in self.stop_strings)

    def complete(
        self, prompt: Prompt, ids: list[int], new_ids: list[int], *, stopped: bool
    ) -> Completion:
        """Make a completion of `new_ids`, which end before the end-of-text token.

        `stopped` says that such a token followed.
        """
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
        """Return the text of `new_ids` as they follow the prompt's `ids`."""
        # Decoded alone, a sentencepiece tokenizer would drop the space before the first new word.
        before: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        whole: str = self.tokenizer.decode([*ids, *new_ids], skip_special_tokens=True)
        if whole.startswith(before):
            return whole[len(before) :]
        return str(self.tokenizer.decode(new_ids, skip_special_tokens=True))


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool = False) -> list[int]:
    """Return the tokens of a prompt; for an empty one the beginning- or end-of-text token.

    Messages, and with `chat` texts too, go through the tokenizer's chat template.

    Raises:
        ValueError: there is no template, no first token, or the text is not valid Unicode.
        jinja2.TemplateError: the template refuses the messages.
    """
    messages: Messages
    if isinstance(prompt.prompt, str):
        if not chat:
            return token_ids(tokenizer, prompt.prompt) or [_first_token(tokenizer)]
        messages = [{"role": "user", "content": prompt.prompt}]
    elif tokenizer.chat_template is None:
        raise ValueError("the prompt holds messages but the tokenizer has no chat template")
    else:
        messages = prompt.prompt
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    # the template writes the special tokens itself
    return token_ids(tokenizer, text, add_special_tokens=False)


def token_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    text.encode()  # a lone surrogate raises here, and names itself
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids)


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the prompt is empty and the tokenizer has no beginning- or end-of-text token")


def refuse_single(name: str, given: object) -> None:
    """Raise ValueError where one text was given for several: iterating would split it."""
    if isinstance(given, str | bytes | Mapping | Prompt | Completion):
        raise ValueError(
            f"{name} must be a list, or another iterable, and this is a single "
            f"{type(given).__name__}; put it into a list: [..]"
        )


def check_vocabulary(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Raise ValueError for a token id that the model has no embedding for."""
    size = model.get_input_embeddings().num_embeddings
    if ids and (min(ids) < 0 or max(ids) >= size):
        place, wrong = next((i, id) for i, id in enumerate(ids) if not 0 <= id < size)
        raise ValueError(
            f"token {place} has the id {wrong}, and the model's vocabulary has {size}, 0 to "
            f"{size - 1}; is the tokenizer this model's?"
        )


def as_prompt(item: str | Mapping[str, Any] | Prompt, index: int) -> Prompt:
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


def context_length(model: PreTrainedModel) -> int | None:
    """Return the model's context length in tokens, or None where the config sets none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
