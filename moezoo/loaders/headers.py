"""The headers of safetensors files: the name, shape, dtype and place of each tensor, checked."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from moezoo.errors import CheckpointError
from moezoo.loaders.files import disguise, reading
from moezoo.loaders.mapping import TensorInfo

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their names in the safetensors format."""

_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor of a checkpoint: shape, dtype, its file's name and its first byte in the file's
    data.
    """

    file: str
    start: int

    @property
    def where(self) -> str:
        return f" in {self.file}"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[int, dict[str, StoredTensor]]:
    """Return the offset of the data in a safetensors file, and its tensors.

    Raises `CheckpointError` if the header is malformed or the file is shorter than it says.
    """
    with reading(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            what = disguise(first + file.read(100)) or (
                "is truncated or not in the safetensors format: get it again"
            )
            raise CheckpointError(f"{path} ({size} bytes) {what}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: the header is not JSON ({error})") from error
    start = 8 + length
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = parse_header(header, path, path.name)
    end = _check_cover(tensors, path)
    if start + end != size:
        what = "the file is truncated" if start + end > size else "the file has bytes of no tensor"
        cut = [name for name, t in tensors.items() if start + t.start + t.nbytes > size]
        which = f", {len(cut)} tensors are not whole, such as {cut[0]}" if cut else ""
        raise CheckpointError(f"{path}: {what}: {size} bytes, expected {start + end}{which}")
    return start, tensors


def parse_header(header: Mapping[str, Any], path: Path | str, file: str) -> dict[str, StoredTensor]:
    """Return the tensors that a header describes; `path` is what messages call their file.

    Raises `CheckpointError` if an entry is malformed, of an unknown dtype or at odds with itself.
    """
    tensors = {}
    for name, entry in header.items():
        try:
            shape = tuple(entry["shape"])
            start, end = entry["data_offsets"]
            dtype = DTYPES.get(entry["dtype"])
            whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path}: the header's entry of {name} is malformed: {entry}")
        if dtype is None:
            raise CheckpointError(
                f"{path}: {name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}"
            )
        tensor = StoredTensor(shape, dtype, file, start)
        if end - start != tensor.nbytes:
            raise CheckpointError(
                f"{path}: {name} {list(shape)} of {entry['dtype']} takes {tensor.nbytes} bytes, "
                f"its offsets {start}:{end} are {end - start}"
            )
        tensors[name] = tensor
    return tensors


def _check_cover(tensors: Mapping[str, StoredTensor], path: Path) -> int:
    """Return the end of the data; raises where two tensors overlap or leave a hole."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before"
            raise CheckpointError(f"{path}: {name} at {tensor.start} {what}, which ends at {end}")
        end += tensor.nbytes
    return end
