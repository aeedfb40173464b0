"""Comparison of moezoo's logits and greedy tokens with transformers' logits, before any timing.

Legend: T tokens, V vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from cases import TOLERANCE
from subject import Subject, greedy
from torch import Tensor, nn

from moezoo.generation.engine import Engine
from moezoo.generation.pages import PAGE_SIZE
from moezoo.tools.layer_inputs import WrongResultError

PROMPT = 128
LENGTHS = {"cuda": (5, PAGE_SIZE, 130, 300), "cpu": (5, 17, 30)}
STEPS = 16
NOISE = 6
"""Largest allowed gap between transformers' first choice and another token, in root mean square
differences of the logits: six standard deviations, and a little, of what rounding does to two."""


@dataclass(frozen=True)
class Greedy:
    """Result of comparing generated tokens with transformers' logits at the same positions."""

    tokens: int
    others: int
    """Number of tokens that are not transformers' first choice."""
    largest_gap: float
    """Largest difference between the logits of its first choice and of the token, in units of the
    logits' root mean square."""
    allowed_gap: float


def check(subject: Subject) -> dict[str, Any]:
    """Compare both models; return the figures, or raise `WrongResultError`."""
    tolerance = TOLERANCE[subject.dtype]
    ids = subject.draw(1, PROMPT)
    with torch.inference_mode():
        difference = relative(subject.model(ids).logits, subject.twin(ids).logits)
    found: dict[str, Any] = {"logit_difference": difference, "tolerance": tolerance}
    if not difference <= tolerance:
        raise WrongResultError(
            f"logits are {difference:.1e} away from transformers', allowed is {tolerance:g}"
        )
    prompts = [subject.draw(n).tolist() for n in LENGTHS[subject.device.type]]
    written, logits = in_engine(subject.model, prompts)
    expected = [last_logits(subject.twin, ids, STEPS) for ids in written]
    difference = relative(torch.cat(logits), torch.cat(expected))
    found["engine_logit_difference"] = difference
    if not difference <= tolerance:
        raise WrongResultError(
            f"logits of the engine's steps are {difference:.1e} away from transformers', allowed "
            f"is {tolerance:g}"
        )
    allowed = NOISE * difference + 1e-6
    found["engine"] = judged(written, expected, allowed)
    ids = torch.tensor(prompts[-1:], device=subject.device)
    whole = [row.tolist() for row in greedy(subject.model, ids, STEPS)()]
    expected = [last_logits(subject.twin, ids, STEPS) for ids in whole]
    found["generate"] = judged(whole, expected, allowed)
    return found


def judged(written: list[list[int]], expected: list[Tensor], allowed: float) -> dict[str, Any]:
    """Judge sequences that end with STEPS new tokens, chosen from these logits [STEPS, V]."""
    others, largest = 0, 0.0
    for sequence, logits in zip(written, expected, strict=True):
        chosen = torch.tensor(sequence[-STEPS:], device=logits.device)[:, None]
        gaps = logits.max(1, keepdim=True).values - logits.gather(1, chosen)
        others += int((gaps > 0).sum())
        largest = max(largest, (gaps.max() / logits.pow(2).mean().sqrt()).item())
    result = Greedy(len(written) * STEPS, others, largest, allowed)
    if not largest <= allowed:
        raise WrongResultError(
            f"a greedy token is {largest:.2g} of the logits' root mean square below transformers' "
            f"first choice, allowed is {allowed:.2g}"
        )
    return asdict(result)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference over the norm."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@torch.inference_mode()
def last_logits(model: nn.Module, sequence: list[int], steps: int) -> Tensor:
    """Return the logits, fp32 [steps, V], that predict the sequence's last `steps` tokens."""
    ids = torch.tensor([sequence[:-1]], device=model.device)
    return model(ids, use_cache=False, logits_to_keep=steps).logits[0].float()


@torch.inference_mode()
def in_engine(model: nn.Module, prompts: list[list[int]]) -> tuple[list[list[int]], list[Tensor]]:
    """Return the prompts with STEPS greedy tokens, in one batch, and their logits [STEPS, V]."""
    batch = len(prompts)
    engine = Engine(model.decoder, num_rows=batch, context=max(map(len, prompts)) + STEPS)
    each = engine.pages // batch
    for row in range(batch):
        engine.assign(row, range(row * each, (row + 1) * each))
    found = [engine.prefill_all(prompts).float()]
    tokens = [found[0].argmax(-1)]
    engine.start(range(batch), [len(prompt) for prompt in prompts], tokens[0])
    for _ in range(STEPS - 1):
        found.append(engine.step(batch, engine.greedy)[:batch].float().clone())
        tokens.append(engine.ids[:batch].clone())
    written = torch.stack(tokens, 1).tolist()
    return (
        [prompt + new for prompt, new in zip(prompts, written, strict=True)],
        list(torch.stack(found, 1)),
    )
