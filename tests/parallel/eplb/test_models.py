"""Models whose experts move between steps, against the same model in one process."""

from itertools import pairwise

import torch
from ranks import results
from small_models import MODELS
from tolerances import RELATIVE, relative_difference
from transformers import AutoConfig

import moezoo
from moezoo import Parallel
from moezoo.parallel.sharding import moe_layers, step_without_tokens

RANKS, STEPS = 3, 14
EXACT = 1e-5
"""fp32, where sums come in another order, over the largest logit."""


def config(**more):
    return AutoConfig.for_model("deepseek_v3", **MODELS["deepseek_v3"] | more)


def made(**options):
    torch.manual_seed(3)
    return moezoo.from_config(config(), device="cpu", **options)


def prompt(number):
    generator = torch.Generator().manual_seed(number)
    # Few tokens of many: their experts are busier than others.
    first = number // 5 * 7 % 50
    return torch.randint(first, first + 4, (1, 9), generator=generator)


def outputs(model, number, *, layers_alone):
    """Logits; or of each MoE layer its output for the same input, where a rounding before the
    router, or before activations are quantised, could make it another token's way."""
    if not layers_alone:
        return [model(prompt(number)).logits]
    model.decoder.balancer and model.decoder.balancer.begin(None)
    found = []
    for i, moe in enumerate(moe_layers(model.decoder).values()):
        generator = torch.Generator().manual_seed(number % 7 + i)
        few = torch.randn(3, moe.gate.shape[1], generator=generator)
        x = few.repeat(4, 1) + 0.1 * torch.randn(12, moe.gate.shape[1], generator=generator)
        found.append(moe(x.to(moe.gate.dtype)))
    model.decoder.end_step()
    return found


@torch.no_grad()
def stepping(rank, cases):
    """Of each case: how far outputs are apart at most, the maps after each step, and whether the
    weights are those of the last."""
    found = []
    for load, eplb, dispatch in cases:
        whole = made(**load)
        model = made(
            **load, parallel=Parallel(expert_parallel_size=RANKS, dispatch=dispatch), eplb=eplb
        )
        state = model.decoder.balancer.state
        furthest, maps = 0.0, [state.physical_to_logical_map.tolist()]
        for number in range(STEPS):
            own = number if dispatch == "all_gather" else number + 100 * rank
            if dispatch == "all_to_all" and (number + rank) % 5 == 4:
                step_without_tokens(model.decoder)
            else:
                mine, right = (outputs(m, own, layers_alone=bool(load)) for m in (model, whole))
                furthest = max(furthest, *map(relative_difference, mine, right))
            maps.append(state.physical_to_logical_map.tolist())
        found.append((furthest, maps, same_weights(model, whole, rank)))
    return found


def same_weights(model, whole, rank):
    """Whether this rank's weights are the whole model's, by the last map."""
    maps = model.decoder.balancer.state.physical_to_logical_map.unflatten(1, (RANKS, -1))[:, rank]
    layers = zip(
        moe_layers(model.decoder).values(), moe_layers(whole.decoder).values(), strict=True
    )
    return all(
        torch.equal(mine.view(torch.uint8), every[maps[i]].view(torch.uint8))
        for i, (moe, all_experts) in enumerate(layers)
        for mine, every in zip(moe.expert_tensors(), all_experts.expert_tensors(), strict=True)
    )


def test_logits_stay_those_of_one_process_while_experts_move():
    eplb = {"num_redundant_experts": 4, "window_size": 4, "step_interval": 4}
    cases = [
        ({}, eplb, "all_to_all"),
        ({}, eplb | {"policy": "least_movement", "use_async": False}, "all_gather"),
        ({"dtype": "bfloat16"}, eplb, "all_gather"),
        ({"quantization": "fp8_w8a8"}, eplb, "all_to_all"),
        ({"quantization": {"type": "int4_w4a16", "symmetric": False}}, eplb, "all_to_all"),
        ({"quantization": "mxfp4"}, eplb | {"use_async": False}, "all_to_all"),
    ]
    ranks = results(RANKS, stepping, cases)
    for case, outcomes in zip(cases, zip(*ranks, strict=True), strict=True):
        for furthest, maps, same in outcomes:
            assert furthest < (RELATIVE[torch.bfloat16] if "dtype" in case[0] else EXACT), case
            assert maps == outcomes[0][1]
            assert same, case
        steps = [a != b for a, b in pairwise(maps)]
        assert any(steps[:-3]), case  # some steps come after a switch
