"""The experts of transformers' models on `fused_experts`: `experts_implementation="moezoo"`.

transformers marks modules that hold stacked experts with a decorator, `use_experts_implementation`,
whose options say how the weights lie: transposed, gate and up rows alternating, with biases,
without a gate, with a norm behind each expert. `fused_experts` takes them all as views; no weight
is copied.

How gate and up are combined is a method of the module (`_apply_gate`) that any model may override.
It is recognised by what it computes, not by its name: its values are compared with those of every
`Gating` that can be made with the module's numeric attributes.

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.moe.experts import fused_experts
from moezoo.layers.moe.permute import combine

LARGE = 1e18
"""Numbers from here on are no limits of gates; products of two of them have no place in fp32."""

INSTEAD = "grouped_mm"
"""The implementation of experts that moezoo has no kernel for: transformers' own default."""


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the experts of a decorated module, hidden_states [T, H] -> [T, H].

    top_k_index and top_k_weights are [T, K]; with expert parallelism, ids from E on are experts of
    other ranks. Experts whose activation is none of moezoo's are left to transformers, with a
    warning once for each class.
    """
    # Once known it is read, not asked for: torch 2.11 cannot pass a module to a constant function,
    # so there a module has to run once before it is compiled.
    known = hasattr(experts, "_moezoo_gating")
    if known and not torch.compiler.is_compiling():
        known = experts._moezoo_recognised == _recognised(experts)
    gating = experts._moezoo_gating if known else _gating(experts)
    if gating is None:
        forward = ALL_EXPERTS_FUNCTIONS[INSTEAD]
        return forward(experts, hidden_states, top_k_index, top_k_weights)
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    w13, w2 = getattr(experts, name), experts.down_proj
    if experts.is_transposed:
        w13, w2 = w13.mT, w2.mT
    bias13 = bias2 = None
    if experts.has_bias:
        bias13, bias2 = _parts(experts, getattr(experts, name + "_bias")), experts.down_proj_bias
    settings = {"activation": gating, "bias13": bias13, "bias2": bias2}
    # transformers 5.17 does not say whether experts are spread over ranks.
    if getattr(experts, "_is_expert_parallel", True):
        top_k_index = top_k_index.where(top_k_index < w2.shape[0], -1)
    weights, x = top_k_weights.float(), hidden_states.to(w2.dtype)
    w13 = _parts(experts, w13)
    if not getattr(experts, "has_post_expert_norm", False):
        y = fused_experts(x, w13, w2, weights, top_k_index, **settings)
        return y.to(hidden_states.dtype)
    # The norm comes before the sum over K, so each of a token's K rows is a token here.
    rows = x.repeat_interleave(top_k_index.shape[1], 0)
    ids = top_k_index.reshape(-1, 1)
    y = fused_experts(rows, w13, w2, torch.ones_like(ids, dtype=torch.float32), ids, **settings)
    y = experts.post_expert_norm(y)
    return combine(y.view(*top_k_index.shape, -1), weights).to(hidden_states.dtype)


def _parts(experts: Any, rows: Tensor) -> Tensor:
    """Return w13 [E, G*I, H] or bias13 [E, G*I] as a view that `fused_experts` takes."""
    if not experts.has_gate:
        return rows.unsqueeze(1)
    if experts.is_concatenated:
        return rows
    return rows.unflatten(1, (-1, 2)).transpose(1, 2)


@torch.compiler.assume_constant_result
def _gating(experts: Any) -> Gating | None:
    """Return how these experts combine gate and up, None where moezoo has no kernel for it."""
    try:
        gating = _recognise(experts)
    except Exception:  # of the module's own code, which may not take points in fp32
        gating = None
    experts._moezoo_gating = gating
    # Past Module's own way, by which the function would be a submodule a second time.
    vars(experts)["_moezoo_recognised"] = _recognised(experts)
    if gating is None:
        act = getattr(experts, "act_fn", experts._apply_gate)
        act_name = getattr(act, "__name__", type(act).__name__)
        warnings.warn(
            f'experts_implementation="moezoo" has no kernel for what {type(experts).__name__}'
            f" computes between its two products ({act_name}); it runs as {INSTEAD!r}",
            stacklevel=2,
        )
    return gating


def _recognised(experts: Any) -> tuple[Any, ...]:
    """Return what decides how gate and up are combined, and may be replaced."""
    numbers = (value for value in vars(experts).values() if type(value) in (int, float))
    return getattr(experts, "act_fn", None), *numbers


@torch.no_grad()
def _recognise(experts: Any) -> Gating | None:
    """Find the `Gating` whose values are those of the module's own functions."""
    _, *own = _recognised(experts)
    numbers = {float(number) for number in own if 0 < number < LARGE}
    # Ordinary values, large ones, and what a limit by any of the module's numbers would cut.
    values = [*range(13), 0.1, 0.25, 0.5, 0.75, 1.25, 1.5, 2.5, 3.5, 30, 1e3]
    points = torch.tensor([*values, *(1.5 * n for n in numbers)], dtype=torch.float32)
    points = torch.cat([points, -points]).to(experts.down_proj.device)
    names = dict.fromkeys(function.__name__ for function in ACTIVATIONS.values())
    if not experts.has_gate:
        values = experts.act_fn(points)
        for name in names:
            expected = ACTIVATIONS[name](points)
            if _same(values, expected, 1 + points.abs()):
                return Gating(name)
        return None
    gate, up = torch.cartesian_prod(points, points).unbind(1)
    gate_up = torch.cat([gate, up]) if experts.is_concatenated else torch.stack([gate, up], 1)
    values = experts._apply_gate(gate_up.view(1, -1))[0]
    for limit in (None, *sorted(numbers)):
        for up_offset in (0.0, 1.0):
            for name in names:
                gating = Gating(name, limit, up_offset)
                if _same(values, gating(gate, up), (1 + gate.abs()) * (1 + up.abs())):
                    return gating
    return None


def _same(values: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Whether values are equal within rounding; `scale` is the size of the operands, since
    1 + tanh(x) may cancel."""
    return bool(((values - expected).abs() <= 1e-6 * scale + 1e-5 * expected.abs()).all())
