"""Parts that the sections of benchmarks/generate.py share: models, the clock, the time left."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from machine import synchronize
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from moezoo.causal_lm import MoECausalLM
from moezoo.tools.layer import Ceilings

T = TypeVar("T")
Row = dict[str, Any]
Run = Callable[[], object]


@dataclass
class Subject:
    """moezoo's model and transformers' over the same weights, and the time that they may take.

    `deadline` is in seconds of `time.perf_counter`.
    """

    case: str
    dtype: str
    model: MoECausalLM
    twin: nn.Module
    ceilings: Ceilings
    deadline: float
    repeats: int

    @property
    def device(self) -> torch.device:
        return self.model.device

    def draw(self, *shape: int) -> Tensor:
        """Return random tokens."""
        return torch.randint(1, self.model.config.vocab_size, shape, device=self.device)

    def row(self, section: str, **fields: Any) -> Row:
        return {"section": section, "case": self.case, "dtype": self.dtype, **fields, "skipped": {}}

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def attempt(self, row: Row, name: str, run: Callable[[], T]) -> T | None:
        """Return the result of `run`, or None with the reason under row["skipped"][name]."""
        if self.left() <= 0:
            row["skipped"][name] = "time budget"
            return None
        try:
            return run()
        except Exception as error:  # one must not take the others with it
            row["skipped"][name] = reason(error)
            say(f"{self.case}, {row['section']}: {name} skipped: {row['skipped'][name]}")
            return None
        finally:
            # After an error of the device itself everything fails, by name; the rows are kept.
            with suppress(RuntimeError):
                release(self.device)


class Clock(BaseStreamer):
    """A streamer that notes when tokens reach the host: first the prompt's, before any work."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def say(message: str) -> None:
    print(f"generate: {message}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def release(device: torch.device) -> None:
    """Free memory that nothing uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def spread(seconds: Iterable[float]) -> dict[str, float]:
    runs = list(seconds)
    return {"median": statistics.median(runs), "min": min(runs), "max": max(runs)}


def greedy(model: nn.Module, ids: Tensor, new_tokens: int, **more: Any) -> Callable[[], Tensor]:
    """Run `generate` on the rows of ids [B, T]; `more` may have another attention_mask."""
    given = {"attention_mask": torch.ones_like(ids), **more}
    return lambda: model.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **given
    )


def forward(model: nn.Module, ids: Tensor) -> Run:
    """Run a prompt's forward pass to the logits of its last token."""

    @torch.inference_mode()
    def run() -> object:
        return model(ids, use_cache=True, logits_to_keep=1)

    return run


def timed(run: Run, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def alternate(
    contenders: dict[str, Run], repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return the seconds of each call: one run unmeasured, then `repeats` rounds in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            taken = timed(run, device)
            if turn:
                seconds[name].append(taken)
    return {name: spread(runs) for name, runs in seconds.items()}
