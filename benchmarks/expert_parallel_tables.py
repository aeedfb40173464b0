"""The tables of what benchmarks/expert_parallel.py measured.

    python benchmarks/expert_parallel_tables.py results/expert_parallel_4x_*.json [--write PAGE ..]

Prints them; with --write each page gets, between `<!-- benchmarks/expert_parallel_tables.py NAME
-->` and `<!-- end -->`, the table of that name anew.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from marked_tables import renew, table

Row = dict[str, Any]


def microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:,.{0 if seconds >= 1e-5 else 1}f}"


def correctness(rows: list[Row]) -> list[str]:
    """Return the largest difference of logits of each way, over all models and placements."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        of_format = found.setdefault((row["format"], row["ranks"]), {})
        for way, difference in row["difference"].items():
            of_format[way] = max(of_format.get(way, 0), difference)
    ways = list(dict.fromkeys(way for of_format in found.values() for way in of_format))
    return table(
        ["format", "ranks", *ways],
        (
            [name, str(ranks), *(f"{of[way]:.4f}" if way in of else "" for way in ways)]
            for (name, ranks), of in sorted(found.items())
        ),
    )


def generation(rows: list[Row]) -> list[str]:
    return table(
        ["model", "ranks", "dispatch", "switches", "texts as without EPLB", "as one GPU's"],
        (
            [row["model"], str(row["ranks"]), row["dispatch"], str(row["switches"])]
            + [f"{row[name]:.0%}" for name in ("equal", "equal_to_one_gpu")]
            for row in rows
        ),
    )


def decode(rows: list[Row]) -> list[str]:
    numbers = sorted({number for row in rows for number in row["seconds"]}, key=int)
    return table(
        ["model", "GPUs", "dispatch", *(f"{n} rows, ms" for n in numbers)]
        + [f"{n} rows, tok/s" for n in numbers],
        (
            [row["case"], str(row["ranks"] or 1), row["dispatch"]]
            + [f"{1e3 * row['seconds'][n]:.2f}" if n in row["seconds"] else "" for n in numbers]
            + [
                f"{row['tokens_per_second'][n]:,.0f}" if n in row["seconds"] else ""
                for n in numbers
            ]
            for row in rows
        ),
    )


def layer(rows: list[Row]) -> list[str]:
    sizes = sorted({size for row in rows for size in row["ranks"]}, key=int)
    return table(
        ["layer, us", "tokens", "one GPU", "world size 1"]
        + [
            f"{size} GPUs: {name}"
            for size in sizes
            for name in ("all_to_all", "of which on the wire", "all_gather")
        ],
        (line for row in rows for line in _lines_of_layer(row, sizes)),
    )


def _lines_of_layer(row: Row, sizes: list[str]) -> Iterator[list[str]]:
    for form in ("", ", graph"):
        alone = [row["seconds"].get(way + form) for way in ("one GPU", "world size 1")]
        if alone[0] is None:
            continue
        cells = [microseconds(seconds) for seconds in alone]
        for size in sizes:
            found = row["ranks"].get(size, {"seconds": {}})
            cells += [
                microseconds(found["seconds"].get("all_to_all" + form)),
                microseconds(found.get("wire_seconds")),
                microseconds(found["seconds"].get("all_gather" + form)),
            ]
        case = row["case"] + (", captured" if form else "")
        yield [case, f"{row['tokens']:,}", *cells]


def overlap(rows: list[Row]) -> list[str]:
    """Return the time of travel that chunks hide behind experts, over the most that they could."""

    def cells(row: Row, size: str, found: Row) -> list[str]:
        travel, compute = found["travel_seconds"], found["compute_seconds"]
        times = [found["seconds"].get(f"all_to_all{n}") for n in ("", ", 2 chunks", ", 4 chunks")]
        best = min(seconds for seconds in times[1:] if seconds is not None)
        hidden = (travel + compute - best) / min(travel, compute)
        numbers = [travel, compute, *times]
        return [
            row["case"],
            size,
            f"{row['tokens']:,}",
            *map(microseconds, numbers),
            f"{hidden:.0%}",
        ]

    return table(
        [
            *("layer, us", "GPUs", "tokens", "travelling", "experts"),
            *("one part", "2 chunks", "4 chunks", "hidden at best"),
        ],
        (
            cells(row, size, found)
            for row in rows
            for size, found in row["ranks"].items()
            if "travel_seconds" in found
        ),
    )


def eplb(rows: list[Row]) -> list[str]:
    def cells(row: Row) -> list[str]:
        seconds, cost = row["seconds"], row["cost"]
        found = [row["steps"], row["eplb"], str(row["ranks"]), f"{row['balancedness']:.2f}"]
        found += [f"{1e3 * row[name]:.2f}" for name in ("mean_seconds", "slowest_seconds")]
        found.append(f"{1e3 * seconds['nothing']:.2f}" if "nothing" in seconds else "")
        for kind in ("piece", "switch"):
            told = f"{1e3 * seconds[kind]:.2f} ({cost[kind]:+.1%})" if kind in cost else ""
            found += [str(row["number"][kind] or ""), told]
        return found

    return table(
        [
            *("steps", "EPLB", "GPUs", "balancedness", "mean, ms", "slowest, ms", "step, ms"),
            *("pieces", "step with one, ms", "switches", "step with one, ms"),
        ],
        map(cells, rows),
    )


def load(rows: list[Row]) -> list[str]:
    return table(
        ["GPUs", "checkpoint, GB", "read by a rank, GB", "seconds"],
        (
            [
                str(row["ranks"]) if row["ranks"] else "one, without ranks",
                f"{row['checkpoint_bytes'] / 1e9:.1f}",
                f"{max(row['bytes_read']) / 1e9:.1f}",
                f"{min(row['seconds']):.2f}",
            ]
            for row in rows
        ),
    )


def pack(rows: list[Row]) -> list[str]:
    names = ("gather", "pack", "unpack", "sum_answers", "pack fp8", "unpack fp8")
    return table(
        ["tokens", "width", "copy, TB/s", *(f"{name}, of it" for name in names)],
        (
            [f"{row['tokens']:,}", f"{row['hidden_size']:,}", f"{row['copy'] / 1e12:.2f}"]
            + [f"{row[name]:.0%}" for name in names]
            for row in rows
        ),
    )


TABLES: dict[str, tuple[str, Callable[[list[Row]], list[str]]]] = {
    "correctness": ("correctness", correctness),
    "generation": ("generation", generation),
    "decode": ("decode", decode),
    "eplb": ("eplb", eplb),
    "layer": ("layer", layer),
    "overlap": ("layer", overlap),
    "load": ("load", load),
    "pack": ("pack", pack),
}
"""Name of a table -> its section, and the function that makes it."""


def lines(section: str, rows: list[Row]) -> Iterator[str]:
    """Yield the lines of all tables of a section."""
    for name, (of, made) in TABLES.items():
        if of == section and rows:
            yield from [f"{name}:", *made(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--write", nargs="+", type=Path, default=[], metavar="PAGE")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())

    def made(name: str) -> list[str]:
        section, of_rows = TABLES[name]
        return of_rows(result[section])

    for page in args.write:
        renew(page, "expert_parallel_tables.py", made)
    if not args.write:
        for section in dict.fromkeys(section for section, _ in TABLES.values()):
            print("\n".join(lines(section, result.get(section, []))))


if __name__ == "__main__":
    main()
