"""The loss of a model on held-out text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moezoo.generation.score import score
from moezoo.generation.texts import Prompt, context_length, encode

LENGTH = 512


@dataclass(frozen=True)
class Loss:
    """A mean loss in nats per token, over `num_tokens` tokens in windows of `length`.

    The first token of a window is not counted.
    """

    nats: float
    num_tokens: int
    length: int


@dataclass(frozen=True)
class HeldOut:
    """Held-out texts, and the tokenizer of the models that are measured on them."""

    name: str
    texts: Sequence[str]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def read(cls, path: Path, tokenizer: PreTrainedTokenizerBase) -> "HeldOut":
        """Read a file: JSON lines with "text" where its name ends in .jsonl, else one text.

        Raises `ValueError` for a file that cannot be read or has another format.
        """
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as text: {error}") from error
        if path.suffix != ".jsonl":
            return cls(path.name, [text], tokenizer)
        lines = enumerate(text.split("\n"), start=1)
        return cls(
            path.name,
            [_text_of(line, f"{path}:{number}") for number, line in lines if line.strip()],
            tokenizer,
        )

    def loss(self, model: Any) -> Loss:
        """Return the loss of a `MoECausalLM`.

        Raises `ValueError` where no text has two tokens.
        """
        length = min(LENGTH, context_length(model) or LENGTH)
        windows: list[list[int]] = []
        for i, text in enumerate(self.texts):
            ids = encode(self.tokenizer, Prompt(i, text)) if text else []
            windows += [ids[start : start + length] for start in range(0, len(ids), length)]
        windows = [window for window in windows if len(window) > 1]
        counted = sum(len(window) - 1 for window in windows)
        if not counted:
            raise ValueError(f"{self.name} has no two tokens in a row to measure a loss on")
        total = sum(each.logprob for each in score(model, self.tokenizer, windows))
        return Loss(-total / counted, counted, length)


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected an object with "text", a string')
    return text
