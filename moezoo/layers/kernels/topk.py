"""topk: the routers' scores, choice and weights in one launch.

    logits  = logits + bias, where the gate has one
    scores  = softmax(logits) or sigmoid(logits)
    choice  = scores + correction_bias, outside the best groups: dropped
    ids     = the k largest of choice, ties to the lower id
    weights = scores[ids], over max(their sum + epsilon, min_sum) if renormalised, times scaling

or the k largest logits are chosen, and scores are computed of these alone.

`moezoo.layers.moe.routing` has the reference and says which router is which.

Legend: T tokens, E experts, K experts per token, G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2


@triton.jit
def sort_key(x):
    """int32 in the order of fp32 x, NaN above all, the zeros alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def _from_sort_key(key):
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _argmax(key, position, LAST: tl.constexpr):
    """Of each row of key [T, E], the largest and its position; the lower one of equals."""
    best = tl.max(key, 1)
    return best, tl.min(tl.where(key == best[:, None], position, LAST), 1)


@triton.jit(do_not_specialize=["num_tokens"])
def _topk_kernel(
    logits_ptr,
    logits_bias_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    num_tokens,
    num_experts,
    stride_t,
    stride_e,
    epsilon,
    min_sum,
    scaling,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_LOGITS_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    m_tokens = tokens < num_tokens
    m_experts = experts[None, :] < num_experts
    p_logits = logits_ptr + tokens[:, None] * stride_t + experts[None, :] * stride_e
    lowest = float("-inf")
    logits = tl.load(p_logits, mask=m_tokens[:, None] & m_experts, other=lowest).to(tl.float32)
    if HAS_LOGITS_BIAS:
        b_bias = tl.load(logits_bias_ptr + experts, mask=experts < num_experts, other=0.0)
        logits += b_bias.to(tl.float32)[None, :]
    if SCORING == "sigmoid":
        scores = tl.where(m_experts, tl.sigmoid(logits), 0.0)
    elif SCORING == "softmax":
        exponentials = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = exponentials / tl.sum(exponentials, 1)[:, None]
    else:
        tl.static_assert(SCORING == "softmax_of_chosen" or SCORING == "sigmoid_of_chosen")
        scores = logits
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + experts, mask=experts < num_experts, other=0.0)[None, :]
    # Lanes past the experts come after every expert, whatever its score.
    no_key = -0x80000000
    key = tl.where(m_experts, sort_key(choice), no_key)
    positions = tl.broadcast_to(experts[None, :], [BLOCK_T, BLOCK_E])

    if TOPK_GROUPS < NUM_GROUPS:
        groups = tl.broadcast_to(tl.arange(0, BLOCK_G)[None, :], [BLOCK_T, BLOCK_G])
        group_key = tl.full([BLOCK_T, BLOCK_G], no_key, tl.int32)
        for g in tl.static_range(NUM_GROUPS):
            own = positions // GROUP_SIZE == g
            own_key = tl.where(own, key, no_key)
            best, first = _argmax(own_key, positions, BLOCK_E)
            value = _from_sort_key(best)
            if HAS_BIAS and GROUP_SIZE > 1:
                own_key = tl.where(positions == first[:, None], no_key, own_key)
                value += _from_sort_key(tl.max(own_key, 1))
            group_key = tl.where(groups == g, sort_key(value)[:, None], group_key)
        kept = positions < 0
        for _ in tl.static_range(TOPK_GROUPS):
            _, group = _argmax(group_key, groups, BLOCK_G)
            group_key = tl.where(groups == group[:, None], no_key, group_key)
            kept = kept | (positions // GROUP_SIZE == group[:, None])
        # Without a bias the others score 0, with one -inf.
        choice = tl.where(kept, choice, lowest if HAS_BIAS else 0.0)
        key = tl.where(m_experts, sort_key(choice), no_key)

    slots = tl.broadcast_to(tl.arange(0, BLOCK_K)[None, :], [BLOCK_T, BLOCK_K])
    ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    absent = 0.0 if SCORING == "softmax" or SCORING == "sigmoid" else lowest
    weights = tl.full([BLOCK_T, BLOCK_K], absent, tl.float32)
    for k in tl.static_range(K):
        best, expert = _argmax(key, positions, BLOCK_E)
        chosen = positions == expert[:, None]
        weight = tl.sum(tl.where(chosen, scores, 0.0), 1) if HAS_BIAS else _from_sort_key(best)
        ids = tl.where(slots == k, expert[:, None], ids)
        weights = tl.where(slots == k, weight[:, None], weights)
        key = tl.where(chosen, no_key, key)
    if SCORING == "sigmoid_of_chosen":
        weights = tl.sigmoid(weights)
    if SCORING == "softmax_of_chosen":
        weights = tl.exp(weights - tl.max(weights, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
    elif RENORMALIZE:
        weights = weights / tl.maximum(tl.sum(weights, 1)[:, None] + epsilon, min_sum)
    weights = weights * scaling
    m_slots = m_tokens[:, None] & (slots < K)
    p_slots = tokens[:, None] * K + slots
    tl.store(weights_ptr + p_slots, weights, mask=m_slots)
    tl.store(ids_ptr + p_slots, ids, mask=m_slots)


def topk(
    logits: Tensor,
    k: int,
    *,
    scoring: str,
    renormalize: bool = False,
    bias: Tensor | None = None,
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    epsilon: float = 0.0,
    min_sum: float = 0.0,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return weights [T, K] fp32 and ids [T, K] int32 of logits [T, E].

    Logits have any float dtype and strides. `scoring` is "softmax" or "sigmoid"; with the
    suffix "_of_chosen", of the k largest logits alone. bias [E] of any float dtype, correction_bias
    [E] fp32. Arguments as in `moezoo.layers.moe.routing`, which checks them.
    """
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_tokens, k, dtype=torch.int32, device=logits.device)
    if num_tokens == 0:
        return weights, ids
    # A warp a token.
    block_t = min(4, next_power_of_2(num_tokens))
    if correction_bias is not None:
        correction_bias = correction_bias.float().contiguous()
    _topk_kernel[(cdiv(num_tokens, block_t),)](
        logits,
        None if bias is None else bias.contiguous(),
        correction_bias,
        weights,
        ids,
        num_tokens,
        num_experts,
        *logits.stride(),
        epsilon,
        min_sum,
        scaling,
        SCORING=scoring,
        RENORMALIZE=renormalize,
        HAS_LOGITS_BIAS=bias is not None,
        HAS_BIAS=correction_bias is not None,
        NUM_GROUPS=num_groups,
        TOPK_GROUPS=topk_groups,
        GROUP_SIZE=num_experts // num_groups,
        K=k,
        BLOCK_T=block_t,
        BLOCK_E=next_power_of_2(num_experts),
        BLOCK_K=next_power_of_2(k),
        BLOCK_G=next_power_of_2(num_groups),
        num_warps=block_t,
        **launch_options(logits.device),
    )
    return weights, ids
