"""Lines in and out; resuming a killed run as a whole is tested in tests/test_cli.py."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moezoo.generation.offline import Completion, Prompt
from moezoo.generation.prompt_files import completion_line, read_prompts, resume

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
    for size in range(1, len(failed)):
        path.write_bytes(first + failed[:size])
        assert resume(path, PROMPTS, "r") == {"a": False}
        assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\n", "out.jsonl:2: not a completion of moezoo"),
        (b'{"id": 2, "prompt": "hello"}\n', "out.jsonl:2: not a completion of moezoo"),
        (
            completion_line(completion(PROMPTS[1]), "s"),
            "out.jsonl:2: written by a run with another",
        ),
        (completion_line(completion(Prompt(2, "?")), "r"), "out.jsonl:2: id 2 is not this prompt"),
        (completion_line(completion(Prompt(3, "?")), "r"), "out.jsonl:2: id 3 is not this prompt"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, line, message):
    path = tmp_path / "out.jsonl"
    path.write_bytes(completion_line(completion(PROMPTS[0]), "r") + line)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        resume(path, PROMPTS, "r")
    assert path.read_bytes() == before
