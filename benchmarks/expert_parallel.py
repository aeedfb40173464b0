"""Experts over several GPUs: what they compute, and how long the layer and its messages take.

    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py [--model FOLDER ..]

`pack`: what a rank does with tokens before and after they travel, over the bandwidth of a copy.
`correctness`: logits of trained checkpoints and of a few layers of Qwen3-30B-A3B beside one GPU's,
for every placement, dispatch and quantisation. `layer`: an MoE layer's time by tokens of a rank,
alone, as a job of one rank and over all ranks, with the bytes that a rank sends over what the wire
was measured to carry. `eplb`: steps of a few layers under Zipf's routing without EPLB, from a
static placement, and with it rebalancing in the background.

Writes expert_parallel_<ranks>x_<device>.json from rank 0.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist
from cases import qwen3_30b
from machine import write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3Config, MixtralConfig, PreTrainedConfig

import moezoo
from moezoo import Parallel
from moezoo.causal_lm import MoECausalLM
from moezoo.layers.kernels.row_format import RowFormat
from moezoo.layers.moe import FusedMoE
from moezoo.parallel.dispatch import AllToAll
from moezoo.parallel.pack import (
    destinations,
    pack_order,
    pack_rows,
    sum_answers,
    unpack_rows,
)
from moezoo.parallel.placement import Placement
from moezoo.parallel.sharding import moe_layers

SECTIONS = ("correctness", "pack", "layer", "eplb")
TOKENS = (16, 64, 256, 1024, 4096, 16384)
GRAPH_TOKENS = 256
"""Tokens of a rank up to which the layer is captured, with buffers of that size."""
TOLERANCE = 0.05
"""Relative, of logits in bf16: near ties in routers go either way."""
TEXT = "Once upon a time there was a little girl who lived in a house near the woods. " * 4


def deepseek_v3() -> PreTrainedConfig:
    return DeepseekV3Config(first_k_dense_replace=0)


def mixtral() -> PreTrainedConfig:
    return MixtralConfig()


CASES: dict[str, tuple[Callable[[], PreTrainedConfig], str | None]] = {
    "qwen3-30b-a3b": (qwen3_30b, None),
    "mixtral-8x7b": (mixtral, None),
    "deepseek-v3": (deepseek_v3, None),
    "deepseek-v3 fp8": (deepseek_v3, "fp8_w8a8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--model", nargs="+", type=Path, default=[], help="trained checkpoints")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="of a rank")
    parser.add_argument("--time-budget", type=float, default=400, metavar="SECONDS")
    args = parser.parse_args()
    started = time.perf_counter()
    ranks = int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    result: dict[str, Any] = {"ranks": ranks, "wire_bytes_per_second": wire_bandwidth(device)}

    def left() -> float:
        return args.time_budget - (time.perf_counter() - started)

    for section in args.section:
        if not everyone(left() > 10):
            break
        rows = []
        for row in globals()[section](args, device, left):
            rows.append(row)
            result[section] = rows
            if rank == 0:
                result["seconds"] = time.perf_counter() - started
                path = write_result(f"expert_parallel_{ranks}x", device, result)
        if rank == 0 and rows:
            show(section, rows)
    if rank == 0:
        print(f"written to {path}")
    dist.destroy_process_group()
    if any(not row["right"] for row in result.get("correctness", [])):
        sys.exit(1)


def everyone(condition: bool) -> bool:
    """Whether it holds on rank 0: all go on, or none."""
    flag = torch.tensor([condition], dtype=torch.int32, device="cuda")
    dist.broadcast(flag, 0)
    return bool(flag.item())


def wire_bandwidth(device: torch.device, nbytes: int = 1 << 28) -> float:
    """Bytes a second that a rank sends to the others while it receives as many."""
    ranks = dist.get_world_size()
    rows = torch.randn(ranks, nbytes // 4 // ranks, device=device)
    result = torch.empty_like(rows)
    return nbytes * (ranks - 1) / ranks / median(lambda: dist.all_to_all_single(result, rows))


def median(run: Callable[[], object], repeats: int = 7, calls: int = 4) -> float:
    """Seconds of a call on the slowest rank."""
    run()
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls * 1e-3)
    slowest = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def replayed(run: Callable[[], object], launches: int = 20) -> float:
    """Seconds of one of many launches in a CUDA graph."""
    with torch.inference_mode():
        for _ in range(2):
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                run()
    return median(graph.replay, calls=2) / launches


def correctness(
    args: argparse.Namespace, device: torch.device, left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    subjects: list[tuple[str, Callable[..., MoECausalLM], Tensor]] = []
    for folder in args.model:
        ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
        load = partial(moezoo.from_pretrained, folder, dtype=torch.bfloat16, progress=False)
        subjects.append((folder.name, load, ids.to(device)))
    config = qwen3_30b()
    config.num_hidden_layers = 4
    ids = torch.randint(config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(0))
    make = partial(seeded, config, dtype=torch.bfloat16)
    subjects.append(("qwen3-30b-a3b, 4 layers", make, ids.to(device)))
    for name, make, ids in subjects:
        for quantization in (None, "fp8_w8a8", "int4_w4a16", "mxfp4"):
            options: dict[str, Any] = {"device": device, "quantization": quantization}
            expected = logits(make(**options), ids)
            for dispatch in ("all_to_all", "all_gather"):
                for placement in ("linear", "round_robin"):
                    if not everyone(left() > 10):
                        return
                    parallel = Parallel(
                        dist.get_world_size(), placement=placement, dispatch=dispatch
                    )
                    model = make(**options, parallel=parallel)
                    # With tokens of their own, ranks have one more token less each.
                    fewer = dist.get_rank() if dispatch == "all_to_all" else 0
                    own = ids[:, : ids.shape[1] - fewer]
                    actual = logits(model, own)
                    error = difference(actual, expected[:, : own.shape[1]])
                    yield {
                        "model": name,
                        "quantization": quantization or "bf16",
                        "dispatch": dispatch,
                        "placement": placement,
                        "logit_difference": error,
                        "right": error <= TOLERANCE,
                    }
                    del model
                    torch.cuda.empty_cache()


def seeded(config: PreTrainedConfig, **options: Any) -> MoECausalLM:
    torch.manual_seed(0)
    return moezoo.from_config(config, **options)


@torch.inference_mode()
def logits(model: MoECausalLM, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits.float()


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative, the largest of all ranks."""
    error = (actual - expected).norm() / expected.norm()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return error.item()


def moe_of(
    config: PreTrainedConfig,
    quantization: str | None,
    device: torch.device,
    ranks: int,
    **more: Any,
) -> FusedMoE:
    """One layer, of `ranks` ranks."""
    config.num_hidden_layers, config.vocab_size = 1, 1024
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    parallel = Parallel(ranks, **more) if ranks else None
    model = seeded(config, quantization=quantization, parallel=parallel, **options)
    return next(iter(moe_layers(model.decoder).values()))


def popular(moe: FusedMoE) -> None:
    """From now on the layer's choices follow Zipf's law, the first experts first."""
    bias = -torch.log(torch.arange(1, moe.num_experts + 1, device=moe.gate.device)).float()
    route = moe.route
    moe.route = lambda logits: route(logits / logits.std().clamp(min=1e-6) * 0.5 + bias)


def layer(
    args: argparse.Namespace, device: torch.device, left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Shared experts are left out: each rank has them for itself."""
    ranks = dist.get_world_size()
    wire = wire_bandwidth(device)
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "one GPU": (0, {}),
        "world size 1": (1, {}),
        "all_to_all": (ranks, {"dispatch": "all_to_all"}),
        "all_to_all, counted": (ranks, {"dispatch": "all_to_all"}),
        "all_to_all, 4 chunks": (ranks, {"dispatch": "all_to_all", "chunks": 4}),
        "all_gather": (ranks, {"dispatch": "all_gather"}),
        "all_to_all, fp8 wire": (ranks, {"dispatch": "all_to_all", "wire": "fp8"}),
    }
    for case in args.case:
        make, quantization = CASES[case]
        rows: dict[int, dict[str, Any]] = {}
        for way, (size, options) in ways.items():
            if options.get("wire") == "fp8" and quantization is None:
                continue
            if not everyone(left() > 15):
                break
            moe = moe_of(make(), quantization, device, size, **options)
            moe.shared = None
            generator = torch.Generator(device).manual_seed(dist.get_rank())
            for tokens in args.tokens:
                x = torch.randn(
                    tokens, moe.gate.shape[1], device=device, generator=generator
                ).bfloat16()
                same = options.get("dispatch") == "all_gather"
                if same:
                    dist.broadcast(x, 0)
                row = rows.setdefault(
                    tokens, {"case": case, "tokens_of_a_rank": tokens, "seconds": {}}
                )
                counted = way.endswith("counted")
                with torch.inference_mode():
                    with nullcontext() if counted else passing(moe, tokens):
                        row["seconds"][way] = median(partial(moe, x))
                    if tokens <= GRAPH_TOKENS and options.get("chunks", 1) == 1 and not counted:
                        row["seconds"][f"{way}, graph"] = captured(moe, x)
                    if way == "all_to_all":
                        row["sent_bytes"] = sent = sent_bytes(moe, x)
                        row["wire_seconds"] = sent / wire
                        row["agreement_seconds"] = agreement(moe)
            del moe
            torch.cuda.empty_cache()
        yield from rows.values()


def passing(moe: FusedMoE, num_tokens: int) -> AbstractContextManager[None]:
    """As in a model, where ranks agree once for all layers."""
    return nullcontext() if moe.dispatcher is None else moe.dispatcher.passing(num_tokens)


def agreement(moe: FusedMoE, calls: int = 50) -> float:
    """Seconds in which the hosts agree on a forward pass, once for all its layers."""
    with passing(moe, 1):
        begin = time.perf_counter()
    for _ in range(calls):
        with passing(moe, 1):
            pass
    return (time.perf_counter() - begin) / calls


def passed(moe: FusedMoE, x: Tensor) -> Tensor:
    """As in a forward pass of a model, whose ranks say first how many tokens each has."""
    if moe.dispatcher is None:
        return moe(x)
    with moe.dispatcher.passing(len(x)):
        return moe(x)


def captured(moe: FusedMoE, x: Tensor) -> float:
    if isinstance(moe.dispatcher, AllToAll):
        with moe.dispatcher.fixed(len(x)):
            return replayed(partial(moe, x))
    return replayed(partial(moe, x))


def sent_bytes(moe: FusedMoE, x: Tensor) -> int:
    """What a rank sends to others for x [T, H] in bf16, there and back, on average."""
    _, topk_ids = moe.route(moe.router_logits(x))
    assert isinstance(moe.dispatcher, AllToAll)
    ranks = moe.dispatcher.rank_of_slot[topk_ids.long()]
    own = dist.get_rank()
    rows = sum(int((ranks == r).any(1).sum()) for r in range(dist.get_world_size()) if r != own)
    choices = 8 * topk_ids.shape[1]
    total = torch.tensor(rows * (2 * 2 * x.shape[1] + choices), device=x.device)
    dist.all_reduce(total)
    return int(total) // dist.get_world_size()


PACK_SIZES = ((4096, 2048, 8), (16384, 2048, 8), (4096, 7168, 8), (16384, 7168, 8))
"""Tokens, width of the model, experts a token."""
PACK_RANKS = 8


def pack(
    args: argparse.Namespace, device: torch.device, left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Bytes a second that are read and written, for tokens that go to some of PACK_RANKS ranks."""
    for tokens, hidden_size, k in PACK_SIZES:
        if not everyone(left() > 5):
            return
        slots = torch.rand(tokens, 256, device=device).topk(k).indices.int()
        owners = torch.arange(256, device=device) // (256 // PACK_RANKS)
        there = destinations(slots, owners, PACK_RANKS)
        num_rows = int(there.sum())
        order, places = pack_order(there, there.sum(0), num_rows, k)
        x = torch.randn(tokens, hidden_size, device=device).bfloat16()
        rows = x.index_select(0, order)
        other = torch.empty_like(rows)
        topk_weights = torch.rand(tokens, k, device=device)
        runs: dict[str, tuple[Callable[[], object], int]] = {
            "copy": (partial(other.copy_, rows), 2 * rows.nbytes),
            "gather": (partial(x.index_select, 0, order), x.nbytes + rows.nbytes),
            "sum_answers": (partial(sum_answers, rows, places), x.nbytes + rows.nbytes),
        }
        for name, fp8 in (("", False), (" fp8", True)):
            form = RowFormat(hidden_size, k, x.dtype, fp8)
            packed = pack_rows(form, x, topk_weights, slots, tokens)
            moved = x.nbytes + packed.nbytes
            runs["pack" + name] = (
                partial(pack_rows, form, x, topk_weights, slots, tokens),
                moved,
            )
            runs["unpack" + name] = (partial(unpack_rows, form, packed, 0, 32), moved)
        rates = {name: nbytes / replayed(run) for name, (run, nbytes) in runs.items()}
        of_copy = {name: rate / rates["copy"] for name, rate in rates.items()}
        yield {"tokens": tokens, "hidden_size": hidden_size, "rows": num_rows, **of_copy} | {
            "copy": rates["copy"]
        }


EPLB_LAYERS = 8
EPLB_TOKENS = 512
EPLB_INTERVAL = 150
"""Long enough for all experts of all layers to travel."""


def eplb(
    args: argparse.Namespace, device: torch.device, left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Steps of EPLB_LAYERS layers with EPLB_TOKENS tokens a rank."""
    ranks = dist.get_world_size()
    config = qwen3_30b()
    config.num_hidden_layers = EPLB_LAYERS
    redundant = 16
    static = Path(f"/tmp/moezoo-placement-{os.getppid()}.json")
    loads = 1 / torch.arange(1, config.num_experts + 1).double()
    dynamic = {
        "num_redundant_experts": redundant,
        "window_size": EPLB_INTERVAL,
        "step_interval": EPLB_INTERVAL,
    }
    ways: dict[str, Any] = {
        "off": None,
        "static": {"placement": str(static), "step_interval": 10**9},
        "dynamic": dynamic,
        "dynamic, not async": dynamic | {"use_async": False},
    }
    if dist.get_rank() == 0:
        from moezoo.parallel.eplb import rebalance_experts

        slots, _, _ = rebalance_experts(
            loads.expand(EPLB_LAYERS, -1), config.num_experts + redundant, 1, 1, ranks
        )
        layers = tuple(range(EPLB_LAYERS))
        Placement(config.num_experts, ranks, layers, slots).save(static)
    dist.barrier()
    for way, options in ways.items():
        if not everyone(left() > 15):
            return
        model = seeded(
            config,
            dtype=torch.bfloat16,
            device=device,
            parallel=Parallel(ranks, dispatch="all_to_all"),
            eplb=options,
        )
        layers = list(moe_layers(model.decoder).values())
        for moe in layers:
            popular(moe)
        counts = [count(moe, device) for moe in layers]
        generator = torch.Generator(device).manual_seed(dist.get_rank())
        ids = torch.randint(config.vocab_size, (1, EPLB_TOKENS), device=device, generator=generator)
        times, balances, moving = [], [], []
        for _ in range(3 * EPLB_INTERVAL):
            dist.barrier()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            logits_of_step(model, ids)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            balances.append(balancedness(counts))
            moving.append(bool(model.decoder.balancer._waves))
        slow = torch.tensor(times, device=device)
        dist.all_reduce(slow, dist.ReduceOp.MAX)
        late, moves = slow[EPLB_INTERVAL:], torch.tensor(moving[EPLB_INTERVAL:])
        yield {
            "eplb": way,
            "layers": EPLB_LAYERS,
            "tokens_of_a_rank": EPLB_TOKENS,
            "step_seconds": late[~moves].median().item(),
            "step_seconds_while_experts_travel": late[moves].median().item(),
            "steps_while_experts_travel": int(moves.sum()),
            "mean_step_seconds": late.mean().item(),
            "slowest_step_seconds": late.max().item(),
            "first_steps_seconds": slow[2 : EPLB_INTERVAL // 5].median().item(),
            "balancedness": statistics.mean(balances[EPLB_INTERVAL:]),
        }
        del model, layers, counts
        torch.cuda.empty_cache()


def count(moe: FusedMoE, device: torch.device) -> Tensor:
    """Choices of experts of this rank in the layer so far, counted as they come."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    experts = moe.experts

    def counted(x: Tensor, topk_weights: Tensor, rows: Tensor) -> Tensor:
        total.add_((rows >= 0).sum())
        return experts(x, topk_weights, rows)

    moe.experts = counted  # type: ignore[method-assign]
    return total


def balancedness(counts: list[Tensor]) -> float:
    """Of what was counted since the last time."""
    own = torch.stack(counts)
    for total in counts:
        total.zero_()
    loads = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(loads, own)
    load = torch.stack(loads).double()
    return (load.mean(0).sum() / load.amax(0).sum()).item()


@torch.inference_mode()
def logits_of_step(model: MoECausalLM, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False, logits_to_keep=1).logits


def show(section: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=section)
    if section == "layer":
        flat = []
        for row in rows:
            cells = {way: f"{1e6 * s:,.0f}" for way, s in row["seconds"].items()}
            wire = f"{1e6 * row['wire_seconds']:,.0f}" if "wire_seconds" in row else ""
            flat.append(
                {"case": row["case"], "tokens": row["tokens_of_a_rank"], **cells, "wire": wire}
            )
        rows = flat
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        table.add_column(name)
    for row in rows:
        cells = (row.get(name, "") for name in columns)
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=230).print(table)


if __name__ == "__main__":
    main()
