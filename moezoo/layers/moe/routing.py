"""Routers: which experts a token goes to, and how much each of them counts.

One pure function per published router, from the logits [T, E] of the gate to

    topk_weights [T, K] fp32, what each chosen expert's output is multiplied with
    topk_ids     [T, K] int32, the chosen experts, best first

Scores are computed in fp32 and weights stay fp32 until the combine, also for the architectures
(Qwen, OLMoE) whose published code rounds them to the model's dtype in between.

Equal scores go to the lower id. NaN counts as the largest score, so a row with NaN or Inf keeps its
ids in range, and no row looks at another one. On CUDA a Triton kernel does the same in one launch;
the torch code here is its reference.

Legend: T tokens, E experts, K experts per token.
"""

from typing import Literal

import torch
from torch import Tensor

from moezoo.device import runs_kernels

Scoring = Literal["softmax", "sigmoid"]


def softmax_topk(
    logits: Tensor, k: int, *, renormalize: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest of softmax(logits + bias), divided by their sum if `renormalize`.

    logits [T, E] and bias [E] of any float dtype
    -> topk_weights [T, K] fp32, topk_ids [T, K] int32.
    The router of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and, without groups, of DeepSeek-V2; with a
    bias that of gpt-oss.
    """
    _require_k(k, logits.shape[-1])
    if logits.ndim == 2 and runs_kernels(logits, bias):
        from moezoo.layers.kernels.topk import topk

        with torch.cuda.device_of(logits):
            scoring = "softmax_of_chosen" if renormalize else "softmax"
            return topk(logits, k, scoring=scoring, bias=bias)
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
    """The k best experts of the `topk_groups` best out of `num_groups` groups of neighbours.

    logits [T, E] of any float dtype, correction_bias [E] or None
    -> topk_weights [T, K] fp32, topk_ids [T, K] int32.

    Without a correction bias (DeepSeek-V2) a group is worth its best score, and the experts outside
    the chosen groups score 0. With one (DeepSeek-V3) the bias is added to the scores for the choice
    alone: a group is worth the sum of its two best biased scores, the experts outside the chosen
    groups score -inf, and the weights are the unbiased scores. `renormalize` divides the weights by
    their sum + `epsilon`; `scaling` multiplies them last.

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
        from moezoo.layers.kernels.topk import topk

        with torch.cuda.device_of(logits):
            return topk(
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
    """The k experts whose scores plus bias are largest; the weights are the scores without it,
    divided by their sum, or by `min_sum` where that is more.

    logits [T, E] of any float dtype, correction_bias [E]
    -> topk_weights [T, K] fp32, topk_ids [T, K] int32.
    The router of MiniMax-M2 (sigmoid) and ERNIE 4.5 (softmax).
    """
    _require_k(k, logits.shape[-1])
    if logits.ndim == 2 and runs_kernels(logits):
        from moezoo.layers.kernels.topk import topk

        with torch.cuda.device_of(logits):
            return topk(
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
    """The sigmoids of the k largest logits, divided by their sum if `renormalize`.

    logits [T, E] of any float dtype -> topk_weights [T, K] fp32, topk_ids [T, K] int32.
    The router of Llama 4 and, where its config asks for it, of Command A+. Unlike sigmoids the
    logits differ still where they are large.
    """
    _require_k(k, logits.shape[-1])
    if logits.ndim == 2 and runs_kernels(logits):
        from moezoo.layers.kernels.topk import topk

        with torch.cuda.device_of(logits):
            return topk(logits, k, scoring="sigmoid_of_chosen", renormalize=renormalize)
    chosen, ids = _largest(logits.float(), k)
    weights = chosen.sigmoid()
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.int()


def sparsemixer(logits: Tensor, k: int, *, jitter: float) -> tuple[Tensor, Tensor]:
    """The best expert, then the best of the others, k times (Phi-3.5-MoE; Liu et al., 2024).

    logits [T, E] of any float dtype -> topk_weights [T, K] fp32, topk_ids [T, K] int32.

    Each weighs what a softmax gives it over those that lie close, the better ones left out: those
    less than 2 * `jitter` below, as a share of the best or of their own size. The weights are not
    renormalised.
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


def _scores(logits: Tensor, scoring: Scoring) -> Tensor:
    """Of all experts, in fp32."""
    if scoring == "softmax":
        return logits.softmax(-1, dtype=torch.float32)
    return logits.float().sigmoid()


def _require_k(k: int, num_experts: int) -> None:
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must be in 1..{num_experts}, the number of experts, got {k}")


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last dimension and their positions; ties to the lower one.

    `torch.topk` leaves open which of equal scores it takes; a stable sort does not.
    """
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], ids[..., :k]


def _best(scores: Tensor, k: int) -> Tensor:
    """The positions alone."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]


def _keep_groups(grouped: Tensor, group_scores: Tensor, topk_groups: int, *, fill: float) -> Tensor:
    """Scores [T, G, E / G] -> [T, E] with `fill` outside the `topk_groups` best groups by
    group_scores [T, G]."""
    dropped = torch.ones_like(group_scores, dtype=torch.bool)
    dropped = dropped.scatter(-1, _best(group_scores, topk_groups), False)
    return grouped.masked_fill(dropped.unsqueeze(-1), fill).flatten(-2)
