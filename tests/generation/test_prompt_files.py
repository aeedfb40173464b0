"""Lines in and out; resuming a killed run as a whole is tested in tests/test_cli.py."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moezoo.generation.prompt_files import OutputFile, completion_line, read_prompts, resume
from moezoo.generation.texts import Completion, Prompt

PROMPTS = [Prompt("a", "The dog"), Prompt(2, [{"role": "user", "content": "hello"}])]


def completion(prompt, text="", **fields):
    fields = {"token_ids": (1, 2), "finish_reason": "stop", "num_prompt_tokens": 3} | fields
    return Completion(id=prompt.id, prompt=prompt.prompt, text=text, **fields)


def test_prompts_and_problems_by_line():
    lines = [
        b'\xef\xbb\xbf{"prompt": "with a byte order mark"}\n',
        b" \n",
        b'{"id": "a", "messages": [{"role": "user", "content": "hello"}]}\r\n',
        b'{"id": 1, "prompt": "the first line has this id"}\n',
        b'"text"\n',
        b'{"prompt": "\xff"}\n',
        b'{"prompt": "no newline at the end"}',
    ]
    prompts, problems = read_prompts(lines, "in.jsonl")
    assert [prompt.id for prompt in prompts] == [1, "a", 7]
    assert problems == [
        "in.jsonl:4: id 1 is taken by line 1",
        "in.jsonl:5: a JSON object is expected, got str",
        "in.jsonl:6: 'utf-8' codec can't decode byte 0xff in position 12: invalid start byte",
    ]


def test_deep_nesting_is_a_problem_of_its_line():
    prompts, problems = read_prompts([b"[" * 100_000, b'{"prompt": "after"}'], "in.jsonl")
    assert problems == ["in.jsonl:1: nested too deeply"]
    assert [prompt.id for prompt in prompts] == [2]


@given(st.text(), st.text())
@example("\ud800", "a line\u2028separator and half a \udfff pair")
def test_any_text_makes_one_line_that_reads_back(prompt_text, text):
    line = completion_line(completion(Prompt(1, prompt_text), text), run="r")
    assert line.count(b"\n") == 1
    record = json.loads(line)
    assert (record["prompt"], record["text"], record["num_tokens"]) == (prompt_text, text, 2)


def test_resume_tells_finished_from_failed_and_drops_half_a_line(tmp_path):
    path = tmp_path / "out.jsonl"
    assert resume(path, PROMPTS, "r") == {}
    first = completion_line(completion(PROMPTS[0]), "r")
    failed = completion_line(completion(PROMPTS[1], finish_reason="error", error="no"), "r")
    path.write_bytes(first + failed)
    assert resume(path, PROMPTS, "r") == {"a": False, 2: True}
    for size in range(1, len(failed) - 1):
        path.write_bytes(first + failed[:size])
        assert resume(path, PROMPTS, "r") == {"a": False}
        assert path.read_bytes() == first
    path.write_bytes(first + failed[:-1])
    assert resume(path, PROMPTS, "r") == {"a": False, 2: True}
    assert path.read_bytes() == first + failed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\n", "out.jsonl:2: not a completion of moezoo"),
        (b'{"id": 2, "prompt": "hello"}\n', "out.jsonl:2: not a completion of moezoo"),
        (b'{"id": 2, "prompt": "hello"}', "out.jsonl:2: not a completion of moezoo"),
        (b'{"id": 2, "run": "abc", "loss": 0.1}', "out.jsonl:2: not a completion of moezoo"),
        (b'{"id": 2, "note": "x"} trailing', "out.jsonl:2: not a completion of moezoo"),
        (completion_line(completion(PROMPTS[1]), "s")[:-1], "out.jsonl:2: written by a run with"),
        (
            completion_line(completion(PROMPTS[1]), "s"),
            "out.jsonl:2: written by a run with another",
        ),
        (completion_line(completion(Prompt(2, "?")), "r"), "out.jsonl:2: id 2 is not this prompt"),
        (completion_line(completion(Prompt(3, "?")), "r"), "out.jsonl:2: id 3 is not this prompt"),
        (
            completion_line(completion(PROMPTS[0], "again"), "r"),
            "out.jsonl:2: id 'a' has its completion on line 1; remove one of the two lines",
        ),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, line, message):
    path = tmp_path / "out.jsonl"
    path.write_bytes(completion_line(completion(PROMPTS[0]), "r") + line)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        resume(path, PROMPTS, "r")
    assert path.read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_run_at_a_time_writes_a_file(tmp_path, overwrite):
    path = tmp_path / "out.jsonl"
    with OutputFile(path, PROMPTS, "r") as file:
        for write in (lambda: None, lambda: file.write(completion(PROMPTS[0]))):
            write()
            with pytest.raises(ValueError, match=f"another run is writing {path}"):
                OutputFile(path, PROMPTS, "r", overwrite=overwrite)
    assert path.read_bytes() == completion_line(completion(PROMPTS[0]), "r")
    with OutputFile(path, PROMPTS, "r", overwrite=overwrite) as file:
        assert file.finished == ({} if overwrite else {"a": False})


def test_a_run_that_opened_what_another_removes_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    first = OutputFile(path, PROMPTS, "r")
    open_ = Path.open

    def opened_before_the_first_ends(self, mode):
        file = open_(self, mode)
        first.__exit__()
        return file

    monkeypatch.setattr(Path, "open", opened_before_the_first_ends)
    with pytest.raises(ValueError, match="another run is writing"):
        OutputFile(path, PROMPTS, "r")
    assert not path.exists()


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_only_a_regular_file_is_written(tmp_path, kind, overwrite):
    path = Path("/dev/null") if kind == "device" else tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=f"--output must be a file.* {path} is a .*{kind}"):
        OutputFile(path, PROMPTS, "r", overwrite=overwrite)
