"""What the scripts that plot results share."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"


def short(number: int) -> str:
    """16384 as 16k."""
    return str(number) if number < 1024 else f"{number // 1024}k"


def save(
    plot: Callable[[dict[str, Any]], Figure], description: str, name: str, *, rows: str
) -> None:
    """The command line: files of results, the first of which names the device and whose lists
    `rows` are put together, and where their picture goes, docs/`name` by default."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=DOCS / name)
    args = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in args.results]
    every = [row for document in documents for row in document[rows]]
    plot({**documents[0], rows: every}).savefig(args.output, dpi=130)
    print(f"written to {args.output}")
