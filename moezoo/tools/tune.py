"""The search for a layer's tiles on the GPU at hand: what `moezoo tune` runs.

For each number of tokens, the two grouped products of the layer are timed with the tiles that can
be best at that many rows an expert: a few dozen in all, compiled by several processes beforehand.
The plans go into a JSON file that `moezoo.layers.kernels.tiles.plan` finds from then on.
"""

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from moezoo.layers.kernels.down import down
from moezoo.layers.kernels.gated_up import gated_up
from moezoo.layers.kernels.gather import gather
from moezoo.layers.kernels.permute import Permutation, permute
from moezoo.layers.kernels.tiles import Plan, Tile, user_table

TOKENS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
Call = Callable[[], object]

SETS = 4
"""Choices of experts that take turns, so that few rows do not find their weights in L2."""


@dataclass(frozen=True)
class Layer:
    num_experts: int
    k: int
    hidden_size: int
    intermediate_size: int


def gated_up_tiles(rows_per_expert: float) -> Iterator[tuple[Tile, bool]]:
    """Candidates for the first product, and whether they read sorted rows."""
    if rows_per_expert <= 40:
        for m in _few_rows(rows_per_expert):
            first = Tile(m, 64, 128, 4, 3, descriptors=True, weights_first=True)
            yield first, False
            yield replace(first, k=256), False
            yield replace(first, k=64, num_stages=6), False
            yield replace(first, group_m=1), False
    if 16 < rows_per_expert <= 400:
        tile = Tile(64, 128, 64, 4, 4, descriptors=True)
        for tail in (0, 32):
            for group_m in (1, 4, 8):
                yield replace(tile, tail=tail, group_m=group_m), False
        yield replace(tile, num_warps=8), False
        yield Tile(64, 64, 128, 4, 2, descriptors=True, weights_first=True), False
    if rows_per_expert > 24:
        tile = Tile(128, 128, 64, 8, 4, descriptors=True)
        for tail in (0, 32, 64):
            for group_m in (2, 4, 8, 16):
                yield replace(tile, tail=tail, group_m=group_m), False
        if rows_per_expert > 60:
            for group_m in (4, 8, 16):
                yield replace(tile, programs_per_sm=1, group_m=group_m), True
            yield tile, True


def down_tiles(rows_per_expert: float) -> Iterator[Tile]:
    """Candidates for the second product."""
    if rows_per_expert <= 40:
        for m in _few_rows(rows_per_expert):
            first = Tile(m, 64, 128, 4, 4, descriptors=True, weights_first=True)
            yield first
            yield replace(first, num_stages=3)
            yield replace(first, n=128, num_stages=3)
            yield replace(first, k=256, num_stages=3)
            yield replace(first, n=128, k=64, programs_per_sm=2)
    if 16 < rows_per_expert <= 400:
        tile = Tile(64, 128, 64, 4, 4, descriptors=True)
        for tail in (0, 32):
            yield replace(tile, tail=tail)
            yield replace(tile, tail=tail, num_stages=3)
        yield replace(tile, weights_first=True)
        yield replace(tile, programs_per_sm=2)
        yield replace(tile, n=256, programs_per_sm=1)
    if rows_per_expert > 24:
        tile = Tile(128, 256, 64, 8, 4, descriptors=True)
        small = Tile(128, 128, 64, 4, 3, descriptors=True)
        for group_m in (4, 8, 16):
            yield replace(tile, programs_per_sm=1, group_m=group_m)
        yield tile
        yield replace(tile, tail=64)
        yield replace(small, tail=64)
        yield replace(small, tail=32)
        yield replace(small, tail=64, group_m=4)
        yield replace(small, programs_per_sm=2)


def _few_rows(rows_per_expert: float) -> tuple[int, ...]:
    return (16,) if rows_per_expert <= 6 else (16, 32) if rows_per_expert <= 14 else (32, 64)


def tune(
    layer: Layer, *, tokens: tuple[int, ...] = TOKENS, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Time the candidates on the current CUDA device; the entry of the layer for `save`.

    bf16, random weights and choices of experts. Raises torch.OutOfMemoryError where the layer's
    weights do not fit.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    num_experts, hidden, intermediate = (
        layer.num_experts,
        layer.hidden_size,
        layer.intermediate_size,
    )
    compile_candidates(layer, tokens)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16, generator=generator)

    w13 = normal(num_experts, 2, intermediate, hidden).mul_(hidden**-0.5)
    w2 = normal(num_experts, hidden, intermediate).mul_(intermediate**-0.5)
    plans = []
    for num_tokens in tokens:
        rows_per_expert = num_tokens * layer.k / num_experts
        x = normal(num_tokens, hidden)
        h = normal(num_tokens * layer.k, intermediate)
        choices = [
            torch.rand(num_tokens, num_experts, device=device, generator=generator)
            .topk(layer.k, 1)
            .indices.int()
            for _ in range(SETS)
        ]
        best: dict[int, tuple[float, float, Plan]] = {}
        permutations = {
            m: [permute(ids, num_experts, m) for ids in choices] for m in (16, 32, 64, 128)
        }
        positions = permutations[128][0].positions
        x_sorted = gather(x, positions)
        sorting = _microseconds([partial(gather, x, positions)])
        for m, rows in permutations.items():
            first = _best(
                _first_calls(x, w13, rows, layer.k, x_sorted, sorting, rows_per_expert, m)
            )
            second = _best(_second_calls(h, w2, rows, rows_per_expert, m))
            if first is not None and second is not None:
                (us1, (tile1, is_sorted)), (us2, tile2) = first, second
                best[m] = (us1, us2, Plan(tile1, tile2, is_sorted))
        us1, us2, chosen = min(best.values(), key=lambda row: row[0] + row[1])
        report(
            f"{num_tokens} tokens: {us1:.0f} + {us2:.0f} us, "
            f"{_short(chosen.gated_up)}{' sorted' if chosen.sort_rows else ''} "
            f"and {_short(chosen.down)}"
        )
        plans.append(
            {
                "rows_per_expert": rows_per_expert,
                "tokens": num_tokens,
                "microseconds": [round(us1, 1), round(us2, 1)],
                "gated_up": asdict(chosen.gated_up),
                "down": asdict(chosen.down),
                "sort_rows": chosen.sort_rows,
            }
        )
    return {
        "num_experts": num_experts,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "k": layer.k,
        "plans": plans,
    }


def _first_calls(
    x: Tensor,
    w13: Tensor,
    rows: list[Permutation],
    k: int,
    x_sorted: Tensor,
    sorting: float,
    rows_per_expert: float,
    m: int,
) -> Iterator[tuple[Any, list[Call], float]]:
    device = x.device
    for tile, is_sorted in gated_up_tiles(rows_per_expert):
        if tile.m != m or x.shape[1] < tile.k:
            continue
        source = x_sorted if is_sorted else None
        product = partial(gated_up, x, w13, k=k, tile=tile.fitted(2, 2, device), x_sorted=source)
        # Sorted rows belong to the first choice of experts.
        chosen = rows[:1] if is_sorted else rows
        calls: list[Call] = [partial(product, permutation=r) for r in chosen]
        yield (tile, is_sorted), calls, sorting if is_sorted else 0.0


def _second_calls(
    h: Tensor, w2: Tensor, rows: list[Permutation], rows_per_expert: float, m: int
) -> Iterator[tuple[Any, list[Call], float]]:
    for tile in down_tiles(rows_per_expert):
        if tile.m != m or h.shape[1] < tile.k:
            continue
        product = partial(down, h, w2, tile=tile.fitted(1, 2, h.device))
        yield tile, [partial(product, permutation=r) for r in rows], 0.0


def _best(
    candidates: Iterator[tuple[Any, list[Call], float]],
) -> tuple[float, Any] | None:
    timed = [(_microseconds(calls) + extra, choice) for choice, calls, extra in candidates]
    return min(timed, key=lambda row: row[0]) if timed else None


def _microseconds(calls: list[Call], budget: float = 12.0, repeats: int = 5) -> float:
    """Median time of a call, in replays of one CUDA graph; `budget` in milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls[0]()
    torch.cuda.synchronize()
    start.record()
    calls[0]()
    end.record()
    torch.cuda.synchronize()
    once = max(start.elapsed_time(end), 0.005)
    # Long calls push each other's weights out of L2 by themselves.
    number = max(len(calls) if once < 1.0 else 1, min(40, int(budget / repeats / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(number):
            calls[i % len(calls)]()
    graph.replay()
    times = []
    for _ in range(repeats):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / number * 1e3)
    return statistics.median(times)


def compile_candidates(layer: Layer, tokens: tuple[int, ...]) -> None:
    """Compile the candidates into Triton's cache with a process for each core."""
    firsts = {
        candidate
        for num_tokens in tokens
        for candidate in gated_up_tiles(num_tokens * layer.k / layer.num_experts)
    }
    seconds = {
        candidate
        for num_tokens in tokens
        for candidate in down_tiles(num_tokens * layer.k / layer.num_experts)
    }
    jobs: list[tuple[str, Tile, bool]] = [("gated_up", *candidate) for candidate in firsts]
    jobs += [("down", candidate, False) for candidate in seconds]
    sizes = (_small(layer.hidden_size), _small(layer.intermediate_size))
    workers = min(len(jobs), max(1, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, jobs, [sizes] * len(jobs), chunksize=2))


def _small(size: int) -> int:
    """A small size that divides by the same powers of two up to 256: it compiles to the same."""
    return 256 + size % 256


def _compile(job: tuple[str, Tile, bool], sizes: tuple[int, int]) -> None:
    operation, tile, is_sorted = job
    hidden, intermediate = sizes
    x = torch.randn(64, hidden, device="cuda", dtype=torch.bfloat16)
    ids = torch.arange(128, device="cuda", dtype=torch.int32).view(64, 2) % 4
    rows = permute(ids, 4, tile.m)
    if operation == "gated_up":
        w13 = torch.randn(4, 2, intermediate, hidden, device="cuda", dtype=torch.bfloat16)
        fitted = tile.fitted(2, 2, x.device)
        x_sorted = gather(x, rows.positions) if is_sorted else None
        gated_up(x, w13, rows, k=2, tile=fitted, x_sorted=x_sorted)
    else:
        w2 = torch.randn(4, hidden, intermediate, device="cuda", dtype=torch.bfloat16)
        h = torch.randn(128, intermediate, device="cuda", dtype=torch.bfloat16)
        down(h, w2, rows, tile=tile.fitted(1, 2, x.device))
    torch.cuda.synchronize()


def _short(tile: Tile) -> str:
    marks = "".join(
        mark
        for mark, is_set in (
            (" weights first", tile.weights_first),
            (f" tail {tile.tail}", tile.tail > 0),
            (f" persistent {tile.programs_per_sm}", tile.programs_per_sm > 0),
        )
        if is_set
    )
    return f"{tile.m}x{tile.n}x{tile.k}{marks}"


def save(entries: list[dict[str, Any]], path: Path | None = None) -> Path:
    """Add the layers to the table of this GPU (default: the user's); returns the file.

    An entry takes the place of an older one of the same sizes.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    path = path or user_table(device)
    old = json.loads(path.read_text())["layers"] if path.exists() else []

    def sizes(entry: dict[str, Any]) -> tuple[int, ...]:
        return entry["num_experts"], entry["hidden_size"], entry["intermediate_size"]

    new = {sizes(entry) for entry in entries}
    document = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "layers": [entry for entry in old if sizes(entry) not in new] + entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(document, indent=1) + "\n")
    draft.replace(path)
    return path
