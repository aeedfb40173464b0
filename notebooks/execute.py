"""Run notebooks from top to bottom and keep what they put out.

    python notebooks/execute.py [FILE ..]

Without files it runs all. What goes to stderr (progress bars, warnings with paths of the machine)
and the times of cells are not kept.
"""

import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent


def execute(path: Path) -> NotebookNode:
    """The notebook with its outputs, run in its own folder; a cell that fails raises."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _kept(cell.outputs)
    return notebook


def _kept(outputs: list[Any]) -> list[Any]:
    """Without stderr, and what was printed piece by piece in one piece."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
        elif output.name == "stdout":
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            else:
                kept.append(output)
    return kept


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        started = time.perf_counter()
        notebook = execute(path)
        notebook.metadata.pop("language_info", None)  # the version of this Python
        nbformat.write(notebook, path)
        print(f"{path}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
