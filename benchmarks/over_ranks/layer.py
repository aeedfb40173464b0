"""Section layer: the time of an MoE layer by tokens of a rank.

One GPU and a job of one rank are measured in turn. The ways in which tokens travel share a layer's
weights. Shared experts are left out: each rank has them for itself. Few tokens are also captured,
in a CUDA graph with buffers of their size.

`wire_seconds` are the bytes of the tokens that experts of other ranks need, over the measured rate
of the wire; buffers of one size, which `all_to_all` takes where that pays, carry more.
`travel_seconds` is the layer with experts that do nothing, packing and the host's work included,
`compute_seconds` the experts alone on what arrives; what chunks hide is the sum of the two less
their time.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from moezoo.causal_lm import MoECausalLM
from moezoo.layers.moe import Arrival, FusedMoE
from moezoo.parallel.dispatch import AllToAll
from over_ranks.job import Job, Row
from over_ranks.shapes import deepseek_v3, mixtral, qwen3

TOKENS = (16, 64, 256, 1024, 4096, 16384)
GRAPH_TOKENS = 256
"""Most tokens of a rank for which the layer is captured."""
OVERLAP_TOKENS = 1024
"""Least tokens for which chunks and their parts are measured."""
SMALL = (4, 16)
"""Numbers of tokens on a CPU; chunks are measured from the last on."""
CASES: dict[str, tuple[Callable[..., PreTrainedConfig], str | None]] = {
    "qwen3-30b-a3b": (qwen3, None),
    "deepseek-v3 fp8": (deepseek_v3, "fp8_w8a8"),
    "deepseek-v3": (deepseek_v3, None),
    "mixtral-8x7b": (mixtral, None),
}
WAYS: dict[str, dict[str, Any]] = {
    "all_to_all": {"dispatch": "all_to_all"},
    "all_to_all, counted": {"dispatch": "all_to_all"},
    "all_to_all, 2 chunks": {"dispatch": "all_to_all", "chunks": 2},
    "all_to_all, 4 chunks": {"dispatch": "all_to_all", "chunks": 4},
    "all_to_all, fp8 wire": {"dispatch": "all_to_all", "wire": "fp8"},
    "all_gather": {"dispatch": "all_gather"},
}


def layer(job: Job) -> Iterator[Row]:
    chosen = SMALL if job.small else TOKENS
    wires = {size: job.wire_bytes_per_second(size) for size in job.sizes if size > 1}
    for case in CASES:
        if not job.has(20):
            return
        rows = {n: {"case": case, "tokens": n, "seconds": {}, "ranks": {}} for n in chosen}
        alone(job, case, rows)
        for size in reversed(wires):
            if job.has(15):
                over_ranks(job, case, size, wires[size], rows)
        yield from rows.values()


def model_of(job: Job, case: str, size: int) -> tuple[MoECausalLM, FusedMoE]:
    make, quantization = CASES[case]
    config = make(1, small=job.small)
    config.num_hidden_layers, config.vocab_size = 1, 1024
    model = job.make(config, size, quantization=quantization)
    moe = next(iter(model.decoder.moe_layers.values()))
    moe.shared = None
    return model, moe


def tokens_of(job: Job, moe: FusedMoE, number: int) -> Tensor:
    generator = torch.Generator(job.device).manual_seed(job.rank)
    x = torch.randn(number, moe.gate.shape[1], device=job.device, generator=generator)
    return x.to(moe.gate.dtype)


@torch.inference_mode()
def alone(job: Job, case: str, rows: dict[int, Row]) -> None:
    layers = {name: model_of(job, case, n)[1] for name, n in (("one GPU", 0), ("world size 1", 1))}
    for number, row in rows.items():
        x = tokens_of(job, layers["one GPU"], number)
        runs: dict[str, Callable[[], object]] = {n: partial(m, x) for n, m in layers.items()}
        row["seconds"] |= job.alternately(runs, repeats=5)
        if number <= GRAPH_TOKENS:
            graphs = {f"{name}, graph": job.recorded(run, 20) for name, run in runs.items()}
            taken = job.alternately(graphs, repeats=5, calls=1)
            row["seconds"] |= {name: seconds / 20 for name, seconds in taken.items()}
    del layers
    job.release()


@torch.inference_mode()
def over_ranks(job: Job, case: str, size: int, wire: float, rows: dict[int, Row]) -> None:
    model, moe = model_of(job, case, size)
    in_parts = SMALL[-1] if job.small else OVERLAP_TOKENS
    for number, row in rows.items():
        found: dict[str, Any] = {"seconds": {}}
        row["ranks"][str(size)] = found
        seconds = found["seconds"]
        own = tokens_of(job, moe, number)
        same = job.same(own.clone())
        for way, options in WAYS.items():
            chunks = options.get("chunks", 1)
            if chunks > 1 and number < in_parts:
                continue
            if options.get("wire") == "fp8" and CASES[case][1] is None:
                continue
            job.redispatch(model, **{"chunks": 1, "wire": "model"} | options)
            x = same if options["dispatch"] == "all_gather" else own
            counted = way.endswith("counted")
            with nullcontext() if counted else passing(moe, number):
                seconds[way] = job.median(partial(moe, x))
                if way == "all_to_all" and number >= in_parts:
                    found |= parts(job, moe, x)
            if number <= GRAPH_TOKENS and not counted:
                seconds[f"{way}, graph"] = captured(job, moe, x)
            if way == "all_to_all":
                found["sent_bytes"] = sent = sent_bytes(job, moe, x)
                found["wire_seconds"] = sent / wire
    del model, moe
    job.release()


def passing(moe: FusedMoE, num_tokens: int) -> AbstractContextManager[None]:
    """Run the block as a model's forward pass, in which ranks agree once for all layers."""
    assert moe.dispatcher is not None
    return moe.dispatcher.forward_pass(num_tokens)


def captured(job: Job, moe: FusedMoE, x: Tensor) -> float:
    fixed = moe.dispatcher.fixed(len(x)) if isinstance(moe.dispatcher, AllToAll) else nullcontext()
    with fixed:
        return job.replayed(partial(moe, x))


def parts(job: Job, moe: FusedMoE, x: Tensor) -> dict[str, float]:
    """Return the seconds of travelling without experts, and of experts without travelling."""
    arrived: list[Arrival] = []

    def keep(*arrival: Tensor) -> Tensor:
        arrived[:] = [Arrival(*arrival)]
        return torch.empty_like(arrival[0], memory_format=torch.contiguous_format)

    with patch.object(moe, "experts", keep):
        travel = job.median(partial(moe, x))
    compute = job.median(partial(moe.experts, *arrived[0]))
    return {"travel_seconds": travel, "compute_seconds": compute}


def sent_bytes(job: Job, moe: FusedMoE, x: Tensor) -> int:
    """Return the mean bytes that a rank sends to others for x [T, H], both ways."""
    _, topk_ids = moe.route(moe.router_logits(x))
    assert isinstance(moe.dispatcher, AllToAll)
    mesh = moe.dispatcher.mesh
    ranks = moe.dispatcher.rank_of_slot[topk_ids.long()]
    others = (r for r in range(mesh.ep_size) if r != mesh.ep_rank)
    rows = sum(int((ranks == r).any(1).sum()) for r in others)
    width = 2 * x.element_size() * x.shape[1] + 8 * topk_ids.shape[1]
    total = torch.tensor(rows * width, device=x.device)
    dist.all_reduce(total)
    return int(total) // job.world_size
