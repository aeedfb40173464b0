"""Section prefill: milliseconds from a prompt's tokens to the logits after it.

On a GPU moezoo's figure is that of its engine, in chunks of 8,192 tokens as `generate` has them; on
a CPU that of a forward pass, in turns with transformers'. transformers' is a forward pass with a
cache, and on a GPU once more with grouped_mm experts where it does not choose these itself. The
share of the matmul peak counts 2 FLOP for each active parameter and token, and causal attention.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from roofline import prefill_flop
from subject import Row, Run, Subject, alternate, forward, spread, timed

from moezoo.generation.engine import Engine

GROUPED = "grouped_mm"
CPU_ROUNDS = 20
"""Rounds in which each of them reads the prompt once."""
PEER_TOKENS = 8192
"""Most tokens of a prompt for transformers; moezoo runs longer ones too."""


def section(subject: Subject, args: argparse.Namespace) -> Iterator[Row]:
    for num_tokens in args.prefill:
        row = subject.row("prefill", batch=1, prompt_tokens=num_tokens)
        row |= {"seconds": {}, "tokens_per_second": {}, "of_peak": {}}
        prompt = subject.draw(1, num_tokens)
        default = subject.twin.get_experts_implementation()
        row["transformers_experts"] = default[""]
        row["flop"] = prefill_flop(subject.model.decoder, experts_per_token(subject), num_tokens)
        if subject.device.type == "cpu":
            runs = {"moezoo": ours(subject, prompt)}
            if num_tokens <= PEER_TOKENS:
                runs["transformers"] = theirs(subject, prompt)
            in_turns = partial(alternate, runs, CPU_ROUNDS, subject.device)
            row["seconds"] = subject.attempt(row, "both", in_turns) or {}
        else:
            one_after_the_other(subject, row, prompt)
        for name, seconds in row["seconds"].items():
            row["tokens_per_second"][name] = num_tokens / seconds["median"]
            # What a CPU reaches in a 16-bit product says little of what it could.
            if subject.device.type == "cuda":
                peak = subject.ceilings.flop_per_second
                row["of_peak"][name] = row["flop"] / seconds["median"] / peak
        peers = [s["median"] for name, s in row["seconds"].items() if name != "moezoo"]
        if peers and "moezoo" in row["seconds"]:
            row["times_transformers"] = min(peers) / row["seconds"]["moezoo"]["median"]
        yield row


def one_after_the_other(subject: Subject, row: Row, prompt: torch.Tensor) -> None:
    """Fill in the seconds of each contender, which holds its memory only while it runs."""
    contenders = {"moezoo": ours, "transformers": theirs}
    default = subject.twin.get_experts_implementation()
    if default[""] != GROUPED:
        contenders[f"transformers_{GROUPED}"] = theirs
    for name, prepare in contenders.items():
        if name != "moezoo" and row["prompt_tokens"] > PEER_TOKENS:
            continue
        if name.endswith(GROUPED):
            subject.twin.set_experts_implementation(GROUPED)
        run = subject.attempt(row, name, partial(prepare, subject, prompt))
        if run is not None:
            seconds = subject.attempt(row, name, partial(repeated, subject, run))
            if seconds is not None:
                row["seconds"][name] = seconds
        subject.twin.set_experts_implementation(default)


def experts_per_token(subject: Subject) -> int:
    return subject.model.config.num_experts_per_tok


def repeated(subject: Subject, run: Run) -> dict[str, float]:
    """Return the seconds after a run that compiles kernels and one that captures a graph."""
    run()
    run()
    return spread(timed(run, subject.device) for _ in range(subject.repeats))


def ours(subject: Subject, prompt: torch.Tensor) -> Run:
    if subject.device.type != "cuda":
        return forward(subject.model, prompt)
    tokens = prompt[0].tolist()
    engine = Engine(subject.model.decoder, num_rows=1, context=len(tokens))
    engine.assign(0, range(engine.pages))
    return partial(engine.prefill_all, [tokens])


def theirs(subject: Subject, prompt: torch.Tensor) -> Run:
    return forward(subject.twin, prompt)


def figures(row: Row) -> list[str]:
    """Return the cells of a row of the table, in the order of COLUMNS."""
    cells = [
        f"{1e3 * row['seconds'][name]['median']:,.1f}" if name in row["seconds"] else ""
        for name in ("moezoo", "transformers", f"transformers_{GROUPED}")
    ]
    share = row["of_peak"].get("moezoo")
    return [
        *(row["case"], f"{row['prompt_tokens']:,}", *cells),
        f"{row['times_transformers']:.2f}" if "times_transformers" in row else "",
        "" if share is None else f"{share:.0%}",
    ]


COLUMNS = (
    *("", "tokens", "moezoo ms", "transformers ms", "with grouped_mm", "ratio"),
    "of matmul peak",
)
