"""Log-probabilities of given texts, for evaluation.

Legend: B texts of a batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moezoo.generation.texts import (
    Completion,
    Prompt,
    check_vocabulary,
    context_length,
    encode,
    refuse_single,
    token_ids,
)
from moezoo.generation.turns import joint_pass, make_remaining_passes
from moezoo.layers.context import DenseContext
from moezoo.layers.decoder import Decoder, decoder_of
from moezoo.layers.mask import CausalMask

CHUNK_LOGITS = 2**26
"""Number of logits that are held at a time; 256 MiB in fp32."""


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text.

    `logprobs[i]` is the natural logarithm of the probability of `token_ids[i]` after the tokens
    before it, NaN for the first one, which nothing comes before. The first `num_prompt_tokens`
    belong to the prompt, where there is one.
    """

    id: int | str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    num_prompt_tokens: int

    @property
    def logprob(self) -> float:
        """Log-probability of the completion; without a prompt, of all tokens but the first."""
        return math.fsum(self.logprobs[max(self.num_prompt_tokens, 1) :])

    @property
    def perplexity(self) -> float:
        """exp(-logprob / n), n being the tokens that `logprob` counts; NaN if there are none."""
        num_tokens = len(self.logprobs) - max(self.num_prompt_tokens, 1)
        return math.exp(-self.logprob / num_tokens) if num_tokens > 0 else math.nan


Scored = str | Mapping[str, Any] | Completion | Sequence[int]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Scored],
    *,
    batch_size: int = 8,
    chat: bool = False,
) -> Iterator[Score]:
    """Yield the log-probability of every token of every text, in the order of the texts.

    Args:
        model: what `moezoo.from_pretrained` or `moezoo.from_config` returned.
        tokenizer: its tokenizer.
        texts: each a text; or token ids; or `{"prompt": .., "completion": ..}`, which is tokenised
            as one text and split where the prompt alone ends, perhaps with an `"id"` (by default
            the position); or a `Completion` of `moezoo.generate`, whose own tokens are scored.
        batch_size: number of texts that are scored at a time, padded to the longest.
        chat: the prompts of `Completion`s that are texts were the user's message of a chat.

    Raises:
        ValueError: `model` is not a model of moezoo, `texts` is a single text, or `batch_size` is
            below 1; a text is malformed, empty, longer than the model's context, or has a token
            outside its vocabulary.
    """
    decoder = decoder_of(model)
    refuse_single("texts", texts)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return _score(model, decoder, _tokenized(model, tokenizer, texts, chat), batch_size)


@dataclass(frozen=True)
class _Tokens:
    id: int | str
    ids: list[int]
    num_prompt_tokens: int = 0


def _tokenized(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[Scored], chat: bool
) -> Iterator[_Tokens]:
    for index, text in enumerate(texts):
        try:
            tokens = _tokens(tokenizer, text, index, chat)
            check_vocabulary(model, tokens.ids)
        except ValueError as error:
            raise ValueError(f"text {index}: {error}") from None
        context = context_length(model)
        if not tokens.ids:
            raise ValueError(f"text {index} has no tokens")
        if context is not None and len(tokens.ids) > context:
            raise ValueError(
                f"text {index} has {len(tokens.ids)} tokens and the model's context is {context}"
            )
        yield tokens


def _tokens(tokenizer: PreTrainedTokenizerBase, text: Scored, index: int, chat: bool) -> _Tokens:
    if isinstance(text, str):
        return _Tokens(index, encode(tokenizer, Prompt(index, text)))
    if isinstance(text, Completion):
        before = encode(tokenizer, Prompt(text.id, text.prompt), chat=chat)
        return _Tokens(text.id, [*before, *text.token_ids], len(before))
    if isinstance(text, Mapping):
        prompt, completion = Prompt.from_record(text, default_id=index), text.get("completion")
        if not isinstance(prompt.prompt, str) or not isinstance(completion, str):
            raise ValueError(
                f'"prompt" and "completion" must be strings, got the keys {sorted(text)}'
            )
        before = encode(tokenizer, prompt)
        whole = encode(tokenizer, Prompt(prompt.id, prompt.prompt + completion))
        if not prompt.prompt and not token_ids(tokenizer, ""):
            whole = [*before, *whole]
        return _Tokens(prompt.id, whole, min(len(before), len(whole)))
    if isinstance(text, Sequence):
        ids = [token for token in text if isinstance(token, int)]
        if len(ids) == len(text):
            return _Tokens(index, ids)
    raise ValueError(f"expected a text, a mapping, token ids or a Completion, got {type(text)}")


def _score(
    model: PreTrainedModel, decoder: Decoder, texts: Iterator[_Tokens], batch_size: int
) -> Iterator[Score]:
    while batch := list(islice(texts, batch_size)):
        for tokens, logprobs in zip(batch, _logprobs(model, decoder, batch), strict=True):
            yield Score(
                tokens.id,
                tuple(tokens.ids),
                (math.nan, *logprobs[: len(tokens.ids) - 1]),
                tokens.num_prompt_tokens,
            )
    make_remaining_passes(decoder)


@torch.inference_mode()
def _logprobs(model: PreTrainedModel, decoder: Decoder, batch: list[_Tokens]) -> list[list[float]]:
    """Return log-probabilities from each text's second token on, those of padding included."""
    length = max(len(tokens.ids) for tokens in batch)
    # Padded on the right, where no token of a text attends to padding.
    ids = torch.tensor([tokens.ids + [0] * (length - len(tokens.ids)) for tokens in batch])
    ids = ids.to(model.device)
    positions = torch.arange(length, device=ids.device)[None]
    context = DenseContext(decoder.rotation(positions), CausalMask(0, length, ids.device))
    with joint_pass(decoder, ids):
        hidden = decoder(decoder.embed(ids), context)
    step = max(1, CHUNK_LOGITS // (len(batch) * model.config.vocab_size))
    chosen = []
    for start in range(0, length - 1, step):
        end = min(start + step, length - 1)
        logits = decoder.logits(hidden[:, start:end]).float()
        next_ids = ids[:, start + 1 : end + 1, None]
        chosen.append(logits.gather(-1, next_ids).squeeze(-1) - logits.logsumexp(-1))
    return torch.cat(chosen, 1).tolist() if chosen else [[] for _ in batch]
