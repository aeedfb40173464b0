"""`moezoo generate --expert-parallel N`: files, exit codes and faults of many processes."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import die, run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from moezoo import cli
from moezoo.errors import RankError
from moezoo.generation.engine import Engine
from moezoo.generation.prompt_files import OutputFile
from moezoo.generation.texts import Completion
from moezoo.loaders import load
from moezoo.parallel import launch
from moezoo.tools.job import shares

OPTIONS = ["--greedy", "--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu", "--quiet"]
OPTIONS += ["--quantization", "int4_w4a16"]  # which warns of the size of groups
# Ranks of a busy machine begin seconds apart.
TIMEOUT = ["--rank-timeout", "10"]
TEXTS = [f"Once there were {n} little dogs" + n * " and a cat" for n in range(7)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return file


def command(prompts: Path, output: Path, *options: str) -> list[str]:
    return ["generate", "--input", str(prompts), "--output", str(output), *OPTIONS, *options]


def lines(file: Path) -> list[str]:
    return sorted(file.read_text().splitlines()) if file.exists() else []


class Ended(BaseException):
    """Instead of the end of the process."""


def main_(rank: int, command: list[str], fault: tuple[int, str, int] | None = None) -> Any:
    """Exit code, stdout and stderr of a rank. A fault is (rank, what, n): it dies or has no
    memory in the n-th step, or cannot write the n-th completion."""

    def exits(code: int) -> None:
        raise Ended(code)

    os._exit = exits  # type: ignore[assignment]
    cli.sleep = lambda _: exits(2)  # as torchrun ends it when rank 0 has
    step = Engine.step
    count = 0

    def faulty(self: Engine, *args: Any) -> Any:
        nonlocal count
        count += 1
        if fault is not None and (rank, count) == (fault[0], fault[2]):
            if fault[1] == "dies":
                die()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args)

    def full(self: OutputFile, completion: Completion) -> None:
        nonlocal count
        count += 1
        if count == fault[2]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, completion)

    if fault == (rank, "dies loading", 1):
        load.load_weights = lambda *_, **__: die()  # type: ignore[assignment]
    elif fault is not None and fault[1] == "full":
        write, OutputFile.write = OutputFile.write, full  # type: ignore[method-assign]
    else:
        Engine.step = faulty  # type: ignore[method-assign]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(command)
        except Ended as end:
            code = end.args[0]
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("one")
    (folder / "in.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in TEXTS))
    assert cli.main(command(folder / "in.jsonl", folder / "out.jsonl")) == 0
    return lines(folder / "out.jsonl")


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_one_file_and_it_goes_on(
    dispatch: str, prompts: Path, tmp_path: Path, expected: list[str]
) -> None:
    output = tmp_path / "out.jsonl"
    # Two there already, and half of a third.
    output.write_text("\n".join(expected[:2]) + "\n" + expected[2][:30])
    asked = command(prompts, output, "--expert-parallel", "2", "--dispatch", dispatch)
    # With all_gather these are two groups, each with its part of the prompts.
    size = 3 if dispatch == "all_to_all" else 4
    asked[asked.index("--expert-parallel") + 1] = "3" if size == 3 else "2"
    assert [code for code, _, _ in run(size, main_, asked)] == [0] * size
    assert lines(output) == expected
    # There is nothing to do: no model is loaded, and none of the ranks waits.
    assert [code for code, _, _ in run(size, main_, asked)] == [0] * size
    assert lines(output) == expected


def test_it_starts_its_processes(prompts: Path, tmp_path: Path, expected: list[str]) -> None:
    prompts.write_text(prompts.read_text() + "not json\n")
    output = tmp_path / "out.jsonl"
    asked = command(prompts, output, "--expert-parallel", "2", "--placement", "round_robin")
    ended = subprocess.run(
        [sys.executable, "-m", "moezoo", *asked], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 3
    skipped, warning = ended.stderr.splitlines()
    assert skipped == f"moezoo: skipped {prompts}:8: not JSON: {_not_json()}"
    assert "int4_w4a16: groups of 64 columns" in warning
    assert lines(output) == expected


def _not_json() -> str:
    try:
        json.loads("not json\n")
    except json.JSONDecodeError as error:
        return str(error)
    raise AssertionError


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--strict"], 2, "1 bad input lines and --strict: nothing was generated"),
        (["--chat"], 2, "has no chat template: leave --chat out"),
        (["--placement", "nowhere.json"], 2, "Expert map mismatch: placement is 'nowhere.json'"),
        (
            ["--expert-parallel", "3"],
            2,
            "Expert map mismatch: expert_parallel_size is 3, and there",
        ),
    ],
)
def test_all_ranks_end_with_one_code(
    change: list[str], code: int, message: str, prompts: Path, tmp_path: Path
) -> None:
    prompts.write_text(prompts.read_text() + "not json\n")
    asked = command(prompts, tmp_path / "out.jsonl", "--expert-parallel", "2", *change)
    (first, _, said), (second, _, quiet) = run(2, main_, asked)
    assert (first, second) == (code, code)
    assert message in said and message not in quiet
    assert not (tmp_path / "out.jsonl").exists()


def test_ranks_with_other_options(prompts: Path, tmp_path: Path) -> None:
    asked = command(prompts, tmp_path / "out.jsonl", "--expert-parallel", "2")
    found = run(2, _with_other_options, asked)
    assert [code for code, _, _ in found] == [2, 2]
    assert "Parallel.dispatch is all_to_all on rank 0 and all_gather on rank 1" in found[0][2]


def _with_other_options(rank: int, asked: list[str]) -> Any:
    return main_(rank, asked + ["--dispatch", "all_gather"] * rank)


def test_options_of_ranks_are_checked_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, message in (
        (["--dispatch", "all_gather"], "need --expert-parallel"),
        (["--expert-parallel", "2", "--device", "cuda:1"], "--device cuda:1 is one GPU"),
        (["--expert-parallel", "2", "--placement", "nowhere.json"], "there is no such file"),
    ):
        assert cli.main(["generate", "--prompt", "A", *options]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["generate", "--prompt", "A"]) == 2
    assert "there are 2 processes: say with --expert-parallel" in capsys.readouterr().err


def test_a_rank_says_what_rank_0_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(cli, "sleep", waited.append)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.main(["generate", "--prompt", "A", "--expert-parallel", "2"]) == 2
    assert "rank 2: error: process 2 of this host has no GPU of its" in capsys.readouterr().err
    assert waited == [cli.BEHIND_RANK_0]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ((2, "dies", 3), "rank 2 gave no sign of life"),
        ((2, "dies loading", 1), "rank 2 gave no sign of life"),
        ((1, "memory", 3), "Out of memory during MoE: on rank 1, without which the others end"),
    ],
    ids=["dies", "dies loading", "memory"],
)
def test_a_rank_is_gone(
    fault: tuple[int, str, int], says: str, prompts: Path, tmp_path: Path, expected: list[str]
) -> None:
    output = tmp_path / "out.jsonl"
    asked = command(prompts, output, "--expert-parallel", "3", *TIMEOUT, "--batch-size", "1")
    began = time.monotonic()
    fails = fault[1] == "memory"
    found = run(3, main_, asked, fault, never=[] if fails else [fault[0]])
    assert time.monotonic() - began < 60
    for rank, result in enumerate(found):
        if fails or rank != fault[0]:
            assert result[0] == 1
            assert says in result[2]
    written = lines(output)
    assert set(written) < set(expected)
    assert cli.main(command(prompts, output)) == 0
    assert lines(output) == expected


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_the_disk_is_full(
    dispatch: str, prompts: Path, tmp_path: Path, expected: list[str]
) -> None:
    output = tmp_path / "out.jsonl"
    asked = command(prompts, output, "--expert-parallel", "2", *TIMEOUT, "--batch-size", "1")
    found = run(2, main_, [*asked, "--dispatch", dispatch], (0, "full", 3))
    (code, _, said), (other, _, heard) = found
    assert (code, other) == (1, 1)
    assert f"No space left on device: '{output}'" in said
    assert "Expert parallelism stopped" in heard and "rank 0" in heard
    assert len(lines(output)) == 2 and set(lines(output)) < set(expected)


def test_a_process_is_killed(prompts: Path, tmp_path: Path, expected: list[str]) -> None:
    """One that this command has started itself: it says which, and none is left."""
    # More than can be completed before it is killed.
    prompts.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in TEXTS * 1000))
    output = tmp_path / "out.jsonl"
    asked = command(prompts, output, "--expert-parallel", "2", "--batch-size", "4")
    with subprocess.Popen(
        [sys.executable, "-m", "moezoo", *asked], stderr=subprocess.PIPE, text=True
    ) as process:
        while not lines(output):
            assert process.poll() is None, "it ended before a rank could be killed"
            time.sleep(0.1)
        children = _children(process.pid)
        (second,) = (child for child in children if "RANK=1" in _environment(child))
        os.kill(second, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 was ended by SIGKILL" in said
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert lines(output)


def _children(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return sorted(int(child) for task in tasks for child in task.read_text().split())


def _environment(process: int) -> list[str]:
    return Path(f"/proc/{process}/environ").read_text().split("\0")


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (1, -signal.SIGKILL, "rank 1 was ended by SIGKILL"),
        (-signal.SIGKILL, -signal.SIGTERM, "rank 0 was ended by SIGKILL"),
        (-signal.SIGABRT, -signal.SIGSEGV, "rank 1 was ended by SIGSEGV"),
        (-signal.SIGTERM, -signal.SIGABRT, "rank 1 was ended by SIGABRT"),
        (2, 1, 2),
        (-signal.SIGABRT, 1, 1),
        (-signal.SIGTERM, 1, 1),
    ],
)
def test_who_was_killed_is_said_whoever_else_ended_in_that_second(
    first: int, second: int, said: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = {
        rank: ProcessFailure(rank, 0, code, "") for rank, code in enumerate((first, second))
    }
    for failure in failures.values():
        failure.timestamp = 5

    def ended(*_: str) -> None:
        raise ChildFailedError("moezoo", failures)

    monkeypatch.setattr(launch, "elastic_launch", lambda *_: ended)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which launch sets where it is not
    if isinstance(said, int):
        assert launch.launch(2, "moezoo", []) == said
        return
    with pytest.raises(RankError, match=said):
        launch.launch(2, "moezoo", [])


def test_shares_are_even() -> None:
    sizes = [9, 1, 8, 2, 7, 3, 1000]
    dealt = shares(sizes, 3)
    assert sorted(i for share in dealt for i in share) == list(range(7))
    assert [6] in dealt
    assert shares([5], 2) == [[0], []]
