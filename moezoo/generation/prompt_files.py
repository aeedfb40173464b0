"""JSON lines in and out of offline generation, so that a run that was killed can go on.

A completion is one line, written and flushed whole; only the last line of a file can be half there.
"""

import errno
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from moezoo.generation.texts import Completion, Prompt

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger(__name__)


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
    record = {
        "id": completion.id,
        _source(completion): completion.prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_tokens": len(completion.token_ids),
        "run": run,
    }
    if completion.error is not None:
        record["error"] = completion.error
    return _written(record) + b"\n"


def _written(record: Mapping[str, Any]) -> bytes:
    # a lone surrogate has no UTF-8; backslashreplace writes it as JSON's own escape
    return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace")


def _source(of: Prompt | Completion) -> str:
    return "prompt" if isinstance(of.prompt, str) else "messages"


def resume(path: Path, prompts: Sequence[Prompt], run: str) -> dict[int | str, bool]:
    """Which prompts a file of completions has finished, and whether each of them failed.

    Cuts off a half-written last line, and ends one that lacks only its end. A file that does not
    exist has finished none.

    Raises:
        ValueError: the file holds something else than completions of these prompts in this run.
    """
    if not path.exists():
        return {}
    other_file = "; choose another output file or start it anew (--overwrite)"
    by_id = {prompt.id: prompt.prompt for prompt in prompts}
    finished: dict[int | str, bool] = {}
    first_line: dict[int | str, int] = {}
    with path.open("r+b") as file:
        end = 0
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}: "
            has_end = line.endswith(b"\n")
            if not has_end and _is_half_written(line, prompts):
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
            if prompt.id in first_line:
                raise ValueError(
                    f"{where}id {prompt.id!r} has its completion on line {first_line[prompt.id]}; "
                    "remove one of the two lines, or start the file anew (--overwrite)"
                )
            first_line[prompt.id] = number
            finished[prompt.id] = failed
            if not has_end:
                file.write(b"\n")
    return finished


def _is_half_written(line: bytes, prompts: Iterable[Prompt]) -> bool:
    """Whether a line without its end is the beginning of a completion of one of the prompts."""
    try:
        json.loads(line)
    except ValueError:
        records = ({"id": prompt.id, _source(prompt): prompt.prompt} for prompt in prompts)
        starts = (_written(record)[:-1] for record in records)
        return any(line.startswith(start) or start.startswith(line) for start in starts)
    return False


class OutputFile:
    """The file that the completions of one run are appended to, a line each.

    `finished` is what `resume` finds there, or nothing with `overwrite`. What is there before is
    kept until the first completion, and a run that fails before it leaves no new file. No other run
    can open the file until this one closes it or its process ends, however it ends.

    Raises:
        ValueError: it is no regular file, another run is writing it, or it holds something else
            than completions of these prompts in this run.
        OSError: it cannot be written.
    """

    def __init__(
        self, path: Path, prompts: Sequence[Prompt], run: str, *, overwrite: bool = False
    ) -> None:
        self.path = path
        self.run = run
        self._to_empty = overwrite
        self._is_new = not path.exists()
        if not self._is_new and not path.is_file():
            kind = "folder" if path.is_dir() else "device or a pipe"
            raise ValueError(
                f"--output must be a file, from which a stopped run can go on, and {path} is a "
                f"{kind}; choose a file, or leave --output out to write to stdout"
            )
        self._file = path.open("ab")
        try:
            _lock(self._file, path)
            self.finished = {} if overwrite else resume(path, prompts, run)
        except BaseException:
            self._file.close()
            raise

    def write(self, completion: Completion) -> None:
        if self._to_empty:
            self._file.truncate(0)
            self._to_empty = False
        self._file.write(completion_line(completion, self.run))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_new and os.fstat(self._file.fileno()).st_size == 0:
            os.unlink(os.path.realpath(self.path))
        self._file.close()


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep other runs from writing `file`, the open file at `path`, until it is closed."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its run may have removed the file, still empty, after it was opened here.
        is_there = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        is_there = False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        _log.warning("%s is on a file system without locks: let no other run write it", path)
        return
    if not is_there:
        raise ValueError(
            f"another run is writing {path}; wait for its end, or choose another output file"
        )


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
