"""`generate` of whole models beside transformers' over the same weights, and beside the roofline.

    python benchmarks/generate.py [--section decode prefill attention offline start]
                                  [--case qwen3-30b-a3b] [--device cpu] [--time-budget SECONDS]

Random weights; transformers' model is given views of moezoo's tensors, so both are in memory once.
Nothing of a case is timed before its logits and greedy tokens have been compared with transformers'
(correctness.py). decoding.py, prefilling.py, attention.py, offline.py and start.py say what their
sections measure. Read bandwidth and matmul peak, which shares are of, are measured in the same run.

What fails, does not fit or finds no time left is skipped by name with the reason. Results are
written after each case: as generate_partial_<device>.json, and once a run has gone through all the
cases and sections that are the device's default, as generate_<device>.json instead. The run ends
with status 1 if a comparison or a whole section has failed.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import attention
import correctness
import decoding
import offline
import prefilling
import start
import torch
from cases import CASES, DEFAULT_CASES, TOLERANCE, in_transformers
from machine import describe, write_result
from rich.console import Console
from rich.table import Table
from subject import Row, Subject, reason, release, say

import moezoo
from moezoo.tools.layer import Ceilings, measure_ceilings

SECTIONS: dict[str, ModuleType] = {
    "decode": decoding,
    "prefill": prefilling,
    "attention": attention,
    "offline": offline,
    "start": start,
}
DEFAULT_SECTIONS = {"cpu": ["decode", "prefill"], "cuda": list(SECTIONS)}
BATCH = {"cpu": [1, 8], "cuda": [1, 8, 32]}
CONTEXT = {"cpu": [96], "cuda": [512, 2048, 8192]}
PREFILL = {"cpu": [512], "cuda": [512, 2048, 8192, 32768]}
REPEATS = {"cpu": 5, "cuda": 3}
TIME_BUDGET = {"cpu": math.inf, "cuda": 225.0}
START_SECONDS = 25.0
"""Seconds of a case's time that are kept back for the process of its section start."""


def subject_of(case: str, args: argparse.Namespace, ceilings: Ceilings, deadline: float) -> Subject:
    torch.manual_seed(0)
    model = moezoo.from_config(CASES[case](), dtype=getattr(torch, args.dtype), device=args.device)
    twin = in_transformers(model)
    for contender in (model, twin):  # random weights end no text, at its length all do
        contender.generation_config.eos_token_id = None
    return Subject(case, args.dtype, model, twin, ceilings, deadline, args.repeats)


def measure(
    case: str, args: argparse.Namespace, ceilings: Ceilings, seconds: float
) -> Iterator[Row]:
    """Yield a case's rows, those of the comparison first; "failed" where it ends with that."""
    end = time.perf_counter() + seconds
    sections = [name for name in SECTIONS if name in args.section]
    inside = [name for name in sections if name != "start"]
    begin = time.perf_counter()
    try:
        kept = START_SECONDS if "start" in sections else 0.0
        subject = subject_of(case, args, ceilings, end - kept)
        checked = correctness.check(subject)
    except Exception as error:  # the other cases go on
        say(f"{case}: {reason(error)}")
        yield {"section": "correctness", "case": case, "failed": reason(error)}
        return
    took = time.perf_counter() - begin
    yield {"section": "correctness", "case": case, "dtype": args.dtype, **checked, "took": took}
    for name in inside:
        begin = time.perf_counter()
        try:
            yield from SECTIONS[name].section(subject, args)
        except Exception as error:
            yield {"section": name, "case": case, "failed": reason(error)}
        say(f"{case}: {name} took {time.perf_counter() - begin:.0f} s")
    device = subject.device
    del subject
    release(device)
    if "start" in sections:
        begin = time.perf_counter()
        yield from start.section(case, args, max(end - begin, START_SECONDS))
        say(f"{case}: start took {time.perf_counter() - begin:.0f} s")


def tables(rows: list[Row], title: str) -> Iterator[Table]:
    for name, section in SECTIONS.items():
        own = [row for row in rows if row["section"] == name]
        if not own:
            continue
        shown = Table(title=f"{name}: {title}")
        for column in section.COLUMNS:
            shown.add_column(column, justify="right" if column else "left")
        for row in own:
            shown.add_row(
                *([row["case"], row["failed"]] if "failed" in row else section.figures(row))
            )
        yield shown


def skipped(rows: list[Row]) -> Iterator[str]:
    keys = ("batch", "context", "prompt_tokens", "triton_cache")
    for row in rows:
        which = ", ".join(f"{key} {row[key]}" for key in keys if key in row)
        for name, why in row.get("skipped", {}).items():
            yield f"{row['case']} {row['section']} ({which}): {name} skipped: {why}"
        if "failed" in row:
            yield f"{row['case']} {row['section']} failed: {row['failed']}"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, with the device's defaults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--section", nargs="+", choices=SECTIONS, help="default: by device")
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: by device")
    parser.add_argument("--dtype", default="bfloat16", choices=TOLERANCE)
    parser.add_argument("--batch", type=int, nargs="+", help="rows that are decoded")
    parser.add_argument(
        "--context", type=int, nargs="+", help="tokens of a row at the end of decoding"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="steps that are timed")
    parser.add_argument("--prefill", type=int, nargs="+", help="tokens of the prompts")
    parser.add_argument("--prompts", type=int, help="of section offline; default 512")
    parser.add_argument(
        "--peer-seconds", type=float, default=15, help="for transformers' continuous batching"
    )
    parser.add_argument("--cold", action="store_true", help="start also with no kernel compiled")
    parser.add_argument("--repeats", type=int)
    parser.add_argument(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="shared out evenly over the cases, what one leaves to those after it; "
        "default 225 on a GPU",
    )
    args = parser.parse_args(arguments)
    kind = torch.device(args.device).type
    for option, default in (
        ("section", DEFAULT_SECTIONS),
        ("case", DEFAULT_CASES),
        ("batch", BATCH),
        ("context", CONTEXT),
        ("prefill", PREFILL),
        ("repeats", REPEATS),
        ("time_budget", TIME_BUDGET),
    ):
        if getattr(args, option) is None:
            setattr(args, option, default[kind])
    if "decode" in args.section:
        lead = decoding.LEAD if kind == "cuda" else 0
        if args.new_tokens < decoding.COUNTED_STEPS:
            parser.error(f"--new-tokens must be at least {decoding.COUNTED_STEPS}")
        if min(args.context) <= args.new_tokens + lead:
            parser.error(f"--context must be more than --new-tokens and {lead}")
    return args


def is_whole(args: argparse.Namespace) -> bool:
    """Whether the run has all cases and sections of the device's defaults."""
    kind = torch.device(args.device).type
    defaults = (
        (args.section, DEFAULT_SECTIONS),
        (args.case, DEFAULT_CASES),
        (args.batch, BATCH),
        (args.context, CONTEXT),
        (args.prefill, PREFILL),
    )
    enough = args.prompts is None or args.prompts >= offline.PROMPTS[kind]
    return enough and all(set(given) >= set(default[kind]) for given, default in defaults)


def main() -> None:
    args = parsed()
    begin = time.perf_counter()
    device = torch.device(args.device)
    ceilings = measure_ceilings(device, getattr(torch, args.dtype))
    release(device)
    content: dict[str, Any] = {
        "read_bytes_per_second": ceilings.read_bytes_per_second,
        "matmul_flop_per_second": ceilings.flop_per_second,
        "repeats": args.repeats,
        "time_budget": args.time_budget if math.isfinite(args.time_budget) else None,
    }
    rows: list[Row] = []
    for done, case in enumerate(args.case):
        left = args.time_budget - (time.perf_counter() - begin)
        for row in measure(case, args, ceilings, left / (len(args.case) - done)):
            rows.append(row)
            content |= {"seconds": time.perf_counter() - begin, "rows": rows}
            path = write_result("generate_partial", device, content)
        say(f"{case} done after {time.perf_counter() - begin:.0f} s")
    if is_whole(args):
        path.unlink()
        path = write_result("generate", device, content)
    title = (
        f"{describe(device)['device']}, {args.dtype}, "
        f"{ceilings.read_bytes_per_second / 1e9:,.0f} GB/s read, "
        f"{ceilings.flop_per_second / 1e12:.3g} TFLOP/s"
    )
    console = Console(width=150)
    for shown in tables(rows, title):
        console.print(shown)
    print("\n".join(skipped(rows)))
    print(f"written to {path} after {time.perf_counter() - begin:.0f} s")
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
