"""The experts: two grouped matrix products with the gated activation between.

    y[t] = sum over k of topk_weights[t, k] * w2[e] @ (act(gate) * up),  e = topk_ids[t, k]
    gate, up = the halves of w13[e] @ x[t]

or, for experts without a gate, w2[e] @ act(w13[e] @ x[t]).

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token.

Rounding points: products accumulate in fp32; the gated activation is computed in fp32 and rounded
once to x's dtype, so is each expert's output row; weighting and the sum over K are fp32 and rounded
once. On CPU, torch has no 16-bit product with an fp32 result: there gate and up are rounded too.

With weights in block fp8, x is quantised per token and 128 of H, and the gated activation, in fp32
until then, per row and 128 of I. Products accumulate in the matrix units for 128 of H or I (on
Hopper with 13 bits of fraction), are scaled by both scales and added in fp32. The rest is as above;
the CPU multiplies the dequantised values in fp32.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.errors import QuantizationError
from moezoo.layers.kernels.activations import Gating, in_parts
from moezoo.layers.linear import FP32_ROWS, ONEDNN_DTYPES, linear, without_onednn
from moezoo.layers.moe.permute import permute
from moezoo.layers.quant.fp8 import BLOCK, BLOCK_FP8, BlockFp8, quantize_rows

CHUNK_TOKENS = 16384
"""Tokens worked on at a time: enough to fill a GPU, and what bounds `workspace_bytes`."""


FEW_TOKENS = 4
"""Up to so many tokens, on a GPU, an expert is multiplied once for each of them, unless too many
share it: measured on one H100, that is faster while T*T*K <= E."""

FEW_PRODUCTS = 2**18
"""With no more products than this for an expert, and with a single row, oneDNN takes longer to
begin a 16-bit product on CPU than torch's own routine takes to do it."""

BATCH_ROWS = 512
"""Rows that experts worked on together on CPU have at most, if they are more than one."""


def workspace_bytes(
    num_tokens: int, k: int, hidden_size: int, *, intermediate_size: int, element_size: int
) -> int:
    """Bytes of the buffers that `fused_experts` allocates on a GPU for `num_tokens`.

    With weights of 16 or 32 bits: per chosen row its activation [I], its output [H] and 8 bytes of
    index (not counted: 4 bytes for each expert); per token its result [H], twice where chunks are
    put together. Beyond `CHUNK_TOKENS` tokens only the results grow.

    The buffers come from torch's caching allocator, which is the one workspace per device that
    all layers share: they are freed in stream order when a layer returns, so the next layer gets
    the same memory, and inside a CUDA graph that of the graph's pool.
    """
    rows = min(num_tokens, CHUNK_TOKENS) * k
    results = num_tokens * (1 if num_tokens <= CHUNK_TOKENS else 2)
    row_bytes = (intermediate_size + hidden_size) * element_size + 8
    return rows * row_bytes + results * hidden_size * element_size


def fused_experts(
    x: Tensor,
    w13: Tensor | BlockFp8,
    w2: Tensor | BlockFp8,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each token's chosen experts: [T, H] in x's dtype.

    x [T, H]; w13 [E, 2I, H] (gate rows, then up rows) and w2 [E, H, I] in x's dtype, one of fp32,
    bf16, fp16; topk_weights [T, K] fp32; topk_ids [T, K] int32; bias13 [E, 2I] and bias2 [E, H] in
    x's dtype. With expert_map (int32 [E'] -> row of w13 and w2, or -1) topk_ids are positions in
    the map. An id of -1, or one that the map sends to -1, contributes nothing.

    Weights may have any strides. w13 may also be [E, 2, I, H], its halves: rows that alternate in
    memory (gate, up, gate, ..) are a view of it. As [E, 1, I, H] it has no gate, and the activation
    is applied to what it has. bias13 then is [E, 2, I] or [E, 1, I].

    Both weights may be `BlockFp8` instead, of the same shapes; as [E, 2I, H] w13 needs an I that
    128 divides, so that gate and up have their own blocks.

    Triton on CUDA, torch on CPU and wherever a gradient is asked for. `torch.compile` and CUDA
    graphs work through it: while compiling it is the operator `moezoo::fused_experts`, or
    `moezoo::fused_experts_block_fp8`.

    Raises ValueError, naming the argument, for shapes, dtypes or devices that do not fit, for an
    activation that is not in `ACTIVATIONS`, and where a gradient is asked for through `BlockFp8`;
    QuantizationError on a GPU that does not multiply fp8.
    """
    gating = Gating.of(activation)
    if isinstance(w13, BlockFp8) or isinstance(w2, BlockFp8):
        if not isinstance(w13, BlockFp8) or not isinstance(w2, BlockFp8):
            raise ValueError(
                f"w13 and w2 must both be BlockFp8 or both tensors, got {type(w13).__name__} and "
                f"{type(w2).__name__}"
            )
        data13, scales13 = w13.data, w13.scales
        _validate(
            *(x, data13, w2.data, topk_weights, topk_ids, gating, bias13, bias2, expert_map),
            weights_dtype=torch.float8_e4m3fn,
        )
        if data13.ndim == 3:
            if data13.shape[1] % (2 * BLOCK):
                raise ValueError(
                    "w13 as BlockFp8 must be [E, 2, I, H], or [E, 2I, H] with an I that 128 "
                    f"divides, got {_describe(data13)}"
                )
            data13, bias13 = in_parts(data13, bias13)
            scales13, _ = in_parts(scales13)
        if torch.is_grad_enabled() and _requires_grad(x, topk_weights, bias13, bias2):
            raise ValueError(
                "there is no gradient through BlockFp8 weights; use torch.no_grad() or "
                "torch.inference_mode(), or dequantize() them"
            )
        quantized = (
            *(x, data13, scales13, w2.data, w2.scales, topk_weights, topk_ids),
            *(gating.activation, bias13, bias2, expert_map, gating.limit, gating.up_offset),
        )
        if torch.compiler.is_compiling():
            y: Tensor = _block_fp8_op(*quantized)
            return y
        return _block_fp8_cuda(*quantized) if x.is_cuda else _block_fp8_torch(*quantized)
    _validate(x, w13, w2, topk_weights, topk_ids, gating, bias13, bias2, expert_map)
    args = (
        *(x, w13, w2, topk_weights, topk_ids, gating.activation, bias13, bias2, expert_map),
        *(gating.limit, gating.up_offset),
    )
    if torch.is_grad_enabled() and _requires_grad(x, w13, w2, topk_weights, bias13, bias2):
        return _fused_experts_autograd(*args)
    if torch.compiler.is_compiling():
        result: Tensor = _fused_experts_op(*args)
        return result
    return _fused_experts_cuda(*args) if x.is_cuda else _fused_experts_torch(*args)


def _fused_experts_torch(
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
        row = x.squeeze(0)
        with without_onednn():
            rows = [_row_times(w13[e], row, bias13, e) for e in chosen]
            y = torch.cat(rows).float()
            h = act(*y.view(parts).unbind(dim)).to(x.dtype).unbind(0)
            rows = [_row_times(w2[e], row, bias2, e) for row, e in zip(h, chosen, strict=True)]
        return torch.mm(topk_weights, torch.stack(rows).float()).to(x.dtype)

    def experts_of(x: Tensor, experts: list[int], sizes: list[int]) -> Tensor:
        """Of the rows of x, sizes[i] go through experts[i]."""
        y = _grouped_linear(x, sizes, w13, experts=experts, bias=bias13).float()
        h = act(*y.view(parts).unbind(dim)).to(x.dtype)
        return _grouped_linear(h, sizes, w2, experts=experts, bias=bias2)

    def chunk(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        num_tokens, k = topk_ids.shape
        if num_tokens == 1:
            (chosen,) = topk_ids.tolist()
            if min(chosen) >= 0 and max(chosen) < w13.shape[0]:
                return one_token(x, topk_weights, chosen)
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
        for batch in _batches(bounds, 1 if x.is_cuda else BATCH_ROWS):
            experts = [e for e in batch if bounds[e] < bounds[e + 1]]
            sizes = [bounds[e + 1] - bounds[e] for e in experts]
            rows = slice(bounds[batch.start], bounds[batch.stop])
            y = experts_of(x.index_select(0, tokens[rows]), experts, sizes)
            out.index_add_(0, tokens[rows], y * weights[rows])
        return out.to(x.dtype)

    return _in_chunks(chunk, x, topk_weights, _local_ids(topk_ids, expert_map))


def _torch_groups(x: Tensor, w13: Tensor, w2: Tensor) -> bool:
    """Whether torch's own grouped product on the CPU takes the weights, and is the faster way with
    few rows: the bits of its loop are those of ours, a sixth faster."""
    if not x.is_cpu or x.dtype.itemsize != 2 or x.dtype in ONEDNN_DTYPES or torch.is_grad_enabled():
        return False
    return w13.is_contiguous() and w2.is_contiguous() and w13.shape[2] % 8 == w2.shape[2] % 8 == 0


def _row_times(w: Tensor, x: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    """w [M, N], x [N], bias [E, M] -> w @ x + bias[expert], [M]."""
    return torch.mv(w, x) if bias is None else torch.addmv(bias[expert], w, x)


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

    few = max(1, FEW_PRODUCTS // w[0].numel()) if x.dtype in ONEDNN_DTYPES and x.is_cpu else 0
    if few:
        with without_onednn():
            multiply(i for i, size in enumerate(sizes) if size <= few)
    multiply(i for i, size in enumerate(sizes) if size > few)
    return torch.cat([y[i] for i in range(len(y))]) if len(y) > 1 else y[0]


def _fused_experts_cuda(
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
        rows = permute(topk_ids, w13.shape[0], tiles.gated_up.m)
        h = gated_up(
            *(x, w13, rows),
            k=k,
            tile=tiles.gated_up,
            activation=gating,
            bias13=bias13,
        )
        y = down(h, w2, rows, tile=tiles.down, bias2=bias2)
        return combine(y, topk_weights, rows.positions)

    with torch.cuda.device_of(x):
        return _in_chunks(chunk, x, topk_weights, _local_ids(topk_ids, expert_map))


def _local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """topk_ids as rows of this process' w13 and w2, -1 where another one has the expert."""
    if expert_map is None:
        return topk_ids
    return expert_map[topk_ids.clamp(min=0)].where(topk_ids >= 0, -1)


def _in_chunks(
    chunk: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    if x.shape[0] <= CHUNK_TOKENS:
        return chunk(x, topk_weights, topk_ids)
    parts = (tensor.split(CHUNK_TOKENS) for tensor in (x, topk_weights, topk_ids))
    return torch.cat([chunk(*part) for part in zip(*parts, strict=True)])


@torch.compiler.disable
def _fused_experts_autograd(x: Tensor, *args: Any) -> Tensor:
    """The loop over experts is for autograd to see, not for a compiler to trace."""
    if x.is_cuda:
        warnings.warn(
            "fused_experts computes a gradient, expert by expert in torch; for inference use"
            " torch.no_grad() or torch.inference_mode(), and it runs its kernels",
            stacklevel=2,
        )
    return _fused_experts_torch(x, *args)


def _operator(name: str, on_cpu: Callable[..., Tensor], on_cuda: Callable[..., Tensor]) -> Any:
    """What a compiler sees of both: one call, with a result like x."""
    op = torch.library.custom_op(name, on_cpu, mutates_args=(), device_types="cpu")
    op.register_kernel("cuda", on_cuda)
    op.register_fake(lambda x, *_, **__: x.new_empty(x.shape))
    return op


_fused_experts_op = _operator("moezoo::fused_experts", _fused_experts_torch, _fused_experts_cuda)


def _block_fp8_torch(
    x: Tensor,
    w13: Tensor,
    scales13: Tensor,
    w2: Tensor,
    scales2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    bias13: Tensor | None,
    bias2: Tensor | None,
    expert_map: Tensor | None,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    """w13 [E, 2 or 1, I, H]; one expert at a time is dequantised."""
    blocks13, blocks2 = BlockFp8(w13, scales13), BlockFp8(w2, scales2)
    num_experts, _, intermediate_size, hidden_size = w13.shape
    act = Gating(activation, limit, up_offset)

    def chunk(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        order, offsets = permute(topk_ids, num_experts)
        tokens = order // topk_ids.shape[1]
        weights = topk_weights.flatten().index_select(0, order).unsqueeze(1)
        rounded = quantize_rows(x).dequantize()[:, :hidden_size]
        out = x.new_zeros(x.shape, dtype=torch.float32)
        bounds = offsets.tolist()
        for e in range(num_experts):
            rows = slice(bounds[e], bounds[e + 1])
            if rows.start == rows.stop:
                continue
            parts = rounded[tokens[rows]] @ blocks13[e].dequantize().mT  # [1 or 2, rows, I]
            if bias13 is not None:
                parts += bias13[e].float().unsqueeze(1)
            h = quantize_rows(act(*parts)).dequantize()[:, :intermediate_size]
            y = h @ blocks2[e].dequantize().mT
            if bias2 is not None:
                y += bias2[e].float()
            out.index_add_(0, tokens[rows], y.to(x.dtype).float() * weights[rows])
        return out.to(x.dtype)

    return _in_chunks(chunk, x, topk_weights, _local_ids(topk_ids, expert_map))


def _block_fp8_cuda(
    x: Tensor,
    w13: Tensor,
    scales13: Tensor,
    w2: Tensor,
    scales2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    bias13: Tensor | None,
    bias2: Tensor | None,
    expert_map: Tensor | None,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    """w13 [E, 2 or 1, I, H]."""
    from moezoo.layers.kernels.combine import combine
    from moezoo.layers.kernels.down_fp8 import down_fp8
    from moezoo.layers.kernels.gated_up_fp8 import gated_up_fp8
    from moezoo.layers.kernels.one_token_fp8 import one_token_fp8
    from moezoo.layers.kernels.quantize import permute_and_quantize
    from moezoo.layers.kernels.tiles import plan

    require_fp8(x.device)
    blocks13, blocks2 = BlockFp8(w13, scales13), BlockFp8(w2, scales2)
    gating = Gating(activation, limit, up_offset)
    dense = w13.stride(-1) == w2.stride(-1) == 1
    num_experts = w13.shape[0] if expert_map is None else len(expert_map)

    def chunk(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        num_tokens, k = topk_ids.shape
        if topk_ids.numel() == 0 or len(w13) == 0:
            return x.new_zeros(x.shape)
        if num_tokens == 1 and dense:
            return one_token_fp8(
                *(x, blocks13, blocks2),
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                activation=gating,
                bias13=bias13,
                bias2=bias2,
            )
        tiles = plan(x, w13, w2, num_rows=topk_ids.numel(), num_experts=num_experts)
        rows, tokens = permute_and_quantize(x, topk_ids, w13.shape[0], tiles.gated_up.m)
        h = gated_up_fp8(
            *(tokens, blocks13, rows),
            k=k,
            tile=tiles.gated_up,
            activation=gating,
            bias13=bias13,
        )
        y = down_fp8(h, blocks2, rows, dtype=x.dtype, tile=tiles.down, bias2=bias2)
        return combine(y, topk_weights, rows.positions)

    with torch.cuda.device_of(x):
        return _in_chunks(chunk, x, topk_weights, _local_ids(topk_ids, expert_map))


_block_fp8_op = _operator("moezoo::fused_experts_block_fp8", _block_fp8_torch, _block_fp8_cuda)


def require_fp8(device: torch.device) -> None:
    """Raises QuantizationError for a GPU that does not multiply fp8."""
    if device.type != "cuda" or torch.version.hip is not None:
        return
    from moezoo.layers.kernels.overlap import capability

    if capability(device) < (8, 9):
        raise QuantizationError(
            f"{BLOCK_FP8} needs a GPU of compute capability 8.9 or later, "
            f"{torch.cuda.get_device_name(device)} has {capability(device)}; dequantize() the "
            "weights to bfloat16 for it"
        )


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _validate(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gating: Gating,
    bias13: Tensor | None,
    bias2: Tensor | None,
    expert_map: Tensor | None,
    weights_dtype: torch.dtype | None = None,
) -> None:
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x must be [T, H] in float32, bfloat16 or float16, got {_describe(x)}")
    if w2.ndim != 3 or topk_ids.ndim != 2:
        raise ValueError(
            "w2 must be [E, H, I] and topk_ids [T, K], "
            f"got {_describe(w2)} and {_describe(topk_ids)}"
        )
    (num_tokens, hidden_size), dtype, device = x.shape, x.dtype, x.device
    num_experts, _, intermediate_size = w2.shape
    k = topk_ids.shape[1]
    weights_dtype = weights_dtype or dtype
    rows: tuple[int, ...] = (num_experts, 2 * intermediate_size)
    if w13.ndim == 4:
        rows = (num_experts, 1 if w13.shape[1] == 1 else 2, intermediate_size)
        if w13.shape[1] == 1 and (gating.limit is not None or gating.up_offset):
            raise ValueError(f"w13 {_describe(w13)} has no gate that {gating} could bound")
    if topk_ids.dtype != torch.int32 and topk_ids.dtype != torch.int64:
        raise ValueError(f"topk_ids must be int32 or int64, got {_describe(topk_ids)}")
    for name, tensor, shape, dtype_ in (
        ("w13", w13, (*rows, hidden_size), weights_dtype),
        ("w2", w2, (num_experts, hidden_size, intermediate_size), weights_dtype),
        ("topk_ids", topk_ids, (num_tokens, k), topk_ids.dtype),
        ("topk_weights", topk_weights, (num_tokens, k), torch.float32),
        ("bias13", bias13, rows, dtype),
        ("bias2", bias2, (num_experts, hidden_size), dtype),
        ("expert_map", expert_map, None, torch.int32),
    ):
        if tensor is None:
            continue
        if (
            (shape is not None and tensor.shape != shape)
            or tensor.dtype != dtype_
            or tensor.device != device
        ):
            raise ValueError(
                f"{name} must be {list(shape) if shape else '[E]'} {dtype_} on {device} to go with "
                f"x {_describe(x)} and w2 {_describe(w2)}, got {_describe(tensor)}"
            )


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
