"""README, docs and notebooks: code runs, commands exist, links lead somewhere, errors are real."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import moezoo
from moezoo import errors
from moezoo.assets import tiny_model
from moezoo.parallel.eplb.options import EPLB

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb"))
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page):
    text = (ROOT / page).read_text()
    if not page.endswith(".ipynb"):
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(page, language):
    return [code for its, code in BLOCK.findall(text_of(page)) if its == language]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A page's own hub ids are names of the small model, of one process; arguments are checked."""
    load, tokenize = moezoo.from_pretrained, transformers.AutoTokenizer.from_pretrained

    def from_pretrained(name, *, parallel=None, eplb=None, **options):
        assert parallel is None or isinstance(parallel, moezoo.Parallel)
        EPLB.of(eplb)
        if re.fullmatch(r"[\w-]+/[\w.-]+", str(name)):
            name, options = tiny_model(), {"dtype": "float32", **options}
        if isinstance(options.get("device_map"), dict):
            options["device_map"] = dict.fromkeys(options["device_map"], "cpu")
        model = load(name, **options)
        if parallel is not None:
            model.mesh = SimpleNamespace(rank=0, world_size=1, ep_size=1)
        return model

    monkeypatch.setattr(moezoo, "from_pretrained", from_pretrained)
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name: tokenize(tiny_model())
    )
    monkeypatch.chdir(tmp_path)


def evaluated(lm, tasks):
    assert isinstance(lm.model, moezoo.causal_lm.MoECausalLM) and lm.tokenizer is not None
    return {"results": dict.fromkeys(tasks, 0.5)}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, small, capsys, monkeypatch):
    if page == "docs/tools.md":
        pytest.importorskip("peft")
        lm_eval = pytest.importorskip("lm_eval")
        # It would download its questions; test_lm_eval.py has some of its own.
        monkeypatch.setattr(lm_eval, "simple_evaluate", evaluated)
    if page == "docs/routing.md" or page == "docs/parallel.md":
        pytest.importorskip("matplotlib")
    ids = torch.tensor([[5, 17, 300]])
    names = {"moezoo": moezoo, "input_ids": ids, "inputs": {"input_ids": ids}, "prompts": ["The"]}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)
    if "print(" in text_of(page):
        assert len(capsys.readouterr().out) > 50


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_a_kind_that_is_tested(page):
    for language, code in BLOCK.findall(text_of(page)):
        assert language in {"", "console", "json", "python", "text"}
        if language == "json" and code.strip():
            json.loads(code)
        if language in {"", "text"}:
            commands = re.findall(r"^(?:\$ |moezoo |python |pip |import )", code, re.MULTILINE)
            assert not commands, code
        if language == "console":
            assert code.startswith("$ ")


@pytest.mark.parametrize("page", PAGES)
def test_scripts_of_console_blocks_exist(page):
    for code in blocks(page, "console"):
        for script in re.findall(r"^\$ python (\S+\.py)", code, re.MULTILINE):
            assert (ROOT / script).is_file(), script


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text_of(page)), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", text_of(page))
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(str(path.resolve().relative_to(ROOT))), anchor
    for path in re.findall(r"`((?:moezoo|tests|docs|benchmarks)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_site_and_reached_from_the_readme():
    nav = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    readme = text_of("README.md")
    for page in ROOT.glob("docs/*.md"):
        assert f"- {page.name}" in nav
        assert f"(docs/{page.name})" in readme


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "index.html").read_text()
    assert "troubleshooting.html" in index
    assert (tmp_path / "notebooks" / "02_routing.ipynb").is_file()


ERRORS = [
    value.__name__
    for value in vars(errors).values()
    if isinstance(value, type)
    and (issubclass(value, Warning) or value.__base__ is errors.MoEZooError)
]


@cache
def messages():
    """All texts in the package, what is filled into them left out as `...`."""

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return str(node.value) if isinstance(node, ast.Constant) else "..."

    found = []
    for path in (ROOT / "moezoo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                found.append(re.sub(r"\s+", " ", text(node)))
    return "\n".join(found)


def test_every_class_of_errors_has_its_cause_and_cure():
    assert len(ERRORS) >= 7
    sections = re.split(r"^## ", text_of("docs/troubleshooting.md"), flags=re.MULTILINE)
    by_name = {section.split("\n")[0]: section for section in sections}
    for name in ERRORS:
        assert "| message | what to do |" in by_name[name], name
        (prefix,) = re.findall(r"^Begins with `(.*?)`", by_name[name], re.MULTILINE) or [None]
        if prefix is not None:
            assert str(getattr(errors, name)("what")) == f"{prefix} what"


ROWS = [
    message
    for row in re.findall(r"^\| (`.*?) \| ", text_of("docs/troubleshooting.md"), re.MULTILINE)
    for message in re.findall(r"`([^`]+)`", row)
    if message != "moezoo generate"
]


@pytest.mark.parametrize("message", ROWS)
def test_the_messages_of_the_page_are_those_of_the_code(message):
    pieces = re.split(r"\.\.\.|'", message)
    checked = [piece.strip() for piece in pieces if len(piece.strip()) > 5]
    assert checked
    for piece in checked:
        assert piece in messages(), piece
