"""Experts whose weights have 16 or 32 bits: torch on CPU and for gradients, Triton on CUDA.

Legend: S chosen rows; otherwise as in `experts`.
"""

import warnings
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.layers.kernels.activations import Gating, in_parts
from moezoo.layers.linear import (
    FP32_ROWS,
    LARGE,
    ONEDNN_DTYPES,
    linear,
    one_row,
    without_onednn,
)
from moezoo.layers.moe.chunks import in_chunks, local_ids, operator
from moezoo.layers.moe.permute import permute
from moezoo.layers.moe.ranges import verb

FEW_TOKENS = 4
"""Up to so many tokens, on a GPU, an expert is multiplied once for each of them, unless too many
share it: measured on one H100, that is faster while T*T*K <= E."""

FEW_PRODUCTS = 2**18
"""With no more products than this for an expert, and with a single row of one that is not `LARGE`,
oneDNN takes longer to begin a 16-bit product on CPU than torch's own routine takes to do it."""

BATCH_ROWS = 512
"""Rows that experts worked on together on CPU have at most, if they are more than one."""

PADDED_ROWS = 1024
"""The same where they are multiplied as one batch, each with as many rows as the one with most. One
16-bit product of oneDNN takes 30 us to begin (Intel Xeon with AMX): 512 tokens through 4 of 32
experts of 256 x 64 took 6.6 ms one by one, 2.7 ms in batches; with 512 rows an expert, no less."""

PADDED_PRODUCTS = 2**25
"""Products with rows that are only padding, for each expert that has rows, up to which it pays."""


def dense_torch(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    bias13: Tensor | None,
    bias2: Tensor | None,
    expert_map: Tensor | None,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    gated = w13.ndim == 3 or w13.shape[1] == 2
    act = Gating(activation, limit, up_offset)
    parts, dim = (-1, 1 + gated, w2.shape[2]), 1
    if w13.ndim == 4:
        if w13.stride(1) < w13.stride(2):
            parts, dim = (-1, w2.shape[2], 1 + gated), 2
        # Rows in the order of memory: a view.
        w13 = w13.movedim(1, dim).flatten(1, 2)
        bias13 = None if bias13 is None else bias13.movedim(1, dim).flatten(1, 2)

    def one_token(x: Tensor, topk_weights: Tensor, chosen: list[int]) -> Tensor:
        """Nothing to group here, and on a CPU every torch call counts."""
        with without_onednn():
            rows = _products(w13, chosen, repeat(x[0]), bias13)
            h = act(*torch.cat(rows).float().view(parts).unbind(dim)).type_as(x)
            rows = _products(w2, chosen, h.unbind(0), bias2)
        return torch.mm(topk_weights, torch.stack(rows).float()).type_as(x)

    small = x.is_cpu and x.dtype in ONEDNN_DTYPES and w13.shape[0] > 1 and w13[0].numel() <= LARGE

    def experts_of(x: Tensor, batch: range, sizes: list[int]) -> Tensor:
        """Of the rows of x, sizes[i] go through expert batch[i]."""
        if small and _pays_to_pad(sizes, w13[0].numel()):
            slots = _padded_slots(sizes)
            y = x.new_zeros(len(batch) * max(sizes), x.shape[1]).index_copy_(0, slots, x)
            y = _batched_linear(y, batch, w13, bias13).float()
            h = act(*y.view(parts).unbind(dim)).to(x.dtype)
            return _batched_linear(h, batch, w2, bias2).index_select(0, slots)
        experts = [e for e, size in zip(batch, sizes, strict=True) if size]
        sizes = [size for size in sizes if size]
        y = _grouped_linear(x, sizes, w13, experts=experts, bias=bias13).float()
        h = act(*y.view(parts).unbind(dim)).to(x.dtype)
        return _grouped_linear(h, sizes, w2, experts=experts, bias=bias2)

    def chunk(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        num_tokens, k = topk_ids.shape
        if num_tokens == 1:
            (chosen,) = topk_ids.tolist()
            if min(chosen) >= 0 and max(chosen) < w13.shape[0]:
                return one_token(x, topk_weights, chosen)
        with verb("permute"):
            order, offsets = permute(topk_ids, w13.shape[0])
        tokens, weights = order // k, topk_weights.flatten().index_select(0, order).unsqueeze(1)
        out = x.new_zeros(x.shape, dtype=torch.float32)
        bounds = offsets.tolist()
        few_rows = bias13 is None and bias2 is None and bounds[-1] < FP32_ROWS * w13.shape[0]
        if few_rows and _torch_groups(x, w13, w2):
            chosen, ends = tokens[: bounds[-1]], offsets[1:]
            y = F.grouped_mm(x.index_select(0, chosen), w13.mT, offs=ends).float()
            h = act(*y.view(parts).unbind(dim)).to(x.dtype)
            y = F.grouped_mm(h, w2.mT, offs=ends)
            return out.index_add_(0, chosen, y * weights[: bounds[-1]]).to(x.dtype)
        # A batch of one expert has no token twice: on CUDA, index_add_ leaves their order open.
        padded = small and 4 * bounds[-1] <= PADDED_ROWS * w13.shape[0]
        for batch in _batches(bounds, 1 if x.is_cuda else PADDED_ROWS if padded else BATCH_ROWS):
            sizes = [bounds[e + 1] - bounds[e] for e in batch]
            rows = slice(bounds[batch.start], bounds[batch.stop])
            y = experts_of(x.index_select(0, tokens[rows]), batch, sizes)
            out.index_add_(0, tokens[rows], y * weights[rows])
        return out.to(x.dtype)

    return in_chunks(chunk, x, topk_weights, local_ids(topk_ids, expert_map))


def _torch_groups(x: Tensor, w13: Tensor, w2: Tensor) -> bool:
    """Whether torch's own grouped product on the CPU takes the weights, and is the faster way with
    few rows: the bits of its loop are those of ours, a sixth faster."""
    if not x.is_cpu or x.dtype.itemsize != 2 or x.dtype in ONEDNN_DTYPES or torch.is_grad_enabled():
        return False
    return w13.is_contiguous() and w2.is_contiguous() and w13.shape[2] % 8 == w2.shape[2] % 8 == 0


def _products(
    w: Tensor, experts: list[int], x: Iterable[Tensor], bias: Tensor | None
) -> list[Tensor]:
    """w [E, M, N], for each of experts an x [N], bias [E, M] -> as many [M]."""
    rows = zip(experts, x, strict=False)
    if w[0].numel() >= LARGE:
        return [one_row(w[e], row, None if bias is None else bias[e]) for e, row in rows]
    if bias is None:
        return [torch.mv(w[e], row) for e, row in rows]
    return [torch.addmv(bias[e], w[e], row) for e, row in rows]


def _batches(bounds: list[int], max_rows: int) -> Iterator[range]:
    """Neighbouring experts with max_rows together, or one alone; bounds[e] rows precede expert e.

    Small experts then share their torch calls, and no buffer holds all the rows at once: memory
    that is new to the process costs more than it takes to fill it.
    """
    first = 0
    for last in range(1, len(bounds)):
        if last + 1 == len(bounds) or bounds[last + 1] - bounds[first] > max_rows:
            if bounds[first] < bounds[last]:
                yield range(first, last)
            first = last


def _pays_to_pad(sizes: list[int], numel: int) -> bool:
    """Whether experts of `numel` weights in the larger product are multiplied as one batch.

    It reads the weights of all of them, so there are as many rows at least.
    """
    rows, hit = sum(sizes), sum(size > 0 for size in sizes)
    waste = len(sizes) * max(sizes) - rows
    return hit > 1 and rows >= len(sizes) and waste * numel <= hit * PADDED_PRODUCTS


def _padded_slots(sizes: list[int]) -> Tensor:
    """The rows [sum(sizes)] of a batch of max(sizes) rows each that hold what is not padding."""
    longest, taken, shifts = max(sizes), 0, []
    for i, size in enumerate(sizes):
        shifts.append(i * longest - taken)
        taken += size
    shift = torch.tensor(shifts).repeat_interleave(torch.tensor(sizes), output_size=taken)
    return shift + torch.arange(taken)


def _batched_linear(x: Tensor, batch: range, w: Tensor, bias: Tensor | None) -> Tensor:
    """x [B * R, N], R rows for each of a batch of experts, w [E, M, N] -> [B * R, M]."""
    chosen = slice(batch.start, batch.stop)
    rows, w = x.view(len(batch), -1, x.shape[1]), w[chosen].mT
    if bias is None:
        return torch.bmm(rows, w).flatten(0, 1)
    return torch.baddbmm(bias[chosen].unsqueeze(1), rows, w).flatten(0, 1)


def _grouped_linear(
    x: Tensor, sizes: list[int], w: Tensor, *, experts: list[int], bias: Tensor | None
) -> Tensor:
    """x [S, N] -> [S, M]: of its rows, sizes[i] go through w[experts[i]] [M, N]."""
    parts = x.split(sizes)
    y: dict[int, Tensor] = {}

    def multiply(chosen: Iterable[int]) -> None:
        for i in chosen:
            e = experts[i]
            y[i] = linear(parts[i], w[e], None if bias is None else bias[e])

    few, numel = 0, w[0].numel()
    if x.dtype in ONEDNN_DTYPES and x.is_cpu and numel < LARGE:
        few = max(1, FEW_PRODUCTS // numel)
    if few:
        with without_onednn():
            multiply(i for i, size in enumerate(sizes) if size <= few)
    multiply(i for i, size in enumerate(sizes) if size > few)
    return torch.cat([y[i] for i in range(len(y))]) if len(y) > 1 else y[0]


def dense_cuda(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    bias13: Tensor | None,
    bias2: Tensor | None,
    expert_map: Tensor | None,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    # Triton is not installed where there is no CUDA.
    from moezoo.layers.kernels.combine import combine
    from moezoo.layers.kernels.down import down
    from moezoo.layers.kernels.few_tokens import few_tokens
    from moezoo.layers.kernels.gated_up import gated_up
    from moezoo.layers.kernels.permute import permute
    from moezoo.layers.kernels.tiles import plan

    gating = Gating(activation, limit, up_offset)
    w13, bias13 = in_parts(w13, bias13)

    # The kernels for few tokens read the weights' last dimension side by side.
    dense = w13.stride(-1) == w2.stride(-1) == 1
    num_experts = w13.shape[0] if expert_map is None else len(expert_map)

    def chunk(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        num_tokens, k = topk_ids.shape
        if topk_ids.numel() == 0 or len(w13) == 0:
            return x.new_zeros(x.shape)
        few = num_tokens == 1 or (
            num_tokens <= FEW_TOKENS and num_tokens * topk_ids.numel() <= num_experts
        )
        if few and dense:
            return few_tokens(
                *(x, w13, w2),
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                activation=gating,
                bias13=bias13,
                bias2=bias2,
            )
        tiles = plan(x, w13, w2, num_rows=topk_ids.numel(), num_experts=num_experts)
        with verb("permute"):
            rows = permute(topk_ids, w13.shape[0], tiles.gated_up.m)
        h = gated_up(
            *(x, w13, rows),
            k=k,
            tile=tiles.gated_up,
            activation=gating,
            bias13=bias13,
        )
        y = down(h, w2, rows, tile=tiles.down, bias2=bias2)
        with verb("combine"):
            return combine(y, topk_weights, rows.positions)

    with torch.cuda.device_of(x):
        return in_chunks(chunk, x, topk_weights, local_ids(topk_ids, expert_map))


@torch.compiler.disable
def dense_autograd(x: Tensor, *args: Any) -> Tensor:
    """The loop over experts is for autograd to see, not for a compiler to trace."""
    if x.is_cuda:
        warnings.warn(
            "fused_experts computes a gradient, expert by expert in torch; for inference use"
            " torch.no_grad() or torch.inference_mode(), and it runs its kernels",
            stacklevel=2,
        )
    return dense_torch(x, *args)


dense_op = operator("moezoo::fused_experts", dense_torch, dense_cuda)
