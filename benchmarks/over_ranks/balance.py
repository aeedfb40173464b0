"""Section eplb: steps under Zipf's routing without EPLB, from a static placement, and with experts
that move while the model runs.

"decode": steps of ROWS rows in CUDA graphs, as generation takes them; "prompts": forward passes of
PROMPT tokens without a graph, each waited for. Steps are told apart by what happened at their end:
nothing, a piece of experts was sent, or layers were switched to another map.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moezoo.causal_lm import MoECausalLM
from moezoo.device import HostCopies
from moezoo.layers.moe import FusedMoE
from moezoo.parallel.eplb import balancedness, rebalance_experts
from moezoo.parallel.placement import Placement
from over_ranks.job import Job, Row
from over_ranks.shapes import qwen3
from over_ranks.steps import Steps

LAYERS = {"decode": 48, "prompts": 8}
ROWS, CONTEXT = 64, 512
PROMPT = 512
INTERVAL = {"decode": 800, "prompts": 150}
"""Interval of rebalances in steps: long enough for all experts of all layers to travel in pieces
that are a small share of a step; the default is 3000."""
FIXED_STEPS = 150
"""Steps that are measured where nothing moves."""
REDUNDANT = 16
RUNS = (
    *(("decode", "off"), ("decode", "dynamic"), ("prompts", "off"), ("prompts", "dynamic")),
    *(("decode", "static"), ("decode", "dynamic, least movement")),
    *(("prompts", "static"), ("decode", "dynamic, not async"), ("prompts", "dynamic, not async")),
)
"""Kinds of steps and ways of balancing, the most important first."""


def eplb(job: Job) -> Iterator[Row]:
    for kind, way in RUNS:
        if not job.has(12):
            return
        config = qwen3(LAYERS[kind], small=job.small)
        interval = 12 if job.small else INTERVAL[kind]
        options = options_of(job, way, interval, config)
        model = job.make(config, job.world_size, eplb=options, dispatch="all_to_all")
        for moe in model.decoder.moe_layers.values():
            popular(moe)
        run = decoding if kind == "decode" else computing
        # Layers are uneven until the first rebalance is over, so the second one is measured.
        skipped, measured = (
            (2 * interval, interval)
            if way.startswith("dynamic")
            else (10, 12 if job.small else FIXED_STEPS)
        )
        with torch.inference_mode():
            times, ends = run(job, model, skipped + measured)
        balanced = balance(job, model)
        del model, moe
        job.release()
        yield {
            "steps": kind,
            "eplb": way,
            "ranks": job.world_size,
            "layers": config.num_hidden_layers,
            "tokens_of_a_rank": ROWS if kind == "decode" else PROMPT,
            "balancedness": balanced,
            **told_apart(times[skipped:], ends[skipped:]),
        }


def options_of(job: Job, way: str, interval: int, config: PreTrainedConfig) -> Any:
    """Return the value of the option `eplb`."""
    if way == "off":
        return None
    if way == "static":
        file = static_placement(job, config.num_experts, config.num_hidden_layers)
        return {"placement": str(file), "step_interval": 10**9}
    dynamic: dict[str, Any] = {
        "num_redundant_experts": REDUNDANT,
        "window_size": interval // 4,
        "step_interval": interval,
    }
    return (
        dynamic
        | {
            "dynamic": {},
            "dynamic, least movement": {"policy": "least_movement"},
            "dynamic, not async": {"use_async": False},
        }[way]
    )


def static_placement(job: Job, num_experts: int, layers: int) -> Path:
    loads = (1 / torch.arange(1, num_experts + 1).double()).expand(layers, -1)
    slots, _, _ = rebalance_experts(loads, num_experts + REDUNDANT, 1, 1, job.world_size)
    placement = Placement(num_experts, job.world_size, tuple(range(layers)), slots)
    return job.placement_file("static", placement)


def popular(moe: FusedMoE) -> None:
    """Make the layer's choices follow Zipf's law from now on, the first experts most popular."""
    bias = -torch.log(torch.arange(1, moe.num_experts + 1, device=moe.gate.device)).float()
    route = moe.route
    moe.route = lambda logits: route(logits / logits.std().clamp(min=1e-6) * 0.5 + bias)


class Ends:
    """Record of what a balancer did at the end of each step."""

    def __init__(self, model: MoECausalLM) -> None:
        self.kinds: list[str] = []
        self._now = "nothing"
        transfer = getattr(model.decoder.balancer, "_transfer", None)
        if transfer is not None:
            for name, kind in (("post", "piece"), ("commit_", "switch")):
                setattr(transfer, name, partial(self._noted, kind, getattr(transfer, name)))

    def _noted(self, kind: str, run: Any, *args: Any) -> Any:
        self._now = kind
        return run(*args)

    def step(self) -> None:
        self.kinds.append(self._now)
        self._now = "nothing"


def decoding(job: Job, model: MoECausalLM, number: int) -> tuple[Tensor, list[str]]:
    """Return the seconds of each step, [number], from end to end on the GPU's clock."""
    rows = 4 if job.small else ROWS
    steps = Steps(job, model, rows=rows, context=CONTEXT)
    steps.begin(rows, alike=False)
    steps.step()  # captures it
    ends = Ends(model)
    job.together()
    marks = [job.mark()]
    seen = HostCopies(steps.engine.ids)
    for _ in range(number):
        steps.step()
        marks.append(job.mark())
        seen.wait()
        seen = HostCopies(steps.engine.ids)
        ends.step()
    return job.between(marks), ends.kinds


def computing(job: Job, model: MoECausalLM, number: int) -> tuple[Tensor, list[str]]:
    """Return the seconds of each forward pass, by the host's clock."""
    generator = torch.Generator(job.device).manual_seed(job.rank)
    shape = 1, 16 if job.small else PROMPT
    ids = torch.randint(model.config.vocab_size, shape, device=job.device, generator=generator)
    ends = Ends(model)
    times = []
    for _ in range(number):
        job.together()
        begin = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
        job.synchronize()
        times.append(time.perf_counter() - begin)
        ends.step()
    return job.slowest(torch.tensor(times, dtype=torch.float64)), ends.kinds


def told_apart(times: Tensor, ends: list[str]) -> Row:
    """Group the times [n] of steps on the slowest rank by what happened at their end."""
    found: Row = {
        "mean_seconds": times.mean().item(),
        "slowest_seconds": times.max().item(),
        "seconds": {},
        "number": {},
    }
    for kind in ("nothing", "piece", "switch"):
        own = times[torch.tensor([end == kind for end in ends])]
        found["number"][kind] = len(own)
        if len(own):
            found["seconds"][kind] = own.median().item()
    own = dict(found["seconds"])
    plain = own.pop("nothing", None)
    found["cost"] = {} if plain is None else {kind: own[kind] / plain - 1 for kind in own}
    return found


def balance(job: Job, model: MoECausalLM) -> float:
    """Return the balancedness of the last steps."""
    load = model.decoder.balancer.state.rank_load()  # type: ignore[union-attr]
    assert model.mesh is not None
    return float(balancedness(model.mesh.all_reduce(load, "summing loads").wait()))
