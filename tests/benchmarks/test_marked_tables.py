import shutil
import sys
from pathlib import Path
from types import ModuleType

import generate_tables
import layer_tables
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "performance.md"]


@pytest.mark.parametrize("script", [generate_tables, layer_tables], ids=lambda s: s.__name__)
def test_pages_have_the_results(script: ModuleType, tmp_path, monkeypatch):
    pages = [tmp_path / page.name for page in PAGES]
    for page, copy in zip(PAGES, pages, strict=True):
        shutil.copy(page, copy)
    monkeypatch.setattr(sys, "argv", ["", *map(str, pages)])
    script.main()
    texts = [page.read_text() for page in pages]
    assert texts == [page.read_text() for page in PAGES]
    for name in script.TABLES:
        assert f"{script.__name__}.py {name} -->" in "".join(texts)
