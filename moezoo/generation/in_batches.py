"""Completions by transformers' `model.generate`, one batch of prompts after the other."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from moezoo.device import is_out_of_memory
from moezoo.errors import MoEOutOfMemoryError
from moezoo.generation.sampling import SeededDraw, uniforms
from moezoo.generation.texts import Completion, Prompt, Texts

# Defaults of the sampling settings; transformers warns of others in a greedy run.
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
class BatchGenerator:
    """Completes prompts by `model.generate`: the way of `offline.generate` for any model."""

    texts: Texts
    seed: int | None
    streamer: BaseStreamer | None

    def run(self, prompts: Iterator[Prompt], batch_size: int) -> Iterator[Completion]:
        """Yield the completions in the order of the prompts, `batch_size` prompts at a time."""
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
        """Return the new tokens of each row, including what follows its end-of-text token."""
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


def _prompts(number: int) -> str:
    return "1 prompt" if number == 1 else f"{number} prompts"
