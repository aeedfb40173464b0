"""Batches of experts that share torch calls on a CPU, where each call has a cost of its own.

oneDNN takes 30 us to begin a product of 16-bit matrices, and more if their shapes are new to it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BATCH_ROWS = 512
"""Largest number of rows in a batch of more than one expert."""

PADDED_ROWS = 2048
"""Average number of rows in a batch of experts that are padded to one length and multiplied at
once; an expert has an eighth of it at most. One by one, 512 tokens through 4 of 16 experts of
256 x 64 took 4.8 ms, in padded batches 1.4 ms (Intel Xeon with AMX)."""

PADDED_WEIGHTS = 2**18
"""Largest number of weights in an expert's larger product for which experts are padded."""

PADDED_PRODUCTS = 2**23
"""Multiplications that take as long as another product takes to begin: padding may cost as many
for each expert of a batch that has rows."""


class Batch(NamedTuple):
    """Neighbouring experts whose rows share torch calls."""

    experts: range
    sizes: list[int]
    """Number of rows of each expert that are in the batch."""
    padded: int = 0
    """Number of rows to which each expert is padded, 0 for no padding."""


def batches_of(
    bounds: list[int], numel: int, *, alone: bool = False, pads: bool = False
) -> Iterator[Batch]:
    """Divide the experts into batches of up to BATCH_ROWS rows.

    An expert with more rows has a batch to itself, as has every expert if `alone`. If the caller
    `pads` and experts are small, batches may be padded to one number of rows an expert instead.

    bounds[e] rows precede expert e, whose larger product has `numel` weights. Small experts share
    their torch calls, and no buffer holds all the rows at once: memory that is new to the process
    costs more than it takes to fill it.
    """
    num_experts = len(bounds) - 1
    few_rows = 8 * bounds[-1] <= PADDED_ROWS * num_experts
    if pads and num_experts > 1 and numel <= PADDED_WEIGHTS and few_rows:
        return _padded_batches(bounds, numel)
    return _batches(bounds, 1 if alone else BATCH_ROWS)


def _batches(bounds: list[int], max_rows: int) -> Iterator[Batch]:
    first = 0
    for last in range(1, len(bounds)):
        if last + 1 == len(bounds) or bounds[last + 1] - bounds[first] > max_rows:
            if bounds[first] < bounds[last]:
                experts = range(first, last)
                yield Batch(experts, [bounds[e + 1] - bounds[e] for e in experts])
            first = last


def _padded_batches(bounds: list[int], numel: int) -> Iterator[Batch]:
    """Yield batches of the same number of experts. An expert with far more rows than the average
    has a batch to itself, and no rows in the batch of its neighbours."""
    num_experts = len(bounds) - 1
    length = min(num_experts, max(1, PADDED_ROWS * num_experts // max(1, bounds[-1])))
    for first in range(0, num_experts, length):
        experts = range(first, min(first + length, num_experts))
        sizes = [bounds[e + 1] - bounds[e] for e in experts]
        free = PADDED_PRODUCTS // (max(1, numel) * len(experts))
        limit = _padded_size(max(2 * sum(sizes) // len(experts), free, 1))
        for e, size in zip(experts, sizes, strict=True):
            if size > limit:
                yield Batch(range(e, e + 1), [size])
        sizes = [size if size <= limit else 0 for size in sizes]
        if any(sizes):
            pays = _pays_to_pad(sizes, numel)
            yield Batch(experts, sizes, _padded_size(max(sizes)) if pays else 0)


def _padded_size(rows: int) -> int:
    """Round a number of rows up to one of few sizes, as oneDNN takes longer to prepare a product of
    a shape that is new to it than to do it."""
    return -(-rows // 16) * 16 if rows > 16 else 1 << (rows - 1).bit_length()


def _pays_to_pad(sizes: list[int], numel: int) -> bool:
    """Whether a padded batch is faster: it reads the weights of all its experts, so it needs at
    least as many rows as experts, and little padding."""
    rows, hit = sum(sizes), sum(size > 0 for size in sizes)
    waste = len(sizes) * _padded_size(max(sizes)) - rows
    return hit > 1 and rows >= len(sizes) and waste * numel <= hit * PADDED_PRODUCTS


def rows_of(batch: Batch, bounds: list[int]) -> slice | Tensor:
    """Return the indices of a batch's rows in expert order."""
    start, stop = bounds[batch.experts.start], bounds[batch.experts.stop]
    if sum(batch.sizes) == stop - start:
        return slice(start, stop)
    spans = zip((bounds[e] for e in batch.experts), batch.sizes, strict=True)
    return torch.cat([torch.arange(start, start + size) for start, size in spans if size])


def padded_slots(batch: Batch) -> Tensor:
    """Return the indices of the padded rows that are not padding, int64 [sum(sizes)]."""
    taken, shifts = 0, []
    for i, size in enumerate(batch.sizes):
        shifts.append(i * batch.padded - taken)
        taken += size
    sizes = torch.tensor(batch.sizes)
    return torch.tensor(shifts).repeat_interleave(sizes, output_size=taken) + torch.arange(taken)
