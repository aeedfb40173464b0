"""The search for a layer's fastest tiles on this GPU, which `moezoo tune` runs.

For each number of tokens, the two grouped products of the layer are timed with the tiles that can
be fastest at that many rows per expert: a few dozen, compiled by several processes beforehand. The
fastest of each product are then timed together. The plans go into a JSON file that `plan` of
`moezoo.layers.kernels.tiles`, and `plan_weight_only`, find from then on.
"""

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from moezoo.device import device_of
from moezoo.errors import MoEZooError, naming_file
from moezoo.layers.kernels import tiles
from moezoo.layers.kernels.overlap import capability
from moezoo.layers.kernels.permute import permute
from moezoo.layers.kernels.tiles import Plan, Sizes, Tile, sizes_of
from moezoo.tools.layer import device_name
from moezoo.tools.layer_weights import Layer, empty_weights, random_weights
from moezoo.tools.timing import Graph, Key, in_turns
from moezoo.tools.tune_candidates import SEARCHES
from moezoo.tools.tune_case import (
    Call,
    Candidate,
    Case,
    down_product,
    gated_up_product,
    rows_of_h,
    rows_of_x,
)

TOKENS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

BUDGET_MS = 12.0
"""Milliseconds of replays that time one candidate."""

FINALISTS, CLOSE = 6, 1.1
"""Number of tiles of each product, and of pairs of them, that are measured again together; and the
most that they may take, as a multiple of the fastest one's time."""

MAX_PROCESSES = 12
"""Most processes that compile: each holds a CUDA context of some hundred megabytes."""


@contextmanager
def unless_unusable() -> Iterator[None]:
    """Suppress the errors of a tile that the GPU has no room for or Triton cannot compile."""
    try:
        yield
    except (OutOfResources, CompilationError, PTXASError):
        pass
    except RuntimeError as error:
        # So the compiler's passes end; torch's errors of the device are of this class too.
        if "PassManager::run failed" not in str(error):
            raise


def check(layer: Layer, device: torch.device, quantization: str | None = None) -> None:
    """Raise ValueError where no tile can be tried: all candidates read through descriptors."""
    hidden, intermediate = layer.hidden_size, layer.intermediate_size
    by_rule = "such a layer gets its tiles by rule, without a table"
    if torch.version.hip is not None or capability(device) < (9, 0):
        raise ValueError(
            "tune searches among tiles for the bulk copy engine of GPUs of compute capability 9.0 "
            f"and later, and this one is {device_name(device)}; here every layer gets its tiles by "
            "rule, without a table"
        )
    search = SEARCHES[quantization]
    of_it = f"for {quantization or 'weights of 16 bits'}"
    if hidden % search.step or intermediate % search.step:
        raise ValueError(
            f"tune needs a hidden and an intermediate size that are multiples of {search.step} "
            f"{of_it}, got {hidden} and {intermediate}; {by_rule}"
        )
    if min(hidden, intermediate) < search.smallest:
        raise ValueError(
            f"tune needs a hidden and an intermediate size of at least {search.smallest} {of_it}, "
            f"got {hidden} and {intermediate}; {by_rule}"
        )


def tune(
    layer: Layer,
    *,
    tokens: Iterable[int] = TOKENS,
    quantization: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time the candidates on the current CUDA device; return the layer's entry for `save`.

    Weights are bf16, or in a quantisation of SEARCHES (int4 in groups of 128). Weights and choices
    of experts are random. Raises what `check` does, MoEZooError where no candidate runs, and
    torch.OutOfMemoryError where the layer's weights do not fit.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    check(layer, device, quantization)
    tokens = sorted(set(tokens))
    compile_candidates(layer, tokens, quantization)
    generator = torch.Generator(device).manual_seed(0)
    weights = random_weights(layer, torch.bfloat16, device, quantization)
    plans = []
    for num_tokens in tokens:
        us, chosen = _fastest(Case.random(layer, weights, num_tokens, generator=generator))
        report(
            f"{num_tokens} tokens: {us:.0f} us, {_short(chosen.gated_up)} and {_short(chosen.down)}"
        )
        plans.append(
            {
                "rows_per_expert": num_tokens * layer.k / layer.num_experts,
                "tokens": num_tokens,
                "microseconds": round(us, 1),
                "gated_up": asdict(chosen.gated_up),
                "down": asdict(chosen.down),
            }
        )
    return {
        "num_experts": layer.num_experts,
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "k": layer.k,
        **({} if quantization is None else {"quantization": quantization}),
        "plans": plans,
    }


def _fastest(case: Case) -> tuple[float, Plan]:
    """Return the least microseconds of both products and the sum, and their tiles, of one m.

    The tiles that are close to the fastest of a product are measured again together, in turns: what
    a kernel takes alone is not always what it takes before another one that already waits.
    """
    alone: dict[Plan, float] = {}
    for m in case.permutations:
        gated_up = _times_alone(case.gated_up_candidates(m))
        down = _times_alone(case.down_candidates(m))
        for first, us1 in _finalists(gated_up).items():
            for second, us2 in _finalists(down).items():
                alone[Plan(first, second)] = us1 + us2
    if not alone:
        raise MoEZooError(
            f"at {len(case.topk_weights)} tokens no candidate runs on this GPU: none of them fits "
            f"it, or none compiles with Triton {triton.__version__}; layers get their tiles by rule"
        )
    times = _times_in_turns((plan, case.calls(plan)) for plan in _finalists(alone))
    fastest = min(times, key=times.__getitem__)
    return times[fastest], fastest


def _finalists(times: dict[Key, float]) -> dict[Key, float]:
    """Return up to FINALISTS tiles, fastest first, that take at most CLOSE times the least time."""
    least = min(times.values(), default=0.0)
    fastest = sorted(times, key=times.__getitem__)[:FINALISTS]
    return {key: times[key] for key in fastest if times[key] <= CLOSE * least}


def _times_alone(candidates: Iterable[Candidate]) -> dict[Tile, float]:
    """Return the median microseconds of a call, for each candidate that runs."""
    times: dict[Tile, float] = {}
    for tile, calls in candidates:
        with unless_unusable():
            calls[0]()  # compiles, which a capture must not
            times |= _medians({tile: Graph(calls)})
    return times


def _times_in_turns(pairs: Iterable[tuple[Plan, list[Call]]]) -> dict[Plan, float]:
    """Return the median microseconds of both products and the sum, for each pair of tiles."""
    pool = torch.cuda.graph_pool_handle()
    return _medians({plan: Graph(calls, pool) for plan, calls in pairs})


def _medians(graphs: dict[Key, Graph]) -> dict[Key, float]:
    return {
        key: 1e6 * statistics.median(seconds) / graphs[key].launches
        for key, seconds in in_turns(graphs, BUDGET_MS).items()
    }


def compile_candidates(
    layer: Layer, tokens: Iterable[int], quantization: str | None = None
) -> None:
    """Compile the candidates into Triton's cache with several processes."""
    rows = [num_tokens * layer.k / layer.num_experts for num_tokens in tokens]
    search = SEARCHES[quantization]
    firsts, seconds = (
        {tile for number in rows for tile in tiles_of(number) if tile.k <= length}
        for tiles_of, length in (
            (search.gated_up, layer.hidden_size),
            (search.down, layer.intermediate_size),
        )
    )
    jobs = [("gated_up", tile) for tile in firsts] + [("down", tile) for tile in seconds]
    # Sizes and strides are part of what is compiled, the number of experts is not.
    one = replace(layer, num_experts=1, k=1)
    workers = min(len(jobs), MAX_PROCESSES, max(1, (os.cpu_count() or 2) - 1))
    compile_ = partial(_compile, layer=one, quantization=quantization)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_, jobs, chunksize=2))


def _compile(job: tuple[str, Tile], layer: Layer, quantization: str | None) -> None:
    operation, tile = job
    device = torch.device("cuda", torch.cuda.current_device())
    weights = empty_weights(layer, torch.bfloat16, device, quantization)
    generator = torch.Generator(device).manual_seed(0)
    rows = permute(torch.zeros(64, 1, dtype=torch.int32, device=device), 1, tile.m)
    # The second product may not follow the launch that counts its tiles.
    torch.cuda.synchronize()
    # The search meets the same error, and goes on without the tile.
    with unless_unusable():
        if operation == "gated_up":
            gated_up_product(rows_of_x(64, weights.w13, generator), weights.w13, 1, tile)(rows)
        else:
            down_product(rows_of_h(64, weights.w2, generator), weights.w2, tile)(rows)
    torch.cuda.synchronize()


def _short(tile: Tile) -> str:
    marks = "".join(
        mark
        for mark, is_set in (
            (" weights first", tile.weights_first),
            (f" tail {tile.tail}", tile.tail > 0),
            (f" persistent {tile.programs_per_sm}", tile.persistent),
        )
        if is_set
    )
    return f"{tile.m}x{tile.n}x{tile.k}{marks}"


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Return the layers of a table, none without a file; raise ValueError if it is malformed."""
    if not path.exists():
        return []
    tiles.read_table(path)
    entries: list[dict[str, Any]] = json.loads(path.read_text())["layers"]
    return entries


def save(entries: Iterable[dict[str, Any]], path: Path) -> Path:
    """Add layers to the table at `path` and return it; this process uses it from now on.

    A plan takes the place of an older one for the same sizes and rows an expert; others stay.
    Raises ValueError if the old file is malformed.
    """
    merged: dict[Sizes, dict[str, Any]] = {sizes_of(entry): entry for entry in read_entries(path)}
    for entry in entries:
        old = merged.get(sizes_of(entry), {"plans": []})
        plans = {plan["rows_per_expert"]: plan for plan in [*old["plans"], *entry["plans"]]}
        merged[sizes_of(entry)] = {**entry, "plans": [plans[rows] for rows in sorted(plans)]}
    document = {
        "device": device_name(device_of(None)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "layers": list(merged.values()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    with naming_file(draft):
        draft.write_text(json.dumps(document, indent=1) + "\n")
    draft.replace(path)
    tiles.reload_tables()
    return path
