"""The README and the pages in docs tell the truth: their commands and tables are the program's."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import moezoo
from moezoo import cli

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{x.name}" for x in ROOT.glob("docs/*.md")))
CONSOLE = [
    line.removeprefix("$ ").split(" #")[0].split(" >>")[0].strip()
    for page in PAGES
    for block in re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]


@pytest.mark.parametrize(
    "command", [command for command in CONSOLE if command.startswith("moezoo ")]
)
def test_moezoo_commands_parse(command):
    _, *arguments = shlex.split(command)
    if arguments == ["--version"]:
        pytest.skip("it ends there, and is tested in test_cli.py")
    assert callable(cli.parser().parse_args(arguments).run)


def test_the_run_that_the_readme_shows_is_the_run_of_its_command(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    prompts = re.findall(r'^\{"id": "\w+", "prompt": "[^"]*"\}$', readme, re.MULTILINE)
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    monkeypatch.chdir(tmp_path)
    command = next(line for line in CONSOLE if "--output stories.jsonl" in line)
    assert cli.main(shlex.split(command)[1:]) == 0
    completions = (tmp_path / "stories.jsonl").read_text()
    runs = re.findall(r'"run": "\w+"', completions)
    assert len(runs) == len(prompts) == 2
    assert re.findall(r'"run": "\w+"', readme) == runs


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    used = [command.split()[1] for command in CONSOLE if command.startswith("make ")]
    assert {"demo", "test", "lint"} <= set(used) <= set(targets)


@pytest.mark.parametrize(
    "command", [command for command in CONSOLE if command.startswith(".venv/bin/pytest tests")]
)
def test_pytest_commands_select_tests(command):
    _, *arguments = shlex.split(command)
    pytest_only = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    collected = subprocess.run(pytest_only, cwd=ROOT, capture_output=True, text=True)
    assert collected.returncode == 0, collected.stdout


def test_the_table_of_architectures_is_the_registry():
    table = (ROOT / "README.md").read_text().split("## Architectures")[1].split("##")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == (
        moezoo.list_architectures()
    )


def test_exit_codes_are_those_of_the_help():
    in_readme = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    in_help = re.findall(r"^  (\d+) ", cli.EXIT_CODES, re.MULTILINE)
    assert in_readme == in_help
