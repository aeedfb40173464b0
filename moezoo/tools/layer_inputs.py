"""Inputs of a measured layer, and the reference for its output.

Legend: T tokens, H hidden, E experts, K experts per token.
"""

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.tools.layer_weights import Layer, QuantizedWeights, Weights

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Largest allowed norm of a token's error over the norm of its output.

16 bit: some roundings on the way, each within half a unit in the last place; fp32: the order of
the sums.
"""

QUANTIZED_TOLERANCE = 8e-2
"""TOLERANCE for fp8_w8a8 against fp32 on the dequantised weights: x and h are rounded to 4 bits,
which changes an element by 2.5 % on average and a sum of many as much, x in both factors of h."""

ZIPF_EXPONENT = 1.0
CHECKED_TOKENS = 64
MAX_SETS = 8


class WrongResultError(Exception):
    """Raised where an implementation's result is not the layer's."""


def router_logits(
    num_experts: int, num_tokens: int, *, skewed: bool, generator: torch.Generator
) -> Tensor:
    """Return logits [T, E] fp32: normal, or such that Zipf's law gives the experts' probabilities.

    The latter are log-probabilities plus Gumbel noise, whose k largest are k draws without
    replacement. The popularity ranks are assigned to experts at random.
    """
    shape, device = (num_tokens, num_experts), generator.device
    if not skewed:
        return torch.randn(shape, generator=generator, device=device)
    rank = torch.randperm(num_experts, generator=generator, device=device) + 1
    noise = -torch.empty(shape, device=device).exponential_(generator=generator).log()
    return noise - ZIPF_EXPONENT * rank.float().log()


def _renamed(logits: Tensor, hit: Tensor, names: Tensor) -> Tensor:
    """Return logits with the experts `hit` renumbered as `names`, the others as what is left."""
    every = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    old = torch.cat([hit, every.index_fill(0, hit, False).nonzero().flatten()])
    new = torch.cat([names, every.index_fill(0, names, False).nonzero().flatten()])
    return torch.empty_like(logits).index_copy_(1, new, logits[:, old])


@dataclass(frozen=True)
class Inputs:
    """Tokens of a cell, and the sets of logits that the launches of a measurement cycle through."""

    x: Tensor
    logits: tuple[Tensor, ...]
    experts_hit: float
    disjoint: bool
    """Whether no two sets of logits share an expert."""

    @classmethod
    def random(
        cls,
        layer: Layer,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        skewed: bool,
    ) -> "Inputs":
        generator = torch.Generator(device).manual_seed(num_tokens)
        shape = (num_tokens, layer.hidden_size)
        x = torch.randn(shape, generator=generator, device=device).to(dtype)
        free = torch.randperm(layer.num_experts, generator=generator, device=device)
        sets: list[Tensor] = []
        num_hit: list[int] = []
        while len(sets) < MAX_SETS:
            drawn = router_logits(layer.num_experts, num_tokens, skewed=skewed, generator=generator)
            hit = drawn.topk(layer.k).indices.unique()
            if len(hit) > len(free) and len(sets) >= 2:
                break
            if len(hit) > len(free):  # more than half of the experts in each: nothing to keep apart
                sets, num_hit, free = [*sets, drawn], [*num_hit, len(hit)], free[:0]
                continue
            sets.append(_renamed(drawn, hit, free[: len(hit)]))
            num_hit.append(len(hit))
            free = free[len(hit) :]
        disjoint = sum(num_hit) <= layer.num_experts
        return cls(x, tuple(sets), statistics.mean(num_hit), disjoint)


def reference(weights: Weights | QuantizedWeights, k: int, x: Tensor, logits: Tensor) -> Tensor:
    """Return the layer's output [T, H] in fp32, by plain torch, converting one expert at a time."""
    chosen, ids = logits.float().topk(k)
    topk_weights = chosen.softmax(-1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        w13, w2 = weights.expert(expert)
        gate, up = (x[tokens].float() @ w13.T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ w2.T
        out[tokens] += y * topk_weights[tokens, slots, None]
    return out


class Oracle:
    """Reference in fp32 for a sample of the tokens, for each set of logits."""

    def __init__(self, weights: Weights | QuantizedWeights, k: int, inputs: Inputs) -> None:
        num_tokens = len(inputs.x)
        spread = torch.linspace(0, num_tokens - 1, min(num_tokens, CHECKED_TOKENS))
        self.sample = spread.round().long().to(inputs.x.device)
        self.tolerance = TOLERANCE[inputs.x.dtype]
        if isinstance(weights, QuantizedWeights) and weights.w13.quantizes_activations:
            self.tolerance = QUANTIZED_TOLERANCE
        self.shape, self.dtype = inputs.x.shape, inputs.x.dtype
        self.expected = {
            index: reference(weights, k, inputs.x[self.sample], inputs.logits[index][self.sample])
            for index in sorted({0, len(inputs.logits) - 1})
        }

    def error(self, index: int, out: Tensor) -> float:
        """Return the largest relative error of a token of set `index`.

        Raises WrongResultError where it is above the tolerance.
        """
        if out.shape != self.shape or out.dtype != self.dtype:
            raise WrongResultError(
                f"result is {list(out.shape)} {out.dtype}, not {list(self.shape)} {self.dtype}"
            )
        if not out.isfinite().all():
            raise WrongResultError("result holds NaN or Inf")
        expected = self.expected[index]
        difference = (out[self.sample].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = difference.max().item()
        if not worst <= self.tolerance:
            raise WrongResultError(
                f"result of a token is {worst:.1e} away from fp32, allowed is {self.tolerance:.0e}"
            )
        return worst
