"""Read bytes from files into tensors, on the CPU or on a GPU.

Reader threads bring the bytes of many tensors with one system call. On the CPU a tensor that needs
no cast goes straight from the file into its place; everything else passes through a few staging
buffers of fixed size, pinned ones on the way to a GPU, where casts happen.
"""

import ctypes
import mmap
import os
import queue
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moezoo.errors import CheckpointError
from moezoo.loaders.checkpoint import Location

# A batch is what one system call reads, and the size of a staging buffer.
_BATCH = 16 << 20
_MAX_BUFFERS = 512
# What is quantised or unpacked at once: on a CPU few bytes, that the temporaries stay in its caches
# and are used again; on a GPU more, as launches take time.
_PUT_BATCH = 512 << 10
_PUT_BATCH_GPU = 4 << 20
# Host memory of all staging buffers, where pieces are large.
_STAGES = 256 << 20

_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None

Put = Callable[[torch.Tensor], object]
"""Function that takes the stored bytes of a piece on the load's device, where they are not just
copied."""

PutRows = Callable[[slice, torch.Tensor], object]
"""Function that takes some rows of a stored tensor, and which rows they are."""


class Piece(NamedTuple):
    """Consecutive bytes of one stored tensor; they fill the elements of `target` in order, or `put`
    takes them."""

    source: str
    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    target: torch.Tensor | None = None
    put: Put | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def direct(self) -> bool:
        """Whether the bytes can be read straight into the target."""
        target = self.target
        return (
            target is not None
            and target.device.type == "cpu"
            and target.dtype == self.dtype
            and target.is_contiguous()
        )


class _Stage:
    """A staging buffer in host memory; the event `copied` is done when the GPU has taken its
    contents."""

    def __init__(self, size: int, on_gpu: bool) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=on_gpu)
        self.copied = torch.cuda.Event() if on_gpu else None


def cut(
    source: str, location: Location, dtype: torch.dtype, target: torch.Tensor
) -> Iterator[Piece]:
    """Cut a stored tensor into pieces that fit a staging buffer."""
    nbytes = target.numel() * dtype.itemsize
    if nbytes <= _BATCH:
        if nbytes:
            yield Piece(source, *location, dtype, tuple(target.shape), target)
        return
    row = nbytes // target.shape[0]
    offset = location.offset
    for part in target.unbind() if row > _BATCH else target.split(_BATCH // row):
        yield from cut(source, Location(location.path, offset), dtype, part)
        offset += part.numel() * dtype.itemsize


def cut_rows(
    source: str,
    location: Location,
    dtype: torch.dtype,
    shape: Sequence[int],
    *,
    unit: int | None,
    device: torch.device,
    put: PutRows,
) -> Iterator[Piece]:
    """Cut a stored tensor [R, ..] into pieces of rows for put(rows, stored): multiples of `unit`
    rows, all rows where None."""
    rows, *rest = shape
    row = prod(rest) * dtype.itemsize
    unit = unit or max(1, rows)
    most = _PUT_BATCH if device.type == "cpu" else _PUT_BATCH_GPU
    count = unit * max(1, most // max(1, row * unit))
    for start in range(0, rows if row else 0, count):
        end = min(start + count, rows)
        place = Location(location.path, location.offset + start * row)
        whole = partial(put, slice(start, end))
        yield Piece(source, *place, dtype, (end - start, *rest), put=whole)


def read(piece: Piece) -> torch.Tensor:
    """Return the bytes of a piece, on the CPU.

    Raises `CheckpointError` naming the file and the tensor if they cannot be read.
    """
    data = bytearray(piece.nbytes)
    with ExitStack() as stack:
        _read_run([piece], [memoryview(data)], _open(piece.path, stack))
    return torch.frombuffer(data, dtype=piece.dtype).view(piece.shape)


def stream(pieces: Iterable[Piece], device: torch.device, *, progress: bool) -> None:
    """Read every piece into its target on `device`, several batches at a time.

    Raises `CheckpointError` naming the file and the tensor that cannot be read.
    """
    pieces = sorted(pieces, key=lambda piece: (piece.path, piece.offset))
    on_gpu = device.type == "cuda"
    num_threads = min(8, max(4, os.cpu_count() or 4))
    stages: queue.SimpleQueue[_Stage] = queue.SimpleQueue()
    with ExitStack() as stack:
        files = {path: _open(path, stack) for path in {piece.path for piece in pieces}}
        side = None
        if on_gpu:
            stack.enter_context(torch.cuda.device(device))
            side = torch.cuda.Stream(device)
            # Earlier work on the current stream may still use the memory of the targets.
            side.wait_stream(torch.cuda.current_stream(device))
            stack.callback(side.synchronize)
        if not all(piece.direct for piece in pieces):
            size = max(_BATCH, *(_padded(piece.nbytes) for piece in pieces))
            for _ in range(max(2, min(num_threads + 2 * on_gpu, _STAGES // size))):
                stages.put(_Stage(size, on_gpu))

        def transfer(batch: Sequence[Piece]) -> int:
            targets = [piece.target for piece in batch if piece.direct]
            if len(targets) == len(batch):
                _read(batch, [_fresh(target) for target in targets if target is not None], files)
            else:
                stage = stages.get()
                try:
                    _read_staged(batch, stage, files, device=device, side=side)
                finally:
                    stages.put(stage)
            return sum(piece.nbytes for piece in batch)

        total = sum(piece.nbytes for piece in pieces)
        advance = stack.enter_context(bar("loading", total, progress))
        pool = stack.enter_context(ThreadPoolExecutor(num_threads))
        for nbytes in pool.map(transfer, _batches(pieces)):
            advance(nbytes)


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Yield batches of neighbouring pieces, as many as fit a staging buffer and one system call."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and (size + _padded(piece.nbytes) > _BATCH or len(batch) == _MAX_BUFFERS):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += _padded(piece.nbytes)
    if batch:
        yield batch


def _padded(nbytes: int) -> int:
    """Return a tensor's bytes rounded up, so that the next one in a staging buffer is aligned for
    every dtype."""
    return -(-nbytes // 16) * 16


def _read_staged(
    batch: Sequence[Piece],
    stage: _Stage,
    files: Mapping[Path, int],
    *,
    device: torch.device,
    side: torch.cuda.Stream | None,
) -> None:
    """Read a batch, by way of a staging buffer unless a piece is direct."""
    if stage.copied is not None:
        stage.copied.synchronize()
    buffers = []
    staged = []
    start = 0
    for piece in batch:
        if piece.target is not None and piece.direct:
            buffers.append(_fresh(piece.target))
        else:
            buffer = stage.buffer[start : start + piece.nbytes]
            start += _padded(piece.nbytes)
            buffers.append(_memory(buffer))
            staged.append((piece, buffer.view(piece.dtype).view(piece.shape)))
    _read(batch, buffers, files)
    with torch.cuda.stream(side) if side is not None else nullcontext():
        for piece, stored in staged:
            if piece.put is not None:
                piece.put(stored.to(device, non_blocking=True))
                continue
            target = piece.target
            assert target is not None, piece.source
            if side is not None and (target.dtype != stored.dtype or not target.is_contiguous()):
                stored = stored.to(target.device, non_blocking=True)  # cast there, not on the host
            target.copy_(stored, non_blocking=True)
        if stage.copied is not None:
            stage.copied.record(side)


def _memory(tensor: torch.Tensor) -> Any:
    """Return the bytes of a contiguous CPU tensor, for a system call to write into."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _fresh(target: torch.Tensor) -> Any:
    """Return `_memory` of a target that nothing has been written to, its pages there already.

    A page fault for each 4 kB would be a good part of the time: 4.7 GiB took 2.3 s to read, 2.7 s
    without this, and 4.2 s in huge pages (on a virtual machine of two cores). Where the system does
    not know this call, as Linux before 5.14, pages come by faults.
    """
    buffer = _memory(target)
    if _libc is not None:
        address = buffer.ctypes.data
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        length = address + buffer.nbytes - start
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)
    return buffer


def _read(batch: Sequence[Piece], buffers: Sequence[Any], files: Mapping[Path, int]) -> None:
    """Fill the buffers, those that are neighbours in the file with one system call."""
    start = 0
    for end in range(1, len(batch) + 1):
        before, after = batch[end - 1], batch[end] if end < len(batch) else None
        if (
            after is None
            or after.path != before.path
            or after.offset != before.offset + before.nbytes
        ):
            _read_run(batch[start:end], buffers[start:end], files[before.path])
            start = end


def _read_run(pieces: Sequence[Piece], buffers: Sequence[Any], file: int) -> None:
    try:
        if os.preadv(file, buffers, pieces[0].offset) == sum(piece.nbytes for piece in pieces):
            return
        for piece, buffer in zip(pieces, buffers, strict=True):
            done = 0
            while done < piece.nbytes:
                count = os.preadv(file, [buffer[done:]], piece.offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{piece.path} ends within {piece.source}: the file was cut while loading"
                    )
                done += count
    except OSError as error:
        raise CheckpointError(
            f"{pieces[0].path} cannot be read at {pieces[0].source}: {error.strerror}"
        ) from error


def _open(path: Path, stack: ExitStack) -> int:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    stack.callback(os.close, file)
    return file


@contextmanager
def bar(doing: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in bytes on stderr, if that is a terminal."""
    columns = (
        TextColumn(doing),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as shows:
        task = shows.add_task(doing, total=total)
        yield lambda nbytes: shows.advance(task, nbytes)
