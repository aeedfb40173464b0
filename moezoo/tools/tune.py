"""The search for a layer's tiles on the GPU at hand: what `moezoo tune` runs.

For each number of tokens, the two grouped products of the layer are timed with the tiles that can
be best at that many rows an expert: a few dozen in all, compiled by several processes beforehand.
The best of each product are then timed together. The plans go into a JSON file that
`moezoo.layers.kernels.tiles.plan` finds from then on.
"""

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from moezoo.device import device_of
from moezoo.errors import MoEZooError, naming
from moezoo.layers.kernels import tiles
from moezoo.layers.kernels.combine import combine
from moezoo.layers.kernels.down import down
from moezoo.layers.kernels.down_fp8 import down_fp8
from moezoo.layers.kernels.down_weight_only import down_weight_only
from moezoo.layers.kernels.gated_up import gated_up
from moezoo.layers.kernels.gated_up_fp8 import gated_up_fp8
from moezoo.layers.kernels.gated_up_weight_only import gated_up_weight_only
from moezoo.layers.kernels.interleave import padded
from moezoo.layers.kernels.overlap import capability
from moezoo.layers.kernels.packed_operand import ways
from moezoo.layers.kernels.permute import Permutation, permute
from moezoo.layers.kernels.tiles import Plan, Sizes, Tile, sizes_of
from moezoo.layers.kernels.weight_only_tiles import fitted_weight_only
from moezoo.layers.quant import Format, Int4, Int8, Mxfp4, WeightOnly
from moezoo.layers.quant.fp8 import BLOCK, BLOCK_FP8, BlockFp8, Fp8Rows, quantize_rows
from moezoo.tools.layer import device_name
from moezoo.tools.layer_weights import Layer, QuantizedWeights, Weights, random_weights
from moezoo.tools.timing import Graph, Key, in_turns
from moezoo.tools.tune_candidates import CANDIDATES, Candidates

TOKENS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
Call = Callable[[], Tensor]
Product = Callable[[Permutation], Tensor]
Candidate = tuple[Tile, list[Call]]
"""A tile, and the calls to time for it."""

SETS = 4
"""Choices of experts that take turns, so that few rows do not find their weights in L2."""

BUDGET_MS = 12.0
"""Of the replays that time a candidate."""

SIZES: dict[str | None, tuple[int, int]] = {
    None: (8, 64),
    BLOCK_FP8: (16, BLOCK),
    Int8.name: (16, 64),
    Int4.name: (128, 128),
    Mxfp4.name: (32, 128),
}
"""For each quantisation, what hidden and intermediate sizes must be multiples of (what the bulk
copy engine reads, or a group of int4), and the least k of the candidates at any number of rows: a
product may not be shorter."""

FINALISTS, CLOSE = 6, 1.1
"""So many tiles of each product, no slower than so many times the fastest, and then so many pairs
of them are tried together."""

MAX_PROCESSES = 12
"""That compile: each holds a CUDA context of some hundred megabytes."""


@contextmanager
def unless_unusable() -> Iterator[None]:
    """Ends the block quietly at a tile that the GPU has no room for or Triton cannot compile."""
    try:
        yield
    except (OutOfResources, CompilationError, PTXASError):
        pass
    except RuntimeError as error:
        # So the compiler's passes end; torch's errors of the device are of this class too.
        if "PassManager::run failed" not in str(error):
            raise


def check(layer: Layer, device: torch.device, quantization: str | None = None) -> None:
    """Raises ValueError where there is nothing to search: candidates read through descriptors."""
    hidden, intermediate = layer.hidden_size, layer.intermediate_size
    by_rule = "such a layer gets its tiles by rule, without a table"
    if torch.version.hip is not None or capability(device) < (9, 0):
        raise ValueError(
            "tune searches among tiles for the bulk copy engine of GPUs of compute capability 9.0 "
            f"and later, and this one is {device_name(device)}; here every layer gets its tiles by "
            "rule, without a table"
        )
    step, smallest = SIZES[quantization]
    if hidden % step or intermediate % step:
        raise ValueError(
            f"tune needs a hidden and an intermediate size that are multiples of {step} for "
            f"{quantization or 'weights of 16 bits'}, got {hidden} and {intermediate}; {by_rule}"
        )
    if min(hidden, intermediate) < smallest:
        raise ValueError(
            f"tune needs a hidden and an intermediate size of at least {smallest}, got "
            f"{hidden} and {intermediate}; {by_rule}"
        )


def tune(
    layer: Layer,
    *,
    tokens: Iterable[int] = TOKENS,
    quantization: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time the candidates on the current CUDA device; the entry of the layer for `save`.

    bf16, or weights in a quantisation of CANDIDATES, int4 in groups of 128; random weights and
    choices of experts. Raises what `check` does, MoEZooError where no candidate runs, and
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
        us, chosen = _fastest(_Case.random(layer, weights, num_tokens, generator=generator))
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


@dataclass(frozen=True)
class _Case:
    """What the two products read at one number of tokens.

    x [T, H] and h [S, I] as they read them, see `_rows_of_x` and `_rows_of_h`; topk_weights [T, K];
    by the m of a tile, the permutations of each choice of experts.
    """

    x: Tensor | Fp8Rows
    h: Tensor | Fp8Rows
    weights: Weights | QuantizedWeights
    topk_weights: Tensor
    permutations: dict[int, list[Permutation]]

    @classmethod
    def random(
        cls,
        layer: Layer,
        weights: Weights | QuantizedWeights,
        num_tokens: int,
        *,
        generator: torch.Generator,
    ) -> "_Case":
        x = _rows_of_x(num_tokens, weights.w13, generator)
        h = _rows_of_h(num_tokens * layer.k, weights.w2, generator)
        device = generator.device
        choices = [
            torch.rand(num_tokens, layer.num_experts, device=device, generator=generator)
            .topk(layer.k, 1)
            .indices.int()
            for _ in range(SETS)
        ]
        permutations = {
            m: [permute(ids, layer.num_experts, m) for ids in choices]
            for m in (16, 32, 64, 128, 256)
        }
        topk_weights = torch.full((num_tokens, layer.k), 1 / layer.k, device=device)
        return cls(x, h, weights, topk_weights, permutations)

    def first(self, tile: Tile) -> Product:
        return _first_product(self.x, self.weights.w13, self.topk_weights.shape[1], tile)

    def second(self, tile: Tile) -> Product:
        return _second_product(self.h, self.weights.w2, tile)

    def firsts(self, m: int) -> Iterator[Candidate]:
        """The first product with each candidate of so many rows, for each choice of experts."""
        tiles, _ = CANDIDATES[self.quantization]
        return self._candidates(m, tiles, self.weights.w13.shape[-1], self.first)

    def seconds(self, m: int) -> Iterator[Candidate]:
        """The same of the second product."""
        _, tiles = CANDIDATES[self.quantization]
        return self._candidates(m, tiles, self.weights.w2.shape[-1], self.second)

    def _candidates(
        self, m: int, tiles: Candidates, length: int, product: Callable[[Tile], Product]
    ) -> Iterator[Candidate]:
        for tile in tiles(self.topk_weights.numel() / self.weights.w2.shape[0]):
            if tile.m == m and tile.k <= length:
                yield tile, [partial(product(tile), rows) for rows in self.permutations[m]]

    def calls(self, plan: Plan) -> list[Call]:
        """Of both products and the sum, one for each choice of experts."""
        first, second = self.first(plan.gated_up), self.second(plan.down)

        def call(rows: Permutation) -> Tensor:
            first(rows)
            return combine(second(rows), self.topk_weights, rows.positions)

        return [partial(call, rows) for rows in self.permutations[plan.gated_up.m]]

    @property
    def quantization(self) -> str | None:
        w13 = self.weights.w13
        return w13.name if isinstance(w13, Format) else None


def _fastest(case: _Case) -> tuple[float, Plan]:
    """The microseconds of both products and the sum after them, and their tiles, of one m.

    The tiles that are close to the fastest of a product are measured again together, in turns: what
    a kernel takes alone is not always what it takes before another one that already waits.
    """
    alone: dict[Plan, float] = {}
    for m in case.permutations:
        firsts, seconds = _alone(case.firsts(m)), _alone(case.seconds(m))
        for first, us1 in _close(firsts).items():
            for second, us2 in _close(seconds).items():
                alone[Plan(first, second)] = us1 + us2
    if not alone:
        raise MoEZooError(
            f"at {len(case.topk_weights)} tokens no candidate runs on this GPU: none of them fits "
            f"it, or none compiles with Triton {triton.__version__}; layers get their tiles by rule"
        )
    times = _together((plan, case.calls(plan)) for plan in _close(alone))
    fastest = min(times, key=times.__getitem__)
    return times[fastest], fastest


def _rows_of_x(num_rows: int, w13: Tensor | Format, generator: torch.Generator) -> Tensor | Fp8Rows:
    """Random rows as the first product reads them: for weights of 4 and 8 bits as wide as
    `interleave` makes them, for block fp8 quantised, otherwise bf16."""
    rows = _random_rows(num_rows, w13, generator)
    return quantize_rows(rows) if isinstance(w13, BlockFp8) else rows


def _rows_of_h(num_rows: int, w2: Tensor | Format, generator: torch.Generator) -> Tensor | Fp8Rows:
    """The same for the second product, which reads scales by column."""
    rows = _random_rows(num_rows, w2, generator)
    if not isinstance(w2, BlockFp8):
        return rows
    data, scales = quantize_rows(rows)
    return Fp8Rows(data, scales.mT.contiguous().mT)


def _random_rows(num_rows: int, w: Tensor | Format, generator: torch.Generator) -> Tensor:
    width = w.shape[-1]
    if isinstance(w, WeightOnly):
        width = padded(width, ways(type(w), width))
    device = generator.device
    return torch.randn(num_rows, width, device=device, dtype=torch.bfloat16, generator=generator)


def _first_product(x: Tensor | Fp8Rows, w13: Tensor | Format, k: int, tile: Tile) -> Product:
    if isinstance(w13, BlockFp8):
        assert isinstance(x, Fp8Rows)
        fitted = tile.fitted(2, 1, w13.device)
        return lambda rows: gated_up_fp8(x, w13, rows, k=k, tile=fitted).data
    assert isinstance(x, Tensor)
    if isinstance(w13, WeightOnly):
        fitted = _fitted_weight_only(tile, 2, w13)
        return lambda rows: gated_up_weight_only(x, w13, rows, k=k, tile=fitted)
    assert isinstance(w13, Tensor)
    fitted = tile.fitted(2, 2, w13.device)
    return lambda rows: gated_up(x, w13, rows, k=k, tile=fitted)


def _second_product(h: Tensor | Fp8Rows, w2: Tensor | Format, tile: Tile) -> Product:
    if isinstance(w2, BlockFp8):
        assert isinstance(h, Fp8Rows)
        fitted = tile.fitted(1, 1, w2.device)
        return lambda rows: down_fp8(h, w2, rows, dtype=torch.bfloat16, tile=fitted)
    assert isinstance(h, Tensor)
    if isinstance(w2, WeightOnly):
        fitted = _fitted_weight_only(tile, 1, w2)
        return lambda rows: down_weight_only(h, w2, rows, tile=fitted)
    assert isinstance(w2, Tensor)
    fitted = tile.fitted(1, 2, w2.device)
    return lambda rows: down(h, w2, rows, tile=fitted)


def _fitted_weight_only(tile: Tile, num_parts: int, w: WeightOnly) -> Tile:
    return fitted_weight_only(tile, num_parts, 8 if isinstance(w, Int8) else 4, 2, w.device)


def _close(times: dict[Key, float]) -> dict[Key, float]:
    """Those that take no longer than CLOSE times the least, the FINALISTS first of them."""
    least = min(times.values(), default=0.0)
    fastest = sorted(times, key=times.__getitem__)[:FINALISTS]
    return {key: times[key] for key in fastest if times[key] <= CLOSE * least}


def _alone(candidates: Iterable[Candidate]) -> dict[Tile, float]:
    """The median microseconds of a call, of the candidates that run."""
    times: dict[Tile, float] = {}
    for tile, calls in candidates:
        with unless_unusable():
            calls[0]()  # compiles, which a capture must not
            times |= _medians({tile: Graph(calls)})
    return times


def _together(pairs: Iterable[tuple[Plan, list[Call]]]) -> dict[Plan, float]:
    """The same of both products, which take turns."""
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
    first_tiles, second_tiles = CANDIDATES[quantization]
    firsts = {tile for number in rows for tile in first_tiles(number)}
    seconds = {tile for number in rows for tile in second_tiles(number)}
    jobs = [("gated_up", tile) for tile in firsts] + [("down", tile) for tile in seconds]
    small = Layer(4, 2, _small(layer.hidden_size), _small(layer.intermediate_size))
    workers = min(len(jobs), MAX_PROCESSES, max(1, (os.cpu_count() or 2) - 1))
    compile_ = partial(_compile, layer=small, quantization=quantization)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_, jobs, chunksize=2))


def _small(size: int) -> int:
    """A small size that divides by the same powers of two up to 256: it compiles to the same."""
    return 256 + size % 256


def _compile(job: tuple[str, Tile], layer: Layer, quantization: str | None) -> None:
    operation, tile = job
    device = torch.device("cuda", torch.cuda.current_device())
    weights = random_weights(layer, torch.bfloat16, device, quantization)
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.arange(128, device=device, dtype=torch.int32).view(64, 2) % 4
    rows = permute(ids, 4, tile.m)
    # The search meets the same error, and goes on without the tile.
    with unless_unusable():
        if operation == "gated_up":
            x = _rows_of_x(64, weights.w13, generator)
            _first_product(x, weights.w13, layer.k, tile)(rows)
        else:
            _second_product(_rows_of_h(128, weights.w2, generator), weights.w2, tile)(rows)
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


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The layers of a table, none where there is no file; raises ValueError if it is malformed."""
    if not path.exists():
        return []
    tiles.read_table(path)
    entries: list[dict[str, Any]] = json.loads(path.read_text())["layers"]
    return entries


def save(entries: Iterable[dict[str, Any]], path: Path) -> Path:
    """Add the layers to the table at `path`, which this process also uses from now on; returns it.

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
    with naming(draft):
        draft.write_text(json.dumps(document, indent=1) + "\n")
    draft.replace(path)
    tiles.reload_tables()
    return path
