"""The tables of what benchmarks/generate.py measured.

    python benchmarks/generate_tables.py README.md docs/performance.md

In each page what lies between `<!-- benchmarks/generate_tables.py NAME -->` and `<!-- end -->`
becomes the table of that name anew, from the whole run on an H100.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marked_tables import MODEL_NAMES, renew_pages, table

RESULT = Path(__file__).parent / "results" / "generate_nvidia_h100_80gb_hbm3.json"
TITLES = {case: MODEL_NAMES[case] for case in ("qwen3-30b-a3b", "olmoe-1b-7b", "deepseek-v2-lite")}
CONTEXTS = (512, 8192)

Row = dict[str, Any]


def rows(section: str, case: str) -> list[Row]:
    found: list[Row] = json.loads(RESULT.read_text())["rows"]
    return [row for row in found if (row["section"], row["case"]) == (section, case)]


def summary() -> list[str]:
    """moezoo's figures beside transformers', one column for each model."""
    lines = []
    for batch in (1, 8, 32):
        found = [_row("decode", case, batch=batch, context=CONTEXTS[0]) for case in TITLES]
        paces = (row["tokens_per_second"] for row in found)
        label = f"tokens per second, {batch} text{'s at once' if batch > 1 else ''}"
        lines.append([label, *(_pair(p["moezoo"], p["transformers"]) for p in paces)])
        if batch == 1:
            shares = (f"{100 * row['of_roofline']:.0f} %" for row in found)
            lines.append(["share of what the memory bandwidth allows, 1 text", *shares])
    found = [_row("prefill", case, prompt_tokens=2048) for case in TITLES]
    pairs = (f"**{_ms(row, 'moezoo')}** / {_ms(row, 'transformers')}" for row in found)
    lines.append(["a prompt of 2,048 tokens, ms", *pairs])
    found = [_row("offline", case) for case in TITLES]
    paces = (row["contenders"]["moezoo"]["output_tokens_per_second"] for row in found)
    pairs = (_pair(p, p / row["times_static"]) for p, row in zip(paces, found, strict=True))
    lines.append(["512 prompts of mixed lengths, new tokens per second", *pairs])
    return table(["moezoo / transformers", *TITLES.values()], lines)


def _row(section: str, case: str, **where: int) -> Row:
    (row,) = (r for r in rows(section, case) if where.items() <= r.items())
    return row


def _pair(ours: float, theirs: float) -> str:
    return f"**{ours:,.0f}** / {theirs:,.0f}"


def decoding() -> list[str]:
    head = ("model, rows x tokens before", "moezoo", "of the limit", "transformers")
    return table(head, (line for case in TITLES for line in _decoding(case)))


def _decoding(case: str) -> Iterator[list[str]]:
    for row in sorted(rows("decode", case), key=lambda row: (row["context"], row["batch"])):
        pace = row["tokens_per_second"]
        if row["context"] in CONTEXTS and "moezoo" in pace:
            yield [
                f"{TITLES[case]}, {row['batch']} x {row['context']:,}",
                f"{pace['moezoo']:,.0f}",
                f"{100 * row['of_roofline']:.0f} %",
                f"{pace['transformers']:,.0f}" if "transformers" in pace else "",
            ]


def prompts() -> list[str]:
    lines, head = [], ["tokens"]
    for case, title in TITLES.items():
        found = sorted(rows("prefill", case), key=lambda row: row["prompt_tokens"])
        head[1:] = [f"{row['prompt_tokens']:,}" for row in found]
        ours = (f"{_ms(row, 'moezoo')} ({100 * row['of_peak']['moezoo']:.0f} %)" for row in found)
        lines.append([f"{title}, moezoo", *ours])
        lines.append([f"{title}, transformers", *(_ms(row, "transformers") for row in found)])
    return table(head, lines)


def _ms(row: Row, name: str) -> str:
    if name not in row["seconds"]:
        return ""
    ms = 1e3 * row["seconds"][name]["median"]
    return f"{ms:,.1f}" if ms < 100 else f"{ms:,.0f}"


def many_prompts() -> list[str]:
    head = (
        *("", "seconds", "new tokens a second", "with the prompts'"),
        *("transformers' `generate` would take", "its `generate_batch`, with the prompts'"),
    )
    lines = []
    for case, title in TITLES.items():
        row = _row("offline", case)
        ours, beside = (
            row["contenders"].get(name) for name in ("moezoo", "transformers_generate_batch")
        )
        lines.append(
            [
                title,
                f"{ours['seconds']:.0f}",
                f"{ours['output_tokens_per_second']:,.0f}",
                f"{ours['total_tokens_per_second']:,.0f}",
                f"{row['times_static']:.0f} times as long",
                "" if beside is None else f"{beside['total_tokens_per_second']:,.0f}",
            ]
        )
    return table(head, lines)


TABLES = {
    "summary": summary,
    "decoding": decoding,
    "prompts": prompts,
    "many_prompts": many_prompts,
}


def main() -> None:
    renew_pages(__doc__, "generate_tables.py", TABLES)


if __name__ == "__main__":
    main()
