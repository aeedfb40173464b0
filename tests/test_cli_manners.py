"""What holds of every command: help with examples, quiet, JSON, completion; and the doctor."""

import json
import logging
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from moezoo import cli
from moezoo.assets import tiny_model
from moezoo.cli import completion
from moezoo.tools import doctor

COMMANDS = {
    name: its for name, its in completion._commands("moezoo", cli.parser()) if its._defaults
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(name):
    help = COMMANDS[name].format_help()
    examples = help.split("examples:\n")[1].split("\n\n")[0].splitlines()
    assert examples
    for line in examples:
        command = line.strip().split(" >>")[0].split(" <")[0]
        assert command.startswith(f"{name} ") or command == name
        assert callable(cli.parser().parse_args(shlex.split(command)[1:]).run)
    assert "exit codes:" in help
    assert max(map(len, help.splitlines())) <= 110


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_quiet_verbose_and_debugged(name):
    options = COMMANDS[name]._option_string_actions
    assert {"--quiet", "-q", "--verbose", "-v", "--debug"} <= options.keys()
    if "--json" in options:
        assert options["--json"].nargs == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate --prompt a --seed x", "moezoo generate: error: argument --seed: "),
        ("eplb foo", "moezoo eplb: error: argument ACTION: invalid choice: 'foo'"),
        ("", "moezoo: error: the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_option_is_two_lines(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(message)
    assert hint == f"see {error.partition(':')[0]} --help"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inspect {model} --expert-parallel 2 --placement .", "--placement is '.', expected"),
        ("inspect {model} --revision main", "--revision is of hub models, and {model} is a folder"),
        ("convert {model} to --revision main", "--revision is of hub models"),
        ("convert {model} to --measure none", "--measure: none cannot be read as text: "),
        ("tune 128,8,2048,768 --output .", "--output must be a file, and . is a folder"),
        ("routing --input in.jsonl --html .", "--html must be a file, and . is a folder"),
        ("routing --input in.jsonl --output a/b", "--output a/b: there is no folder a"),
    ],
)
def test_a_wrong_file_names_its_option(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.format(model=tiny_model()).split()) == 2
    assert message.format(model=tiny_model()) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_commands_with_a_table_have_json():
    with_json = {name for name, its in COMMANDS.items() if "--json" in its._option_string_actions}
    tables = ("inspect", "routing", "eplb simulate", "bench layer", "doctor")
    assert with_json == {f"moezoo {name}" for name in tables}


ADVICE = "pip install 'moezoo[plots]'"


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(doctor, "_model", lambda: iter(()))  # slow, and tested below


def test_the_doctor_tells_what_is_there(capsys, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["doctor", "--json"]) == 0
    findings = {x["subject"]: x for x in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["torch"]["state"] == "works"
    assert findings["torch"]["detail"] == torch.__version__
    assert findings["GPU"]["state"] == "missing"
    assert "GB free" in findings["memory"]["detail"]
    assert cli.main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert findings["Python"]["detail"] in table  # a path is whole, however long
    assert "hub cache" in table
    assert "\x1b" not in table  # colours are for terminals


def test_tables_take_no_text_for_markup(capsys, found, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_extras", lambda: iter([doctor.Finding("a", "works", "", ADVICE)]))
    assert cli.main(["doctor"]) == 0
    assert ADVICE in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(tiny_model(), "[bold]x:dog:")
    assert cli.main(["inspect", folder]) == 0
    assert "[bold]x:dog:" in capsys.readouterr().out
    (tmp_path / "in.jsonl").write_text('{"prompt": "The dog"}')
    assert cli.main(["routing", folder, "--input", "in.jsonl", "--device", "cpu"]) == 0
    assert "Routing of [bold]x:dog:" in capsys.readouterr().out


def test_the_doctor_goes_on_where_something_is_broken(capsys, found, monkeypatch):
    def _gpus():
        raise RuntimeError("no driver")

    monkeypatch.setattr(doctor, "_gpus", _gpus)
    monkeypatch.setattr(
        doctor.metadata, "version", lambda name: {"torch": "2.4.1"}.get(name, "5.20.0")
    )
    assert cli.main(["doctor", "--json"]) == 1
    findings = {x["subject"]: x for x in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["gpus"] == {
        "subject": "gpus",
        "state": "broken",
        "detail": "RuntimeError: no driver",
        "advice": "",
    }
    assert findings["torch"]["state"] == "broken"
    assert findings["torch"]["advice"] == "pip install 'torch>=2.11'"
    assert findings["transformers"]["state"] == "works"
    assert "memory" in findings


def test_the_doctor_runs_the_small_model():
    (finding,) = doctor._model()
    assert finding.state == "works"
    assert "Once upon a time" in finding.detail


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("moezoo ge", {"generate"}),
        ("moezoo eplb ", {"plan", "simulate", "-h", "--help"}),
        ("moezoo eplb simulate --ha", {"--half-life"}),
        ("moezoo generate --prompt inspect --temp", {"--temperature"}),
        ("moezoo generate --dtype b", {"bfloat16"}),
        ("moezoo completion z", {"zsh"}),
    ],
)
def test_bash_completes(line, offered, capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = line.split(" ")
    quoted = " ".join(map(shlex.quote, words))
    ask = f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _moezoo\n"
    ask += 'printf "%s\\n" "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


def test_verbose_shows_what_is_logged(capsys):
    assert cli.main(["inspect", str(tiny_model()), "-v"]) == 0
    assert logging.getLogger("moezoo").level == logging.INFO
    logging.getLogger("moezoo").setLevel(logging.NOTSET)
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--prompt", "The dog", "-v", "-q"])
    assert stop.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


INTERRUPTED = """
import signal, sys

at = sys.argv.pop(1)

class Finder:
    def find_spec(self, name, path, target):
        if name == "moezoo.cli":
            print("begins", flush=True)
        if name == at:
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:
                pass  # lost, as in some places of torch and transformers

signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of xdist ignore it
sys.meta_path.insert(0, Finder())
from moezoo.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "when",
    ["moezoo.cli", "torch", "torch._C", "transformers.modeling_utils", 0, 0.1, 0.4, 1.2],
)
def test_ctrl_c_ends_a_command_while_it_starts(when):
    """At the import of a module, or so many seconds after the first."""
    command = [sys.executable, "-c", INTERRUPTED, str(when), "generate", "--quiet"]
    # What reads stdin, once all is imported, goes on until that is closed.
    command += ["--prompt", "The dog"] if isinstance(when, str) else ["--input", "-"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "begins\n"
            if not isinstance(when, str):
                time.sleep(when)
                process.send_signal(signal.SIGINT)
            code = process.wait(60)
        finally:
            process.kill()  # one that hangs, which the end of the block would wait for
        assert (code, process.stdout.read()) == (130, "")
        assert process.stderr.read() in ("", "moezoo: interrupted\n")


def run_by_main(definitions: str) -> subprocess.CompletedProcess[str]:
    """What becomes of `run`, which the definitions have, as what the command line runs."""
    script = f"""
import signal, threading, time

import moezoo.cli
from moezoo.__main__ import main
{definitions}
signal.signal(signal.SIGINT, signal.default_int_handler)
moezoo.cli.main = run
raise SystemExit(main())
"""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50
    )


IN_A_FINALIZER = """
class Late:
    def __del__(self):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

class Broken:
    def __del__(self):
        raise ValueError("of a finalizer")

def run():
    Broken()
    Late()
    time.sleep(60)
"""


def test_ctrl_c_in_a_finalizer_is_not_lost():
    done = run_by_main(IN_A_FINALIZER)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("Exception ignored in")
    assert done.stderr.endswith("ValueError: of a finalizer\n")


WITH_A_LOCK = """
class Interrupting:
    def __init__(self):
        self.lock = threading.Lock()
        self.acquire, self.release = self.lock.acquire, self.lock.release

    def __enter__(self):
        self.lock.__enter__()
        signal.raise_signal(signal.SIGINT)

    def __exit__(self, *error):
        signal.raise_signal(signal.SIGINT)
        self.lock.__exit__(*error)

def run():
    lock = Interrupting()
    with threading.Condition(lock):
        pass
    print("free", not lock.lock.locked(), flush=True)
    time.sleep(60)
"""


def test_ctrl_c_leaves_no_lock_taken():
    done = run_by_main(WITH_A_LOCK)
    assert (done.returncode, done.stdout) == (130, "free True\n")


def test_ctrl_c_at_a_late_import_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, "moezoo.models.common.feed_forward", "convert"]
    command += [str(tiny_model()), str(tmp_path / "out"), "--quantization", "int8_w8a16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "begins\n")
    assert "moezoo: interrupted" in done.stderr
    assert list(tmp_path.iterdir()) == []
