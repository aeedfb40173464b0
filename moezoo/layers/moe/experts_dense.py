"""Experts with weights of 16 or 32 bits: torch on CPU and for gradients, Triton on CUDA.

Legend: S chosen rows; otherwise as in `experts`.
"""

import warnings
from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.layers.kernels.activations import Gating, in_parts
from moezoo.layers.linear import linear
from moezoo.layers.moe.batches import Batch, batches_of, padded_slots, rows_of
from moezoo.layers.moe.chunks import in_chunks, local_ids, operator
from moezoo.layers.moe.permute import check_ids, permute
from moezoo.layers.moe.ranges import profiler_range
from moezoo.layers.onednn import FP32_ROWS, LARGE_MATRIX, ONEDNN_DTYPES, matvec, without_onednn

FEW_TOKENS = 4
"""Largest number of tokens for which, on a GPU, an expert is read once for each of its tokens,
unless too many share experts: on one H100 that is faster while T*T*K <= E."""

FEW_PRODUCTS = 2**18
"""Largest number of multiplications for which torch's own routine does a 16-bit product on a CPU
before oneDNN has begun it; so it does for a single row and fewer than `LARGE_MATRIX` weights."""


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
    """Compute `fused_experts` in torch; activation, limit and up_offset make the `Gating`."""
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
        """Compute a single token without grouping, as on a CPU every torch call counts."""
        with without_onednn():
            rows = _products(w13, chosen, repeat(x[0]), bias13)
            h = act(*torch.cat(rows).float().view(parts).unbind(dim)).type_as(x)
            rows = _products(w2, chosen, h.unbind(0), bias2)
        return torch.mm(topk_weights, torch.stack(rows).float()).type_as(x)

    def experts_of(x: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
        """Send x[tokens], in expert order, through the experts of the batch."""
        if batch.padded:
            slots = padded_slots(batch)
            padded = tokens.new_zeros(len(batch.experts) * batch.padded)
            x = x.index_select(0, padded.index_copy_(0, slots, tokens))
            y = _batched_linear(x, batch.experts, w13, bias13).float()
            h = act(*y.view(parts).unbind(dim)).to(x.dtype)
            return _batched_linear(h, batch.experts, w2, bias2).index_select(0, slots)
        experts = [e for e, size in zip(batch.experts, batch.sizes, strict=True) if size]
        sizes = [size for size in batch.sizes if size]
        x = x.index_select(0, tokens)
        y = _grouped_linear(x, sizes, w13, experts=experts, bias=bias13).float()
        h = act(*y.view(parts).unbind(dim)).to(x.dtype)
        return _grouped_linear(h, sizes, w2, experts=experts, bias=bias2)

    def chunk(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        num_tokens, k = topk_ids.shape
        if num_tokens == 1:
            (chosen,) = topk_ids.tolist()
            if min(chosen) >= 0 and max(chosen) < w13.shape[0]:
                return one_token(x, topk_weights, chosen)
        with profiler_range("permute"):
            order, offsets = permute(topk_ids, w13.shape[0])
        tokens, weights = order // k, topk_weights.flatten().index_select(0, order).unsqueeze(1)
        out = x.new_zeros(x.shape, dtype=torch.float32)
        bounds = offsets.tolist()
        if x.is_cpu and bounds[-1] < len(order):
            check_ids(topk_ids, w13.shape[0])
        few_rows = bias13 is None and bias2 is None and bounds[-1] < FP32_ROWS * w13.shape[0]
        if few_rows and _torch_groups(x, w13, w2):
            chosen, ends = tokens[: bounds[-1]], offsets[1:]
            y = F.grouped_mm(x.index_select(0, chosen), w13.mT, offs=ends).float()
            h = act(*y.view(parts).unbind(dim)).to(x.dtype)
            y = F.grouped_mm(h, w2.mT, offs=ends)
            return out.index_add_(0, chosen, y * weights[: bounds[-1]]).to(x.dtype)
        # A batch of one expert has no token twice: on CUDA, index_add_ leaves their order open.
        # Backward would see tokens where there is padding.
        pads = x.is_cpu and x.dtype in ONEDNN_DTYPES and not torch.is_grad_enabled()
        for batch in batches_of(bounds, w13.shape[1] * w13.shape[2], alone=x.is_cuda, pads=pads):
            rows = rows_of(batch, bounds)
            chosen = tokens[rows]
            y = experts_of(x, chosen, batch)
            out.index_add_(0, chosen, y * weights[rows])
        return out.to(x.dtype)

    return in_chunks(chunk, x, topk_weights, local_ids(topk_ids, expert_map))


def _torch_groups(x: Tensor, w13: Tensor, w2: Tensor) -> bool:
    """Whether torch's grouped product on the CPU takes these weights and is the faster way for few
    rows: it gives the bits of our loop, a sixth faster."""
    if not x.is_cpu or x.dtype.itemsize != 2 or x.dtype in ONEDNN_DTYPES or torch.is_grad_enabled():
        return False
    return w13.is_contiguous() and w2.is_contiguous() and w13.shape[2] % 8 == w2.shape[2] % 8 == 0


def _products(
    w: Tensor, experts: list[int], x: Iterable[Tensor], bias: Tensor | None
) -> list[Tensor]:
    """Return w[e] [M, N] @ x [N] + bias[e] [M] for each e of `experts` and its x."""
    rows = zip(experts, x, strict=False)
    if w[0].numel() >= LARGE_MATRIX:
        return [matvec(w[e], row, None if bias is None else bias[e]) for e, row in rows]
    if bias is None:
        return [torch.mv(w[e], row) for e, row in rows]
    return [torch.addmv(bias[e], w[e], row) for e, row in rows]


def _batched_linear(x: Tensor, experts: range, w: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x [B * R, N], R rows for each of B experts, by w [E, M, N] and add bias [E, M];
    return [B * R, M]."""
    chosen = slice(experts.start, experts.stop)
    rows, w = x.view(len(experts), -1, x.shape[1]), w[chosen].mT
    if bias is None:
        return torch.bmm(rows, w).flatten(0, 1)
    return torch.baddbmm(bias[chosen].unsqueeze(1), rows, w).flatten(0, 1)


def _grouped_linear(
    x: Tensor, sizes: list[int], w: Tensor, *, experts: list[int], bias: Tensor | None
) -> Tensor:
    """Multiply sizes[i] rows of x [S, N] by w[experts[i]] [M, N], for each i, and add the expert's
    bias; return [S, M]."""
    parts = x.split(sizes)
    y: dict[int, Tensor] = {}

    def multiply(chosen: Iterable[int]) -> None:
        for i in chosen:
            e = experts[i]
            y[i] = linear(parts[i], w[e], None if bias is None else bias[e])

    few, numel = 0, w[0].numel()
    if x.dtype in ONEDNN_DTYPES and x.is_cpu and numel < LARGE_MATRIX:
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
    """Compute `fused_experts` by kernels; activation, limit and up_offset make the `Gating`."""
    # Triton is not installed where there is no CUDA.
    from moezoo.layers.kernels.combine import combine
    from moezoo.layers.kernels.down import down
    from moezoo.layers.kernels.few_tokens import few_tokens
    from moezoo.layers.kernels.gated_up import gated_up
    from moezoo.layers.kernels.permute import permute
    from moezoo.layers.kernels.tiles import plan

    gating = Gating(activation, limit, up_offset)
    w13, bias13 = in_parts(w13, bias13)

    # The kernels for few tokens need weights whose last dimension is contiguous.
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
        with profiler_range("permute"):
            rows = permute(topk_ids, w13.shape[0], tiles.gated_up.m)
        h = gated_up(
            *(x, w13, rows),
            k=k,
            tile=tiles.gated_up,
            activation=gating,
            bias13=bias13,
        )
        y = down(h, w2, rows, tile=tiles.down, bias2=bias2)
        with profiler_range("combine"):
            return combine(y, topk_weights, rows.positions)

    with torch.cuda.device_of(x):
        return in_chunks(chunk, x, topk_weights, local_ids(topk_ids, expert_map))


@torch.compiler.disable
def dense_autograd(x: Tensor, *args: Any) -> Tensor:
    """Compute `fused_experts` in torch with gradients; a compiler does not trace its loop."""
    if x.is_cuda:
        warnings.warn(
            "fused_experts computes a gradient, expert by expert in torch; for inference use"
            " torch.no_grad() or torch.inference_mode(), and it runs its kernels",
            stacklevel=2,
        )
    return dense_torch(x, *args)


dense_op = operator("moezoo::fused_experts", dense_torch, dense_cuda)
