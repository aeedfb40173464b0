"""Packing tokens into rows for all-to-all, and summing the rows that come back.

Legend: T tokens, H hidden, K experts per token, R ranks, S rows sent: a token once for each rank
that it goes to, those for rank 0 first, in the order of tokens.
"""

import torch
from torch import Tensor

from moezoo.layers.kernels.row_format import (
    RowFormat,
    local_rows_ref,
    pack_rows_ref,
    unpack_rows_ref,
)


def destinations(slots: Tensor, rank_of_slot: Tensor, num_ranks: int) -> Tensor:
    """Return which ranks each token goes to, bool [T, R], from its slots int [T, K].

    rank_of_slot is int64 [P + 1]; its last number is R, for slots of -1.
    """
    ranks = rank_of_slot[slots.long()]
    there = slots.new_zeros(len(slots), num_ranks + 1, dtype=torch.bool)
    return there.scatter_(1, ranks, True)[:, :num_ranks]


def pack_order(there: Tensor, counts: Tensor, num_rows: int, k: int) -> tuple[Tensor, Tensor]:
    """Return the token of each row, int64 [S], and each token's rows, int64 [T, min(K, R)].

    `there` is bool [T, R] of `destinations`, `counts` int64 [R] its sums over tokens, `num_rows` S
    and `k` K. A token's rows for lower ranks come first; -1 is none.
    """
    num_tokens, num_ranks = there.shape
    row = there.cumsum(0) - 1 + (counts.cumsum(0) - counts)
    tokens = torch.arange(num_tokens, device=there.device)[:, None].expand_as(row)
    # One row more, for tokens that do not go to a rank.
    order = row.new_empty(num_rows + 1)
    order.scatter_(0, row.where(there, num_rows).flatten(), tokens.flatten())
    if num_ranks <= k:
        return order[:-1], row.where(there, -1)
    places = row.where(there, num_rows).sort(1).values[:, :k]
    return order[:-1], places.where(places < num_rows, -1)


def pack_rows(
    form: RowFormat, x: Tensor, topk_weights: Tensor, slots: Tensor, num_rows: int
) -> Tensor:
    """Pack x [T, H], topk_weights fp32 [T, K] and slots int [T, K] into rows uint8 [num_rows, W].

    Rows beyond T have slots of -1.
    """
    if not x.is_cuda:
        return pack_rows_ref(form, x, topk_weights, slots, num_rows)
    from moezoo.layers.kernels import wire_rows

    with torch.cuda.device_of(x):
        return wire_rows.pack_rows(form, x, topk_weights, slots, num_rows)


def unpack_rows(
    form: RowFormat, rows: Tensor, first: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Unpack rows of `pack_rows` into x [N, H], topk_weights fp32 [N, K] and slots int32 [N, K].

    Slots `first` to `stop` are counted from `first`; all others are -1.
    """
    if not rows.is_cuda:
        return unpack_rows_ref(form, rows, first, stop)
    from moezoo.layers.kernels import wire_rows

    with torch.cuda.device_of(rows):
        return wire_rows.unpack_rows(form, rows, first, stop)


def local_rows(slots: Tensor, first: int, stop: int) -> Tensor:
    """Return slots int [T, K] as int32, counted from `first`, with -1 outside `first` to `stop`."""
    if not slots.is_cuda:
        return local_rows_ref(slots, first, stop)
    from moezoo.layers.kernels import wire_rows

    with torch.cuda.device_of(slots):
        return wire_rows.local_rows(slots, first, stop)


def sum_answers(y: Tensor, places: Tensor) -> Tensor:
    """Return [T, H], the sums of each token's rows of y [S, H].

    places int [T, J] are its rows, or -1. Sums are fp32, in the order of places, and rounded once.
    """
    if y.is_cuda:
        from moezoo.layers.kernels.sum_rows import sum_rows

        with torch.cuda.device_of(y):
            return sum_rows(y, places)
    out = torch.zeros(len(places), y.shape[1], dtype=torch.float32, device=y.device)
    if len(y) == 0:
        return out.to(y.dtype)
    for place in places.unbind(1):
        present = (place >= 0).unsqueeze(1)
        out += y[place.clamp(min=0)].float().masked_fill(~present, 0.0)
    return out.to(y.dtype)
