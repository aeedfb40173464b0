"""Notebooks run from top to bottom, and what they are committed with is what a reader sees."""

import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
from execute import execute  # noqa: E402

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def shown(cell):
    """The kinds of a cell's outputs, without their numbers."""
    return [sorted(getattr(output, "data", {"text": ""})) for output in cell.get("outputs", [])]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_and_shows_what_is_committed(name):
    committed = nbformat.read(FOLDER / name, as_version=4)
    started = time.perf_counter()
    notebook = execute(FOLDER / name)
    assert time.perf_counter() - started < 120
    assert any(shown(cell) for cell in committed.cells)
    for before, now in zip(committed.cells, notebook.cells, strict=True):
        assert shown(before) == shown(now), before.source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_small_and_names_no_folder_of_the_machine_it_ran_on(name):
    text = (FOLDER / name).read_text()
    assert len(text) < 600_000
    for place in ("/root/", "/home/", "/work/", "/tmp/", "site-packages"):
        assert place not in text
