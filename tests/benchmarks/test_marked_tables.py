import shutil
import sys
from pathlib import Path
from types import ModuleType

import generate_tables
import layer_tables
import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("script", [generate_tables, layer_tables], ids=lambda s: s.__name__)
def test_readme_has_the_results(script: ModuleType, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    shutil.copy(README, page)
    monkeypatch.setattr(sys, "argv", ["", str(page)])
    script.main()
    assert page.read_text() == README.read_text()
    for name in script.TABLES:
        assert f"{script.__name__}.py {name} -->" in page.read_text()
