"""The files of a checkpoint by their names, and what is said of one that is not as it should be."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moezoo.errors import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

GGUF = (
    "GGUF, llama.cpp's format, is not supported: moezoo reads safetensors alone. Take the model "
    "that the file was made of; quantization='int4_w4a16' makes it about as small while it loads"
)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises `CheckpointError` naming the file if there is none."""
    with reading(path):
        raw = path.read_bytes()
        try:
            content = json.loads(raw)
        except ValueError as error:
            what = disguise(raw[:100]) or f"is not JSON: {error}"
            raise CheckpointError(f"{path} {what}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Where the file at `path` is read: an `OSError` becomes a `CheckpointError` that names it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def disguise(start: bytes) -> str | None:
    """What a file that begins so is in place of the one that was meant, and what to do."""
    again = "get the file itself with `hf download` or `git lfs pull`"
    if start.startswith(b"version https://git-lfs"):
        return f"is a git-LFS pointer: {again}"
    if start.lstrip().startswith(b"<"):
        return f"is a web page: {again}"
    return None
