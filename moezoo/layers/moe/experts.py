"""The experts: two grouped matrix products with the gated activation between.

    y[t] = sum over k of topk_weights[t, k] * w2[e] @ (act(gate) * up),  e = topk_ids[t, k]
    gate, up = the halves of w13[e] @ x[t]

or, for experts without a gate, w2[e] @ act(w13[e] @ x[t]).

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token.

Rounding points: products accumulate in fp32; the gated activation is computed in fp32 and rounded
once to x's dtype, so is each expert's output row; weighting and the sum over K are fp32 and rounded
once. On CPU, torch has no 16-bit product with an fp32 result: there gate and up are rounded too.

With fp8 weights, x is quantised in groups of 128 numbers of a token, and the gated activation, fp32
until then, in groups of 128 numbers of a row. Products accumulate 128 summands in the matrix units
(on Hopper with 13 bits of fraction), which are scaled by both scales and added in fp32. The rest is
as above.

With weight-only formats the weights are dequantised, on CUDA to x's dtype, where a product reads
them. The CPU multiplies dequantised values in fp32, one expert after the other, in every format.
"""

import torch
from torch import Tensor

from moezoo.layers.kernels.activations import Gating
from moezoo.layers.moe.chunks import CHUNK_TOKENS
from moezoo.layers.moe.experts_dense import dense_autograd, dense_cuda, dense_op, dense_torch
from moezoo.layers.moe.experts_quantized import OPERATORS, quantized_experts
from moezoo.layers.quant import Format, fp8


def workspace_bytes(
    num_tokens: int,
    k: int,
    hidden_size: int,
    *,
    intermediate_size: int,
    element_size: int,
    weights: type[Format] | None = None,
) -> int:
    """Return the bytes of the buffers that `fused_experts` allocates on a GPU for `num_tokens`.

    A chosen row takes its activation [I], its output [H] and 8 bytes of index (not counted: 4 bytes
    for each expert); a token takes its result [H], twice where chunks are concatenated. Beyond
    `CHUNK_TOKENS` tokens only the results grow. `weights` is the weights' format, None for 16 or 32
    bits. With fp8, an activation is a byte, plus scales, and there is an fp8 copy of the tokens.
    With weight-only formats there is a copy of the tokens in the order of the packed columns (and
    one for each chosen row where columns have another order, see `Integers`).

    The buffers come from torch's caching allocator, which is the one workspace per device that
    all layers share: they are freed in stream order when a layer returns, so the next layer gets
    the same memory, and inside a CUDA graph that of the graph's pool.
    """
    in_chunk = min(num_tokens, CHUNK_TOKENS)
    results = num_tokens * (1 if num_tokens <= CHUNK_TOKENS else 2)
    activation_bytes = intermediate_size * element_size
    token_bytes = 0 if weights is None else hidden_size * element_size
    if weights is not None and weights.quantizes_activations:
        activation_bytes, token_bytes = fp8.row_bytes(intermediate_size), fp8.row_bytes(hidden_size)
    row_bytes = activation_bytes + hidden_size * element_size + 8
    return in_chunk * (k * row_bytes + token_bytes) + results * hidden_size * element_size


def fused_experts(
    x: Tensor,
    w13: Tensor | Format,
    w2: Tensor | Format,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of each token's chosen experts, [T, H] in x's dtype.

    x [T, H]; w13 [E, 2I, H] (gate rows, then up rows) and w2 [E, H, I] in x's dtype, one of fp32,
    bf16, fp16; topk_weights [T, K] fp32; topk_ids [T, K] int32; bias13 [E, 2I] and bias2 [E, H] in
    x's dtype. With expert_map (int32 [E'] -> row of w13 and w2, or -1) topk_ids are positions in
    the map. An id of -1, or one that the map sends to -1, contributes nothing. No other id may be
    outside the weights or the map: a CPU looks, a GPU would have to be waited for.

    Weights may have any strides. w13 may also be [E, 2, I, H], its halves: rows that alternate in
    memory (gate, up, gate, ..) are a view of it. As [E, 1, I, H] it has no gate, and the activation
    is applied to what it has. bias13 then is [E, 2, I] or [E, 1, I].

    Both weights may be of one quantised format instead (`moezoo.layers.quant`), of the same shapes;
    as [E, 2I, H] a w13 of `BlockFp8` needs an I that 128 divides, so that gate and up have their
    own blocks.

    Triton on CUDA, torch on CPU and wherever a gradient is asked for. `torch.compile` and CUDA
    graphs work through it: while compiling it is the operator `moezoo::fused_experts`, or that of
    the format, such as `moezoo::fused_experts_int4`.

    Raises ValueError, naming the argument, for shapes, dtypes or devices that do not fit, on a CPU
    for an id that is no expert's, for an activation that is not in `ACTIVATIONS`, and where a
    gradient is asked for through quantised weights; QuantizationError for fp8 on a GPU that does
    not multiply it.
    """
    gating = Gating.of(activation)
    if type(w13) is not type(w2) and (isinstance(w13, Format) or isinstance(w2, Format)):
        raise ValueError(
            "w13 and w2 must both be tensors or both of one format, got "
            f"{type(w13).__name__} and {type(w2).__name__}"
        )
    _validate(x, w13, w2, topk_weights, topk_ids, gating, bias13, bias2, expert_map)
    if isinstance(w13, Format):
        assert isinstance(w2, Format)
        if len(w13.shape) == 3:
            w13 = w13.in_parts(2)
            bias13 = None if bias13 is None else bias13.unflatten(1, (2, -1))
        if torch.is_grad_enabled() and _requires_grad(x, topk_weights, bias13, bias2):
            raise ValueError(
                f"there is no gradient through {type(w13).__name__} weights; use torch.no_grad() "
                "or torch.inference_mode(), or weights that you dequantize()"
            )
        if torch.compiler.is_compiling():
            y: Tensor = OPERATORS[type(w13)](
                *(x, list(w13.tensors().values()), list(w2.tensors().values())),
                *(topk_weights, topk_ids, gating.activation, bias13, bias2, expert_map),
                *(gating.limit, gating.up_offset),
            )
            return y
        return quantized_experts(
            *(x, w13, w2, topk_weights, topk_ids),
            gating=gating,
            bias13=bias13,
            bias2=bias2,
            expert_map=expert_map,
        )
    assert not isinstance(w2, Format)
    args = (
        *(x, w13, w2, topk_weights, topk_ids, gating.activation, bias13, bias2, expert_map),
        *(gating.limit, gating.up_offset),
    )
    if torch.is_grad_enabled() and _requires_grad(x, w13, w2, topk_weights, bias13, bias2):
        return dense_autograd(*args)
    if torch.compiler.is_compiling():
        result: Tensor = dense_op(*args)
        return result
    return dense_cuda(*args) if x.is_cuda else dense_torch(*args)


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _validate(
    x: Tensor,
    w13: Tensor | Format,
    w2: Tensor | Format,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gating: Gating,
    bias13: Tensor | None,
    bias2: Tensor | None,
    expert_map: Tensor | None,
) -> None:
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x must be [T, H] in float32, bfloat16 or float16, got {_describe(x)}")
    if len(w2.shape) != 3 or topk_ids.ndim != 2:
        raise ValueError(
            "w2 must be [E, H, I] and topk_ids [T, K], "
            f"got {_describe(w2)} and {_describe(topk_ids)}"
        )
    (num_tokens, hidden_size), dtype, device = x.shape, x.dtype, x.device
    num_experts, _, intermediate_size = w2.shape
    k = topk_ids.shape[1]
    weights_kind = _kind(w2) if isinstance(w2, Format) else dtype
    rows: tuple[int, ...] = (num_experts, 2 * intermediate_size)
    if len(w13.shape) == 4:
        rows = (num_experts, 1 if w13.shape[1] == 1 else 2, intermediate_size)
        if w13.shape[1] == 1 and (gating.limit is not None or gating.up_offset):
            raise ValueError(f"w13 {_describe(w13)} has no gate that {gating} could bound")
    if topk_ids.dtype != torch.int32 and topk_ids.dtype != torch.int64:
        raise ValueError(f"topk_ids must be int32 or int64, got {_describe(topk_ids)}")
    expected: list[
        tuple[str, Tensor | Format, tuple[int, ...] | None, torch.dtype | type[Format]]
    ] = [
        ("w13", w13, (*rows, hidden_size), weights_kind),
        ("w2", w2, (num_experts, hidden_size, intermediate_size), weights_kind),
        ("topk_ids", topk_ids, (num_tokens, k), topk_ids.dtype),
        ("topk_weights", topk_weights, (num_tokens, k), torch.float32),
    ]
    if bias13 is not None:
        expected.append(("bias13", bias13, rows, dtype))
    if bias2 is not None:
        expected.append(("bias2", bias2, (num_experts, hidden_size), dtype))
    if expert_map is not None:
        expected.append(("expert_map", expert_map, None, torch.int32))
    for name, tensor, shape, kind in expected:
        if (
            (shape is not None and tensor.shape != shape)
            or _kind(tensor) is not kind
            or tensor.device != device
        ):
            raise ValueError(
                f"{name} must be {list(shape) if shape else '[E]'} {_kind_name(kind)} on {device} "
                f"to go with x {_describe(x)} and w2 {_describe(w2)}, got {_describe(tensor)}"
            )


def _kind(weights: Tensor | Format) -> torch.dtype | type[Format]:
    return type(weights) if isinstance(weights, Format) else weights.dtype


def _kind_name(kind: torch.dtype | type[Format]) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _describe(weights: Tensor | Format) -> str:
    return f"{list(weights.shape)} {_kind_name(_kind(weights))} on {weights.device}"
