"""Routers: which experts a token goes to, and with which weights.

There is one pure function per published router, from the gate's logits [T, E] to

    topk_weights [T, K] fp32, by which each chosen expert's output is multiplied
    topk_ids     [T, K] int32, the chosen experts, best first

Scores are computed in fp32 and weights stay fp32 until the combine, also for the architectures
(Qwen, OLMoE) whose published code rounds them to the model's dtype in between.

Equal scores go to the lower id. NaN counts as the largest score, so a row with NaN or Inf keeps its
ids in range, and rows do not depend on each other. On CUDA a Triton kernel does the same in one
launch; the torch code here is its reference.

Legend: T tokens, E experts, K experts per token.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from moezoo.device import runs_kernels

Scoring = Literal["softmax", "sigmoid"]


def softmax_topk(
    logits: Tensor, k: int, *, renormalize: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the k largest of softmax(logits + bias), divided by their sum if `renormalize`.

    logits [T, E] and bias [E] of any float dtype
    -> topk_weights [T, K] fp32, topk_ids [T, K] int32.
    The router of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and, without groups, of DeepSeek-V2; with a
    bias that of gpt-oss.
    """
    _require_k(k, logits.shape[-1])
    if logits.ndim == 2 and runs_kernels(logits, bias):
        scoring = "softmax_of_chosen" if renormalize else "softmax"
        return _in_one_launch(logits, k, scoring=scoring, bias=bias)
    if bias is not None:
        logits = logits.float() + bias.float()
    if renormalize:
        # The softmax over all, divided by its sum over the chosen, is the softmax over the chosen.
        chosen, ids = _largest(logits.float(), k)
        return chosen.softmax(-1), ids.int()
    weights, ids = _largest(logits.softmax(-1, dtype=torch.float32), k)
    return weights, ids.int()


def grouped_topk(
    logits: Tensor,
    k: int,
    *,
    num_groups: int = 1,
    topk_groups: int = 1,
    scoring: Scoring = "softmax",
    correction_bias: Tensor | None = None,
    renormalize: bool,
    epsilon: float = 1e-20,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose the k best experts from the `topk_groups` best of `num_groups` groups of neighbours.

    logits [T, E] of any float dtype, correction_bias [E] or None
    -> topk_weights [T, K] fp32, topk_ids [T, K] int32.

    Without a correction bias (DeepSeek-V2) a group's score is that of its best expert, and experts
    outside the chosen groups score 0. With one (DeepSeek-V3) the bias is added to the scores for
    the choice alone: a group's score is the sum of its two best biased scores, experts outside the
    chosen groups score -inf, and the weights are the unbiased scores. `renormalize` divides the
    weights by their sum + `epsilon`; `scaling` multiplies them last.

    Raises ValueError if the groups do not divide the experts, or k or topk_groups is out of range.
    """
    num_experts = logits.shape[-1]
    _require_k(k, num_experts)
    if num_experts % num_groups or not 1 <= topk_groups <= num_groups:
        raise ValueError(
            f"num_groups must divide the {num_experts} experts and topk_groups be in "
            f"1..num_groups, got num_groups={num_groups}, topk_groups={topk_groups}"
        )
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring must be 'softmax' or 'sigmoid', got {scoring!r}")
    if logits.ndim == 2 and runs_kernels(logits):
        return _in_one_launch(
            logits,
            k,
            scoring=scoring,
            renormalize=renormalize,
            correction_bias=correction_bias,
            num_groups=num_groups,
            topk_groups=topk_groups,
            epsilon=epsilon,
            scaling=scaling,
        )
    scores = _scores(logits, scoring)
    if correction_bias is None:
        if topk_groups < num_groups:
            grouped = scores.unflatten(-1, (num_groups, -1))
            scores = _keep_groups(grouped, grouped.amax(-1), topk_groups, fill=0.0)
        weights, ids = _largest(scores, k)
    else:
        biased = scores + correction_bias
        if topk_groups < num_groups:
            grouped = biased.unflatten(-1, (num_groups, -1))
            group_scores = grouped.topk(min(2, grouped.shape[-1])).values.sum(-1)
            biased = _keep_groups(grouped, group_scores, topk_groups, fill=float("-inf"))
        ids = _best(biased, k)
        weights = scores.gather(-1, ids)

    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + epsilon)
    if scaling != 1.0:
        weights = weights * scaling
    return weights, ids.int()


def biased_topk(
    logits: Tensor,
    k: int,
    *,
    scoring: Scoring,
    correction_bias: Tensor,
    min_sum: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Choose the k experts with the largest sum of score and correction bias; their weights are the
    scores without the bias, divided by their sum, or by `min_sum` where that is more.

    logits [T, E] of any float dtype, correction_bias [E]
    -> topk_weights [T, K] fp32, topk_ids [T, K] int32.
    The router of MiniMax-M2 (sigmoid) and ERNIE 4.5 (softmax).
    """
    _require_k(k, logits.shape[-1])
    if logits.ndim == 2 and runs_kernels(logits):
        return _in_one_launch(
            logits,
            k,
            scoring=scoring,
            renormalize=True,
            correction_bias=correction_bias,
            min_sum=min_sum,
        )
    scores = _scores(logits, scoring)
    ids = _best(scores + correction_bias, k)
    weights = scores.gather(-1, ids)
    return weights / weights.sum(-1, keepdim=True).clamp(min=min_sum), ids.int()


def topk_sigmoid(logits: Tensor, k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Choose the k largest logits; their weights are their sigmoids, divided by their sum if
    `renormalize`.

    logits [T, E] of any float dtype -> topk_weights [T, K] fp32, topk_ids [T, K] int32.
    The router of Llama 4 and, where its config asks for it, of Command A+. Logits are compared, not
    sigmoids, as the sigmoids of large logits are all 1.
    """
    _require_k(k, logits.shape[-1])
    if logits.ndim == 2 and runs_kernels(logits):
        return _in_one_launch(logits, k, scoring="sigmoid_of_chosen", renormalize=renormalize)
    chosen, ids = _largest(logits.float(), k)
    weights = chosen.sigmoid()
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.int()


def sparsemixer(logits: Tensor, k: int, *, jitter: float) -> tuple[Tensor, Tensor]:
    """Choose the best expert, then the best of the others, k times (Phi-3.5-MoE; Liu et al., 2024).

    logits [T, E] of any float dtype -> topk_weights [T, K] fp32, topk_ids [T, K] int32.

    An expert's weight is its softmax over the experts that are not chosen yet and lie close to it:
    less than 2 * `jitter` below, relative to the larger of its logit and their absolute value. The
    weights are not renormalised.
    """
    _require_k(k, logits.shape[-1])
    scores = logits.float()
    left = scores
    weights, ids = [], []
    for _ in range(k):
        best, expert = _largest(left, 1)
        far = (best - scores) / scores.abs().clamp(min=best) > 2 * jitter
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, expert))
        ids.append(expert)
        left = left.scatter(-1, expert, float("-inf"))
    return torch.cat(weights, -1), torch.cat(ids, -1).int()


def _in_one_launch(logits: Tensor, k: int, **settings: Any) -> tuple[Tensor, Tensor]:
    """Route on CUDA by the kernel `topk`, which has these settings."""
    from moezoo.layers.kernels.topk import topk

    with torch.cuda.device_of(logits):
        return topk(logits, k, **settings)


def _scores(logits: Tensor, scoring: Scoring) -> Tensor:
    """Return the scores of all experts [T, E] in fp32."""
    if scoring == "softmax":
        return logits.softmax(-1, dtype=torch.float32)
    return logits.float().sigmoid()


def _require_k(k: int, num_experts: int) -> None:
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must be in 1..{num_experts}, the number of experts, got {k}")


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest scores of the last dimension and their positions, the lower of equals.

    `torch.topk` leaves open which of equal scores it takes; a stable sort does not.
    """
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], ids[..., :k]


def _best(scores: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest scores, the lower one of equals."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]


def _keep_groups(grouped: Tensor, group_scores: Tensor, topk_groups: int, *, fill: float) -> Tensor:
    """Fill scores [T, G, E / G] outside the `topk_groups` groups of the best group_scores [T, G];
    return them as [T, E]."""
    dropped = torch.ones_like(group_scores, dtype=torch.bool)
    dropped = dropped.scatter(-1, _best(group_scores, topk_groups), False)
    return grouped.masked_fill(dropped.unsqueeze(-1), fill).flatten(-2)
