"""`import moezoo` registers with transformers, whoever is imported first, and costs nothing."""

import subprocess
import sys

import pytest

from moezoo import experts_implementation


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_import_moezoo_imports_neither_torch_nor_transformers() -> None:
    assert python(
        "import sys, moezoo; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ).split() == ["False", "False"]


def test_moezoo_before_transformers() -> None:
    code = """
import sys, moezoo
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
left = [finder for finder in sys.meta_path if type(finder).__name__ == "_OnImport"]
print("moezoo" in ALL_EXPERTS_FUNCTIONS, bool(left))
"""
    assert python(code).split() == ["True", "False"]


def test_transformers_before_moezoo(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    monkeypatch.delitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "moezoo")
    finders = list(sys.meta_path)
    experts_implementation.register()
    assert "moezoo" in ALL_EXPERTS_FUNCTIONS
    assert sys.meta_path == finders
