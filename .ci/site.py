"""Hooks of mkdocs: what pages link to outside of docs becomes part of the site, README as index.

In the repository links lead to files beside each other; on the site all hangs below one folder.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def place(path: str) -> str:
    """Where a file of the repository is on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def source(page: str) -> str:
    """The file of the repository that a page of the site is made of."""
    if page == "index.md":
        return "README.md"
    return page if page in PAGES else f"docs/{page}"


def linked(text: str, path: str) -> set[str]:
    """Files of the repository that the text of `path` links to."""
    folder = posixpath.dirname(path)
    return {
        posixpath.normpath(posixpath.join(folder, target)) for _, target, _ in LINK.findall(text)
    }


def on_files(files: Files, *, config: Any) -> Files:
    wanted = set(PAGES)
    for path in (*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())):
        wanted |= linked((ROOT / path).read_text(), path)
    for path in sorted(wanted):
        if not path.startswith("docs/") and (ROOT / path).is_file():
            files.append(File.generated(config, place(path), abs_src_path=os.fspath(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    path = source(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri) or "."

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        return f"{match[1]}{posixpath.relpath(place(target), here)}{match[3]}"

    return LINK.sub(moved, markdown)
