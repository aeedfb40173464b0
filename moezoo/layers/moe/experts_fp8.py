"""Experts in fp8 on CUDA.

Both products multiply fp8 by fp8: x is quantised in groups of 128 numbers of a token, the gated
activation in groups of 128 numbers of a row.
"""

from torch import Tensor

from moezoo.layers.kernels.activations import Gating
from moezoo.layers.moe.ranges import profiler_range
from moezoo.layers.quant.channel_fp8 import Fp8Weights
from moezoo.layers.quant.fp8 import FOR_EXPERTS, require_fp8


def fp8_cuda(
    x: Tensor,
    w13: Fp8Weights,
    w2: Fp8Weights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    gating: Gating,
    bias13: Tensor | None,
    bias2: Tensor | None,
    num_experts: int,
) -> Tensor:
    """Compute `fused_experts` with w13 [E, 2 or 1, I, H].

    topk_ids [T, K] are rows of w13, or negative. Tokens choose from num_experts experts, those of
    other ranks included.
    """
    from moezoo.layers.kernels.combine import combine
    from moezoo.layers.kernels.down_fp8 import down_fp8
    from moezoo.layers.kernels.gated_up_fp8 import gated_up_fp8
    from moezoo.layers.kernels.one_token_fp8 import one_token_fp8
    from moezoo.layers.kernels.quantize import permute_and_quantize
    from moezoo.layers.kernels.tiles import plan

    require_fp8(x.device, FOR_EXPERTS)
    num_tokens, k = topk_ids.shape
    if num_tokens == 1 and w13.data.stride(-1) == w2.data.stride(-1) == 1:
        return one_token_fp8(
            *(x, w13, w2),
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=gating,
            bias13=bias13,
            bias2=bias2,
        )
    tiles = plan(x, w13.data, w2.data, num_rows=topk_ids.numel(), num_experts=num_experts)
    with profiler_range("permute"):
        rows, tokens = permute_and_quantize(x, topk_ids, w13.shape[0], tiles.gated_up.m)
    h = gated_up_fp8(
        *(tokens, w13, rows),
        k=k,
        tile=tiles.gated_up,
        activation=gating,
        bias13=bias13,
    )
    y = down_fp8(h, w2, rows, dtype=x.dtype, tile=tiles.down, bias2=bias2)
    with profiler_range("combine"):
        return combine(y, topk_weights, rows.positions)
