"""Models whose experts move between steps, against the same model in one process."""

from itertools import pairwise

import pytest
import torch
from ranks import results
from small_models import MODELS
from tolerances import RELATIVE, relative_difference
from transformers import AutoConfig

import moezoo
from moezoo import Parallel
from moezoo.errors import ExpertMapError
from moezoo.parallel.placement import Placement
from moezoo.parallel.sharding import step_without_tokens

RANKS, STEPS = 3, 14
EXACT = 1e-5
"""fp32, where sums come in another order, over the largest logit."""
FP8 = 2e-2
"""Where they are rounded to other numbers of fp8 for that: which are depends on the CPU."""


def made(device="cpu", **options):
    torch.manual_seed(3)
    config = AutoConfig.for_model("deepseek_v3", **MODELS["deepseek_v3"])
    return moezoo.from_config(config, device=device, **options)


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
    with model.decoder.forward_pass(12):
        for i, moe in enumerate(model.decoder.moe_layers.values()):
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
    state = model.decoder.balancer.state
    maps = state.physical_to_logical_map.unflatten(1, (state.num_ranks, -1))[:, rank]
    layers = zip(model.decoder.moe_layers.values(), whole.decoder.moe_layers.values(), strict=True)
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
            fp8 = FP8 if case[0].get("quantization") == "fp8_w8a8" else EXACT
            assert furthest < (RELATIVE[torch.bfloat16] if "dtype" in case[0] else fp8), case
            assert maps == outcomes[0][1]
            assert same, case
        steps = [a != b for a, b in pairwise(maps)]
        assert any(steps[:-3]), case  # some steps come after a switch


def generating(rank, placement):
    whole = made()
    expected = whole.generate(prompt(1), max_new_tokens=20, do_sample=False)
    parallel = Parallel(2, dispatch="all_gather")
    found = []
    for eplb in ({"enabled": False, "step_interval": 2}, {"step_interval": 4}):
        model = made(parallel=parallel, eplb=eplb | {"placement": placement})
        tokens = model.generate(prompt(1), max_new_tokens=20, do_sample=False)
        assert torch.equal(tokens, expected)
        state = model.decoder.balancer.state
        found.append((state.physical_to_logical_map.tolist(), state.rank_load().sum().item()))
    with pytest.raises(ExpertMapError, match=r"eplb is EPLB.*window_size=3.* on rank 0 and EPLB"):
        made(parallel=parallel, eplb={"window_size": 3 + rank})
    return found


def test_a_placement_file_is_the_start_and_generation_goes_on_while_experts_move(tmp_path):
    maps = torch.tensor([[7, 6, 5, 4, 3, 3, 2, 1, 0, 7], [0, 1, 2, 3, 4, 5, 6, 7, 0, 0]])
    file = str(tmp_path / "placement.json")
    Placement(8, 2, (1, 2), maps).save(file)
    first, second = results(2, generating, file)
    assert first == second
    (still, counted), (moved, _) = first
    assert still == maps.tolist()
    assert moved != maps.tolist()
    # 9 tokens of the prompt and 19 that were generated, each with 2 experts in 2 layers
    assert counted == (9 + 19) * 2 * 2


def test_one_process(tmp_path):
    """Nothing moves between ranks, and without copies there is nothing to do at all."""
    with pytest.raises(ValueError, match=r"for experts that are divided .* give parallel too"):
        made(eplb={"num_redundant_experts": 4})
    with pytest.raises(ValueError, match="eplb has no 'redundant'"):
        made(eplb={"redundant": 4}, parallel=Parallel(1))
    assert results(1, alone) == [[True, False]]


def alone(rank):
    expected = made()(prompt(2)).logits
    found = []
    for eplb in ({"step_interval": 4}, {"step_interval": 4, "num_redundant_experts": 3}):
        model = made(parallel=Parallel(1), eplb=eplb)
        for _ in range(9):
            with torch.no_grad():
                assert relative_difference(model(prompt(2)).logits, expected) < EXACT
        balancer = model.decoder.balancer
        found.append(balancer is None)
    window = balancer.state.expert_load_window.clone()
    with torch.no_grad(), balancer.uncounted():
        model(prompt(3))
    assert torch.equal(balancer.state.expert_load_window, window)
    with torch.no_grad():
        model(prompt(3))
    assert balancer.state.expert_load_window.sum() == window.sum() + 9 * 2 * 2
    return found


def on_a_gpu(rank, quantization):
    """Copies move within the process, under the captured steps of an engine."""
    torch.use_deterministic_algorithms(False)  # here for NaN in fresh buffers on the CPU
    options = {"device": "cuda", "quantization": quantization}
    whole = made(**options)
    eplb = {"num_redundant_experts": 4, "step_interval": 8}
    model = made(parallel=Parallel(1), eplb=eplb, **options)
    first = model.decoder.balancer.state.physical_to_logical_map.tolist()
    asked = {"max_new_tokens": 50, "do_sample": False}
    tokens, expected = (m.generate(prompt(1).cuda(), **asked) for m in (model, whole))
    assert model._engines._engine._graphs  # its steps were replayed
    assert model.decoder.balancer.state.physical_to_logical_map.tolist() != first
    assert same_weights(model, whole, rank)
    return torch.equal(tokens, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "int4_w4a16"])
def test_captured_steps_see_experts_that_moved(quantization):
    assert results(1, on_a_gpu, quantization) == [True]
