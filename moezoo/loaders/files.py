"""The names of a checkpoint's files, and the errors for files that are not as they should be."""

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
    """Return the JSON object in a file; raises `CheckpointError` naming the file if there is
    none."""
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
    """Turn an `OSError` of the block, which reads the file at `path`, into a `CheckpointError`
    naming it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def disguise(start: bytes) -> str | None:
    """Say what a file that begins with these bytes is instead of the one that was meant, and what
    to do."""
    again = "get the file itself with `hf download` or `git lfs pull`"
    if start.startswith(b"version https://git-lfs"):
        return f"is a git-LFS pointer: {again}"
    if start.lstrip().startswith(b"<"):
        return f"is a web page: {again}"
    return None
