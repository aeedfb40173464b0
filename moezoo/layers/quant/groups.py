"""Groups of columns that share a scale, and two codes of 4 bits in a byte."""

import torch
from torch import Tensor

from moezoo.errors import QuantizationError

GROUP_SIZES = (128, 64, 32)
"""Supported numbers of columns per group, beside all columns of a row."""

PER_CHANNEL = -1
"""Group size that stands for all columns: a scale per output channel."""

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def default_group_size(k: int) -> int:
    """Return the largest of 128, 64 and 32 that divides k columns.

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
    """Return the number of groups in k columns. Raises QuantizationError for a size that is not
    supported or does not divide k."""
    if group_size in (PER_CHANNEL, k):
        return 1
    if group_size not in GROUP_SIZES or k % group_size:
        raise QuantizationError(
            f"group_size {group_size} of {k} columns: expected one of {list(GROUP_SIZES)} that "
            f"divides them, or {PER_CHANNEL} for one scale a row"
        )
    return k // group_size


def groups_of(k: int, scales: Tensor) -> int:
    """Return the number of groups of k columns that scales [.., N, G] belong to.

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
    """Return the dtype for the scales of w: its own if scales can have it, else fp32."""
    return w.dtype if w.dtype in SCALE_DTYPES else torch.float32


def grouped(x: Tensor, groups: int) -> Tensor:
    """Return x [.., K] as [.., G, K / G]."""
    return x.unflatten(-1, (groups, -1))


def pack(codes: Tensor) -> Tensor:
    """Pack codes uint8 [.., K] below 16 into [.., K / 2], those of even columns in the low
    halves."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(data: Tensor) -> Tensor:
    """Unpack uint8 [.., K / 2] into [.., K]: the inverse of `pack`."""
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)
