"""JSON lines in and out of offline generation, so that a run that was killed can go on.

A completion is one line, written and flushed whole; only the last line of a file can be half there.
"""

import errno
import json
import os
from collections.abc import Container, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from moezoo.generation.offline import Completion, Prompt

_START = b'{"id": '
"""How every line of `completion_line` begins."""


def read_prompts(lines: Iterable[bytes], name: str) -> tuple[list[Prompt], list[str]]:
    """Read prompts, one JSON object a line, as `Prompt.from_record` understands them.

    A record without an id takes its line's number. Empty lines are passed over.

    Returns:
        The prompts, and one message for each line that is none: `name`, the line's number and what
        is wrong.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    first_line: dict[int | str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = Prompt.from_record(_json_object(line), default_id=number)
            if prompt.id in first_line:
                raise ValueError(f"id {prompt.id!r} is taken by line {first_line[prompt.id]}")
        except ValueError as error:
            problems.append(f"{name}:{number}: {error}")
            continue
        first_line[prompt.id] = number
        prompts.append(prompt)
    return prompts, problems


def completion_line(completion: Completion, run: str) -> bytes:
    """The completion as one line; `run` is the fingerprint of the model and the settings."""
    source = "prompt" if isinstance(completion.prompt, str) else "messages"
    record = {
        "id": completion.id,
        source: completion.prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_tokens": len(completion.token_ids),
        "run": run,
    }
    if completion.error is not None:
        record["error"] = completion.error
    # a lone surrogate has no UTF-8; backslashreplace writes it as JSON's own escape
    return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def resume(path: Path, prompts: Sequence[Prompt], run: str) -> dict[int | str, bool]:
    """Which prompts a file of completions has finished, and whether each of them failed.

    Cuts off a half-written last line. A file that does not exist has finished none.

    Raises:
        ValueError: the file holds something else than completions of these prompts in this run.
    """
    if not path.exists():
        return {}
    other_file = "; choose another output file or start it anew (--overwrite)"
    by_id = {prompt.id: prompt.prompt for prompt in prompts}
    finished: dict[int | str, bool] = {}
    with path.open("r+b") as file:
        end = 0
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}: "
            if not line.endswith(b"\n") and line.startswith(_START[: len(line)]):
                file.truncate(end)
                break
            end += len(line)
            try:
                record = _json_object(line)
                prompt = Prompt.from_record(record, default_id=-1)
                failed = record["finish_reason"] == "error"
                record_run = record["run"]
            except (ValueError, KeyError):
                raise ValueError(f"{where}not a completion of moezoo{other_file}") from None
            if record_run != run:
                raise ValueError(
                    f"{where}written by a run with another model or other settings{other_file}"
                )
            if by_id.get(prompt.id) != prompt.prompt:
                raise ValueError(f"{where}id {prompt.id!r} is not this prompt's{other_file}")
            finished[prompt.id] = failed
    return finished


def to_do(
    prompts: Sequence[Prompt], finished: Container[int | str], batch_size: int
) -> list[Prompt]:
    """The prompts of the batches that are not finished.

    Batches are made of the same prompts as in a run that was never stopped, so that resuming
    changes no bit of a completion; what a half-finished batch had written comes again.
    """
    batches = (prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size))
    return [
        prompt
        for batch in batches
        if any(prompt.id not in finished for prompt in batch)
        for prompt in batch
    ]


class OutputFile:
    """The file that the completions of one run are appended to, a line each.

    `finished` is what `resume` finds there, or nothing with `overwrite`. The file is opened for the
    first completion: a run that fails before leaves no empty file, and what it was to overwrite.

    Raises:
        ValueError: the file holds something else than completions of these prompts in this run.
        OSError: it cannot be written.
    """

    def __init__(
        self, path: Path, prompts: Sequence[Prompt], run: str, *, overwrite: bool = False
    ) -> None:
        self.path = path
        self.run = run
        self._mode = "wb" if overwrite else "ab"
        self._file: BinaryIO | None = None
        self._opened = ExitStack()
        self.finished = {} if overwrite else resume(path, prompts, run)
        _check_writable(path)

    def write(self, completion: Completion) -> None:
        if self._file is None:
            file = self._opened.enter_context(self.path.open(self._mode))
            self._file = cast(BinaryIO, file)
        self._file.write(completion_line(completion, self.run))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def _check_writable(path: Path) -> None:
    if path.exists():
        with open(path, "ab"):
            return
    code = errno.EACCES if path.parent.is_dir() else errno.ENOENT
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OSError(code, os.strerror(code), str(path))


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is expected, got {type(record).__name__}")
    return record
