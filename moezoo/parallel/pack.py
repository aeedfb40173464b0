"""Tokens in the order in which they travel, and the sum of what comes back.

Legend: T tokens, H hidden, K experts per token, R ranks, S rows sent: a token once for each rank
that it goes to, those for rank 0 first, in the order of tokens.
"""

import torch
from torch import Tensor

from moezoo.layers.quant.fp8 import BLOCK, Fp8Rows, quantize_rows


def destinations(slots: Tensor, rank_of_slot: Tensor, num_ranks: int) -> Tensor:
    """slots int [T, K], rank_of_slot int64 [P] -> bool [T, R]: the ranks that a token goes to."""
    ranks = torch.where(slots < 0, num_ranks, rank_of_slot[slots.clamp(min=0).long()])
    there = slots.new_zeros(len(slots), num_ranks + 1, dtype=torch.bool)
    return there.scatter_(1, ranks, True)[:, :num_ranks]


def pack_order(there: Tensor, num_rows: int, k: int) -> tuple[Tensor, Tensor]:
    """bool [T, R], S, K -> the token of each row, int64 [S], and the rows of each token, int64
    [T, min(K, R)], those for lower ranks first and -1 for none."""
    num_tokens, num_ranks = there.shape
    counts = there.sum(0)
    row = there.cumsum(0) - 1 + (counts.cumsum(0) - counts)
    tokens = torch.arange(num_tokens, device=there.device)[:, None].expand_as(row)
    # One row more, for where nothing is sent.
    order = row.new_empty(num_rows + 1)
    order.scatter_(0, row.where(there, num_rows).flatten(), tokens.flatten())
    if num_ranks <= k:
        return order[:-1], row.where(there, -1)
    places = row.where(there, num_rows).sort(1).values[:, :k]
    return order[:-1], places.where(places < num_rows, -1)


def pack_choices(topk_weights: Tensor, slots: Tensor) -> Tensor:
    """fp32 and int32 [T, K] -> int32 [T, 2K]: they travel together."""
    return torch.cat((topk_weights.view(torch.int32), slots.int()), 1)


def unpack_choices(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_choices`."""
    weights, slots = packed.chunk(2, 1)
    return weights.contiguous().view(torch.float32), slots.contiguous()


def fp8_rows(x: Tensor) -> Tensor:
    """x [S, H] -> uint8 [S, W]: as `quantize_rows` does it, numbers and then scales."""
    data, scales = quantize_rows(x)
    return torch.cat((data.view(torch.uint8), scales.contiguous().view(torch.uint8)), 1)


def from_fp8_rows(rows: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `fp8_rows` -> [S, H]."""
    width = -(-hidden_size // BLOCK) * BLOCK
    data, scales = rows.split((width, rows.shape[1] - width), 1)
    octets = Fp8Rows(
        data.contiguous().view(torch.float8_e4m3fn), scales.contiguous().view(torch.float32)
    )
    return octets.dequantize()[:, :hidden_size].to(dtype)


def sum_answers(y: Tensor, places: Tensor) -> Tensor:
    """y [S, H], places int [T, J], -1 for none -> [T, H]: the sum of each token's rows in fp32, in
    the order of places, rounded once."""
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
