"""Sampling the next token from logits: transformers' warpers, and draws that a seed repeats.

Legend: R rows, B rows of a step, V vocabulary.
"""

import json
import random
from collections.abc import Callable, Sequence
from hashlib import sha256

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from moezoo.device import device_made_current, runs_kernels, to_device


def warpers(config: GenerationConfig, device: torch.device) -> LogitsProcessorList:
    """Return the warpers that transformers applies to the logits of a sampled step, in its order.

    They are listed here because `generate` makes its own in a private method only, together with
    processors that need a prompt.
    """
    found: list[LogitsProcessor] = []
    if config.temperature not in (None, 1.0):
        found.append(TemperatureLogitsWarper(config.temperature))
    if config.top_h is not None:
        found.append(TopHLogitsWarper(config.top_h))
    if config.top_k:
        found.append(TopKLogitsWarper(config.top_k))
    if config.top_p not in (None, 1.0):
        found.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        found.append(MinPLogitsWarper(config.min_p))
    if config.typical_p not in (None, 1.0):
        found.append(TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff:
        found.append(EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff:
        found.append(EtaLogitsWarper(config.eta_cutoff, device=str(device)))
    return LogitsProcessorList(found)


def uniforms(seed: int, prompt_id: int | str, steps: int) -> list[float]:
    """Return a prompt's stream of uniform numbers in [0, 1), which depends on seed and id alone."""
    digest = sha256(json.dumps([seed, prompt_id]).encode()).digest()
    draw = random.Random(digest)
    return [draw.random() for _ in range(steps)]


def invert(scores: Tensor, uniform: Tensor) -> Tensor:
    """Return the tokens int64 [B] where the cumulative distribution of scores [B, V] passes
    uniform, float64 [B] in [0, 1). A token of probability zero is never drawn.
    """
    cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return token.clamp_(max=scores.shape[1] - 1)


def argmax(scores: Tensor) -> Tensor:
    """Return the tokens int64 [B] with the largest of scores [B, V]."""
    if runs_kernels(scores):
        from moezoo.layers.kernels import argmax as kernel

        with device_made_current(scores):
            return kernel.argmax(scores)
    return scores.argmax(-1)


class SeededDraw(LogitsProcessor):
    """A logits processor that draws by a table of uniform numbers, not torch's random state.

    It applies the warpers of `config`, inverts the cumulative distribution in float64, and leaves
    the drawn token as the only one with a finite score, so that greedy search picks it.

    Args:
        config: resolved sampling settings.
        uniforms: float64 [B, steps] in [0, 1), on the device of the scores.
        prompt_length: number of columns of `input_ids` at the first step, padding included.
    """

    def __init__(self, config: GenerationConfig, uniforms: Tensor, prompt_length: int) -> None:
        self.warpers = warpers(config, uniforms.device)
        self.uniforms = uniforms
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [B, V] that are zero at the drawn tokens and -inf elsewhere."""
        step = input_ids.shape[1] - self.prompt_length
        token = invert(self.warpers(input_ids, scores), self.uniforms[:, step])
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


class Sampler:
    """Draws the next token of each row, with the state of all rows on the device.

    The host waits for nothing, and all state changes in place, so that a CUDA graph can hold a
    call. Greedy, or sampled with temperature, top-k, top-p and min-p; with repetition penalty
    (Keskar et al., 2019) in either case.

    Args:
        config: resolved settings; all fields but those are ignored.
        num_rows: R.
        steps: the most new tokens of a row, for a seeded draw; None draws from torch's global
            random state.
        agreed: maps the drawn tokens int64 [B] to those that all ranks go on with.
    """

    PROCESSORS = (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        MinPLogitsWarper,
    )
    """The logits processors of transformers that a `Sampler` stands for."""

    def __init__(
        self,
        config: GenerationConfig,
        *,
        num_rows: int,
        vocab_size: int,
        device: torch.device,
        steps: int | None = None,
        agreed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.agreed = agreed
        self.warpers = warpers(config, device) if config.do_sample else None
        self.penalty = config.repetition_penalty or 1.0
        self.seen: Tensor | None = None
        self.uniforms: Tensor | None = None
        if self.penalty != 1.0:
            self.seen = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
        if self.warpers is not None and steps is not None:
            self.uniforms = torch.zeros(num_rows, steps, dtype=torch.float64, device=device)
        self.step = torch.zeros(num_rows, 1, dtype=torch.int64, device=device)

    @classmethod
    def greedy(
        cls,
        num_rows: int,
        device: torch.device,
        *,
        agreed: Callable[[Tensor], Tensor] | None = None,
    ) -> "Sampler":
        """Return a sampler for greedy search without a repetition penalty."""
        config = GenerationConfig(do_sample=False)
        return cls(config, num_rows=num_rows, vocab_size=0, device=device, agreed=agreed)

    def state(self) -> list[Tensor]:
        """Return all tensors with state of rows, [R, ..] each."""
        return [x for x in (self.step, self.seen, self.uniforms) if x is not None]

    @torch.inference_mode()
    def start(
        self, row: int, tokens: Sequence[int], stream: Sequence[float], *, step: int = 0
    ) -> None:
        """Reset `row` to a sequence of these tokens; its next draw takes number `step` of `stream`.

        `stream` are the uniform numbers of a seeded draw, and unused in others.
        """
        self.step[row] = step
        if self.seen is not None:
            self.seen[row] = False
            self.seen[row, to_device(torch.tensor(sorted(set(tokens))), self.seen.device)] = True
        if self.uniforms is not None:
            numbers = torch.tensor(stream, dtype=torch.float64)
            self.uniforms[row, : len(stream)] = to_device(numbers, self.uniforms.device)

    @torch.inference_mode()
    def __call__(self, logits: Tensor, rows: slice | Tensor) -> Tensor:
        """Draw the next tokens int64 [B] of `rows` from their logits [B, V]."""
        scores = logits
        if self.seen is not None or self.warpers is not None:
            scores = logits.float()
        if self.seen is not None:
            lower = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
            scores = torch.where(self.seen[rows], lower, scores)
        if self.warpers is None:
            tokens = argmax(scores)
        else:
            # The warpers in PROCESSORS ignore the tokens before.
            scores = self.warpers(None, scores)
            if self.uniforms is not None:
                step = self.step[rows].clamp(max=self.uniforms.shape[1] - 1)
                tokens = invert(scores, self.uniforms[rows].gather(1, step).squeeze(1))
            else:
                chances = scores.softmax(-1)
                # The token whose exponential waiting time is the shortest, at rates `chances`.
                tokens = (chances / torch.empty_like(chances).exponential_()).argmax(-1)
        if self.agreed is not None:
            tokens = self.agreed(tokens)
        if self.uniforms is not None:
            self.step[rows] += 1
        if self.seen is not None:
            self.seen[rows] = self.seen[rows].scatter(1, tokens[:, None], True)
        return tokens
