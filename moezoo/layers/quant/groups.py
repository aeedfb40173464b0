"""Groups of columns that share a scale, and two codes of 4 bits in a byte."""

import torch
from torch import Tensor

from moezoo.errors import QuantizationError

GROUP_SIZES = (128, 64, 32)
"""Columns of a group; or all of a row, a scale per channel."""

PER_CHANNEL = -1
"""The group size that stands for all columns."""

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def default_group_size(k: int) -> int:
    """The largest of 128, 64 and 32 that divides k columns.

    Raises QuantizationError where none does.
    """
    for size in GROUP_SIZES:
        if k % size == 0:
            return size
    raise QuantizationError(
        f"none of the group sizes {list(GROUP_SIZES)} divides {k} columns; "
        f"group_size {PER_CHANNEL} gives each row one scale"
    )


def num_groups(k: int, group_size: int) -> int:
    """Of k columns. Raises QuantizationError for a size that there is not or does not divide k."""
    if group_size in (PER_CHANNEL, k):
        return 1
    if group_size not in GROUP_SIZES or k % group_size:
        raise QuantizationError(
            f"group_size {group_size} of {k} columns: expected one of {list(GROUP_SIZES)} that "
            f"divides them, or {PER_CHANNEL} for one scale a row"
        )
    return k // group_size


def groups_of(k: int, scales: Tensor) -> int:
    """How many groups of k columns scales [.., N, G] are for.

    Raises QuantizationError where k columns have no such groups.
    """
    groups = scales.shape[-1] if scales.ndim else 0
    if groups != 1 and (groups == 0 or k % groups or k // groups not in GROUP_SIZES):
        sizes = [size for size in GROUP_SIZES if k % size == 0]
        raise QuantizationError(
            f"scales of {k} columns must be [.., N, G] with G one of "
            f"{sorted({1, *(k // size for size in sizes)})}, got {list(scales.shape)}"
        )
    return groups


def scale_dtype(w: Tensor) -> torch.dtype:
    """Of the scales of w: its own, if scales may have it."""
    return w.dtype if w.dtype in SCALE_DTYPES else torch.float32


def grouped(x: Tensor, groups: int) -> Tensor:
    """[.., K] -> [.., G, K / G]"""
    return x.unflatten(-1, (groups, -1))


def pack(codes: Tensor) -> Tensor:
    """codes uint8 [.., K] below 16 -> [.., K / 2], the even ones in the low halves."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(data: Tensor) -> Tensor:
    """The inverse of `pack`: uint8 [.., K / 2] -> [.., K]."""
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)
