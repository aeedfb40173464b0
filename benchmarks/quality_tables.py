"""The tables of what benchmarks/quality.py measured.

    python benchmarks/quality_tables.py README.md docs/quantization.md

In each page what lies between `<!-- benchmarks/quality_tables.py NAME -->` and `<!-- end -->`
becomes the table of that name anew. A cell with several values has them in the order of the
checkpoints in the result.
"""

import json
from pathlib import Path
from typing import Any

from marked_tables import renew_pages, table

RESULT = Path(__file__).parent / "results" / "quality_amd_epyc.json"
HEAD = ("experts", "bits per weight", "loss over bf16's", "top-1 changes", "error of weights")
SUMMARY = {
    "fp8, blocks": "`fp8_w8a8`",
    "int8, channels": "`int8_w8a16`",
    "int4, groups of 64": "`int4_w4a16`, groups of 64",
    "mxfp4": "`mxfp4`",
}
"""Schemes in the README's table."""

Entry = dict[str, Any]


def schemes() -> dict[str, list[Entry]]:
    """Return what was measured of each scheme, an entry for each checkpoint that can have it."""
    found: dict[str, list[Entry]] = {}
    for checkpoint in json.loads(RESULT.read_text())["checkpoints"].values():
        for entry in checkpoint["schemes"]:
            if entry["scheme"] not in ("bf16", "fp32"):
                found.setdefault(entry["scheme"], []).append(entry)
    return found


def summary() -> list[str]:
    found = schemes()
    return table(HEAD, (_line(title, found[name]) for name, title in SUMMARY.items()))


def whole() -> list[str]:
    return table(HEAD, (_line(name, entries) for name, entries in schemes().items()))


def _line(title: str, entries: list[Entry]) -> list[str]:
    bits = sorted({f"{entry['bits_per_weight']:.4g}" for entry in entries}, key=float)
    worst = max(error for entry in entries for error in entry["weight_error_by_layer"])
    return [
        title,
        " to ".join(dict.fromkeys((bits[0], bits[-1]))),
        ", ".join(f"{entry['loss_over_bf16']:+.4f}" for entry in entries),
        ", ".join(f"{100 * entry['top1_changed']:.1f} %" for entry in entries),
        f"{100 * worst:.1f} %",
    ]


if __name__ == "__main__":
    renew_pages(__doc__ or "", Path(__file__).name, {"summary": summary, "whole": whole})
