"""Helpers of the scripts that plot results."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"


def short(number: int) -> str:
    """Return 16384 as 16k."""
    return str(number) if number < 1024 else f"{number // 1024}k"


def save(
    plot: Callable[[dict[str, Any]], Figure], description: str, name: str, *, rows: str
) -> None:
    """Parse the command line and save the plot, to docs/`name` by default.

    It names files of results, whose lists `rows` are concatenated; the first names the device.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=DOCS / name)
    args = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in args.results]
    every = [row for document in documents for row in document[rows]]
    plot({**documents[0], rows: every}).savefig(args.output, dpi=130)
    print(f"written to {args.output}")
