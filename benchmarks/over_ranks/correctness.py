"""Sections correctness and generation: results of several ranks compared with those of one GPU.

Logits: of each model, number of ranks, placement and format, by every way in which tokens travel,
over the logits of one GPU with the same format. Placements go through the formats in turn, so that
all models together have every pair. With tokens of their own ranks have one token less each.

Generation: greedy tokens in fp32 while experts move, beside the same ranks' where none does.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoTokenizer

import moezoo
from moezoo.causal_lm import MoECausalLM
from moezoo.layers.quant import BlockFp8
from moezoo.loaders.checkpoint import open_checkpoint
from moezoo.loaders.config import transformers_config
from moezoo.parallel.dispatch import AllToAll
from moezoo.parallel.placement import Placement
from over_ranks.job import Job, Row
from over_ranks.shapes import qwen3

FORMATS = (None, "fp8_w8a8", "int8_w8a16", "int4_w4a16", "mxfp4")
PLACEMENTS = ("linear", "round_robin", "list", "file with copies")
TOLERANCE = 0.05
"""Largest allowed relative difference of bf16 logits: near ties in routers go either way."""
TEXT = "Once upon a time there was a little girl who lived in a house near the woods. " * 4
PROMPTS = (
    "Once upon a time there was a little girl who",
    "The dog ran to the",
    "Tom and his mother went",
    "One day it began to rain, and",
    "There was a big red ball in",
)
WAYS: dict[str, dict[str, Any]] = {
    "all_gather": {"dispatch": "all_gather"},
    "all_gather, 2 chunks": {"dispatch": "all_gather", "chunks": 2},
    "all_to_all": {"dispatch": "all_to_all"},
    "all_to_all, counted": {"dispatch": "all_to_all"},
    "all_to_all, counted, 2 chunks": {"dispatch": "all_to_all", "chunks": 2},
    "all_to_all, 2 chunks": {"dispatch": "all_to_all", "chunks": 2},
    "all_to_all, capacity": {"dispatch": "all_to_all", "capacity": 512},
    "all_to_all, fp8 wire": {"dispatch": "all_to_all", "wire": "fp8"},
}
Load = Callable[..., MoECausalLM]


def correctness(job: Job, models: list[Path]) -> Iterator[Row]:
    subjects: dict[str, tuple[Load, Tensor]] = {}
    for folder in models:
        ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
        subjects[folder.name] = partial(loaded, job, folder), ids
    config = qwen3(2, small=job.small)
    ids = torch.randint(config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(0))
    subjects["qwen3-30b-a3b, 2 layers"] = partial(job.make, config), ids
    for number, (name, (load, ids)) in enumerate(subjects.items()):
        with job.until(job.left / (len(subjects) - number)):
            yield from of_model(job, name, load, ids.to(job.device), number)


def loaded(
    job: Job, folder: Path, size: int = 0, *, eplb: Any = None, **options: Any
) -> MoECausalLM:
    load = {"dtype": torch.bfloat16, "quantization": None} | {
        name: options.pop(name) for name in ("dtype", "quantization") if name in options
    }
    parallel = job.parallel(size, **options) if size else None
    return moezoo.from_pretrained(
        folder, device=job.device, parallel=parallel, eplb=eplb, progress=False, **load
    )


def of_model(job: Job, name: str, load: Load, ids: Tensor, number: int) -> Iterator[Row]:
    whole: dict[str | None, Tensor] = {}
    for size in reversed(job.sizes):
        for quantization, placement in pairs(size, number):
            if not job.has(3):
                return
            if quantization not in whole:
                whole[quantization] = logits(load(quantization=quantization), ids)
            options = {"quantization": quantization, "dispatch": "all_gather"}
            model = load(size, placement=placed(job, load, placement, size), **options)
            yield {
                "model": name,
                "ranks": size,
                "format": quantization or "bf16",
                "placement": placement,
                "difference": dict(differences(job, model, ids, whole[quantization])),
            }
            del model
            job.release()


def pairs(size: int, number: int) -> list[tuple[str | None, str]]:
    """Return the formats and placements for the n-th model."""
    if size == 1:
        return [(None, "linear")]
    return [
        (quantization, PLACEMENTS[(number + i) % len(PLACEMENTS)])
        for i, quantization in enumerate(FORMATS)
    ]


def placed(job: Job, load: Load, placement: str, size: int) -> Any:
    """Return the argument of `Parallel` for this placement."""
    if placement in ("linear", "round_robin"):
        return placement
    num_experts, layers = shape(load)
    if placement == "list":
        backwards = list(range(num_experts))[::-1]
        # The first rank has one expert less, and the last one more.
        bounds = [num_experts * r // size - (0 < r < size) for r in range(size + 1)]
        return [backwards[a:b] for a, b in itertools.pairwise(bounds)]
    slots = torch.arange(num_experts + 2 * size) * 3 % num_experts
    slots[:num_experts] = torch.arange(num_experts)
    maps = torch.stack([slots.roll(layer) for layer in range(len(layers))])
    return job.placement_file("copies", Placement(num_experts, size, layers, maps))


def shape(load: Load) -> tuple[int, tuple[int, ...]]:
    """Return the number of experts, and the layers that have them."""
    if load.func is loaded:
        folder = load.args[1]
        report = moezoo.inspect(folder)
        config = transformers_config(open_checkpoint(folder))
        assert report.experts is not None
    else:
        config = load.args[0]
    with torch.device("meta"):
        decoder = moezoo.registry.build(config)
    layers = decoder.moe_layers
    return next(iter(layers.values())).num_experts, tuple(layers)


def differences(
    job: Job, model: MoECausalLM, ids: Tensor, expected: Tensor
) -> Iterator[tuple[str, float]]:
    for way, options in WAYS.items():
        if options.get("wire") == "fp8" and not in_block_fp8(model):
            continue
        job.redispatch(model, **{"capacity": None, "chunks": 1, "wire": "model"} | options)
        fewer = job.rank if options["dispatch"] == "all_to_all" else 0
        own = ids[:, : ids.shape[1] - fewer]
        with counting(model) if "counted" in way else nullcontext():
            actual = logits(model, own)
        yield way, job.difference(actual, expected[:, : own.shape[1]])
        if model.decoder.dispatcher is None:
            return


def in_block_fp8(model: MoECausalLM) -> bool:
    return all(moe.quantized is BlockFp8 for moe in model.decoder.moe_layers.values())


def counting(model: MoECausalLM) -> AbstractContextManager[object]:
    """Make ranks count in each layer how many tokens travel, even few, within the block."""
    if not isinstance(model.decoder.dispatcher, AllToAll):
        return nullcontext()
    return patch.object(model.decoder.dispatcher, "capacity_for", lambda k: None)


@torch.inference_mode()
def logits(model: MoECausalLM, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits.float()


def generation(job: Job, models: list[Path]) -> Iterator[Row]:
    for size in (n for n in reversed(job.sizes) if n > 1):
        for folder in models:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            for dispatch in ("all_to_all", "all_gather"):
                if not job.has(5):
                    return
                options = {"dtype": torch.float32, "dispatch": dispatch}
                eplb = {"num_redundant_experts": size, "window_size": 8, "step_interval": 8}
                still = texts(job, loaded(job, folder, size, **options), tokenizer)
                model = loaded(job, folder, size, eplb=eplb, **options)
                switches = counted_switches(model)
                moved = texts(job, model, tokenizer)
                one = texts(job, loaded(job, folder, dtype=torch.float32), tokenizer, dispatch)
                yield {
                    "model": folder.name,
                    "ranks": size,
                    "dispatch": dispatch,
                    "switches": len(switches),
                    "equal": share(job, moved, still),
                    "equal_to_one_gpu": share(job, moved, one),
                }


def texts(
    job: Job, model: MoECausalLM, tokenizer: Any, dispatch: str | None = None
) -> Mapping[str, list[int]]:
    """Return the tokens of `model.generate` and `moezoo.generate`.

    Ranks that have tokens of their own take prompts of their own.
    """
    new_tokens = 12 if job.small else 160
    if dispatch is None:
        assert model.mesh is not None
        dispatch = model.mesh.parallel.dispatch
    first = job.rank if dispatch == "all_to_all" else 0
    model.generation_config.eos_token_id = None
    prompts = [PROMPTS[(first + i) % len(PROMPTS)] for i in range(3)]
    found = {}
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids.to(job.device)
    asked = {"max_new_tokens": new_tokens, "do_sample": False}
    found["model.generate"] = model.generate(ids, pad_token_id=0, **asked)[0].tolist()
    for completion in moezoo.generate(model, tokenizer, prompts, **asked):
        found[f"moezoo.generate {completion.id}"] = list(completion.token_ids)
    return found


def share(job: Job, actual: Mapping[str, list[int]], expected: Mapping[str, list[int]]) -> float:
    """Return the share of all ranks' texts that are the same to the last token."""
    assert actual.keys() == expected.keys()
    unequal = sum(actual[name] != tokens for name, tokens in expected.items())
    return 1 - job.largest(unequal / len(expected))


def counted_switches(model: MoECausalLM) -> list[None]:
    """Return a list that grows by one whenever layers switch to another map."""
    transfer = model.decoder.balancer._transfer  # type: ignore[union-attr]
    switches: list[None] = []
    commit_ = transfer.commit_

    def counted(wave: Any) -> None:
        switches.append(None)
        commit_(wave)

    transfer.commit_ = counted
    return switches


def wrong(section: str, row: Row) -> bool:
    if section == "correctness":
        return not max(row["difference"].values()) <= TOLERANCE
    return row["equal"] < 1 or row["switches"] == 0
