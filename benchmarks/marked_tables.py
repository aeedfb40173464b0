"""Markdown tables, and pages that contain them between marks."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

MODEL_NAMES = {
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "mixtral-8x7b": "Mixtral-8x7B",
    "deepseek-v3": "DeepSeek-V3",
    "olmoe-1b-7b": "OLMoE-1B-7B",
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
    "gpt-oss-20b": "gpt-oss-20b",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *map(list, rows))]


def renew(page: Path, script: str, made: Callable[[str], Iterable[str]]) -> None:
    """Put made(NAME) between `<!-- benchmarks/script NAME -->` and `<!-- end -->`."""
    marked = re.compile(
        rf"(<!-- benchmarks/{re.escape(script)} (\w+) -->\n).*?(<!-- end -->)", re.DOTALL
    )

    def anew(match: re.Match[str]) -> str:
        return "\n".join([match[1].rstrip("\n"), *made(match[2]), match[3]])

    page.write_text(marked.sub(anew, page.read_text()))


def renew_pages(about: str, script: str, tables: Mapping[str, Callable[[], Iterable[str]]]) -> None:
    """Renew the pages that the command line names; the main function of such scripts."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    for page in parser.parse_args().pages:
        renew(page, script, lambda name: tables[name]())
