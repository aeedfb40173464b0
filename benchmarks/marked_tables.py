"""Tables of Markdown, and pages that have them between marks."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *map(list, rows))]


def renew(page: Path, script: str, made: Callable[[str], Iterable[str]]) -> None:
    """What lies between `<!-- benchmarks/script NAME -->` and `<!-- end -->` becomes made(NAME)."""
    marked = re.compile(
        rf"(<!-- benchmarks/{re.escape(script)} (\w+) -->\n).*?(<!-- end -->)", re.DOTALL
    )

    def anew(match: re.Match[str]) -> str:
        return "\n".join([match[1].rstrip("\n"), *made(match[2]), match[3]])

    page.write_text(marked.sub(anew, page.read_text()))
