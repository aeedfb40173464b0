"""Benchmark of one MoE layer against the limits of this device's memory and matrix units.

Measured from router logits [T, E] fp32 to the combined output [T, H], with random weights and
tokens: on CUDA inside a graph, replayed after pauses (`timing.py` says why), on CPU by the clock.
Every result is compared with fp32 before it is timed.

In a model, a layer reads its weights from memory, not from cache, which the layers before it have
filled. So the launches of a measurement cycle through several sets of logits, which choose
different experts wherever few experts are chosen.

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token.
"""

import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from moezoo.device import device_of, is_out_of_memory
from moezoo.errors import QuantizationError
from moezoo.layers.moe import fused_experts, softmax_topk
from moezoo.layers.quant.fp8 import FOR_EXPERTS, require_fp8
from moezoo.tools.layer_inputs import Inputs, Oracle, WrongResultError
from moezoo.tools.layer_weights import (
    FORMATS,
    LAYERS,
    QuantizedWeights,
    Weights,
    expert_bytes,
    random_weights,
)
from moezoo.tools.timing import Calls, Graph, in_turns, seconds_of

Implementation = Callable[[Tensor, Tensor], Tensor]
"""A layer with its weights: (x [T, H], logits [T, E]) -> [T, H]."""

DEFAULT_LAYERS = {"cuda": tuple(LAYERS), "cpu": ("olmoe-1b-7b",)}
DEFAULT_TOKENS = {"cuda": (1, 4, 16, 64, 256, 1024, 4096, 16384), "cpu": (1, 4, 16, 64)}

FP8_LAYERS = ("qwen3-30b-a3b", "deepseek-v3")
"""Layers of models that are released in block fp8."""
WEIGHT_ONLY_LAYERS = ("qwen3-30b-a3b", "mixtral-8x7b")
"""Layers with few and with many rows per expert, with narrow and with wide experts."""

CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Ceilings:
    """Bandwidth and FLOP/s that this device reaches in the simplest code."""

    read_bytes_per_second: float
    flop_per_second: float

    def floor_us(self, nbytes: int, flop: int) -> float:
        """Return the least microseconds in which `nbytes` can be read and `flop` computed."""
        return 1e6 * max(nbytes / self.read_bytes_per_second, flop / self.flop_per_second)


@dataclass(frozen=True)
class Timing:
    """Statistics of one launch's microseconds, over replays of a graph of `launches`."""

    median_us: float
    min_us: float
    max_us: float
    launches: int
    replays: int
    error: float
    """Largest relative error of a token; see `layer_inputs.TOLERANCE`."""


@dataclass
class Cell:
    """Measurements of one layer at one number of tokens."""

    layer: str
    num_tokens: int
    experts_hit: float
    """Distinct experts per launch, mean over the sets of logits."""
    floor_us: float
    num_sets: int
    bytes_between_repeats: int
    """Bytes of weights read between two launches that may share experts; compare with the cache."""
    timings: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Implementation -> the reason why it has no timing."""

    def floor_share(self, name: str) -> float:
        return self.floor_us / self.timings[name].median_us


@dataclass
class Report:
    device: str
    dtype: str
    routing: str
    ceilings: Ceilings
    versions: dict[str, str]
    quantization: str | None = None
    cells: list[Cell] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Layer -> the reason why it has no cells."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as types that JSON has, with the shapes of its layers."""
        shapes = {name: asdict(LAYERS[name]) for name in {cell.layer: None for cell in self.cells}}
        return {**asdict(self), "layers": shapes}

    def __rich__(self) -> Table:
        table = Table(title=title(self))
        for column in (
            "layer",
            "tokens",
            "experts hit",
            "us",
            "min",
            "max",
            "floor us",
            "of floor",
        ):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for cell in self.cells:
            timing = cell.timings.get("moezoo")
            table.add_row(
                *(cell.layer, f"{cell.num_tokens:,}", f"{cell.experts_hit:.0f}"),
                *(
                    (us(t) for t in (timing.median_us, timing.min_us, timing.max_us))
                    if timing
                    else ()
                ),
                *((us(cell.floor_us), f"{cell.floor_share('moezoo'):.0%}") if timing else ()),
                *(() if timing else (Text(cell.skipped["moezoo"]),)),
            )
        for layer, why in self.skipped.items():
            table.add_row(layer, "", "", Text(why))
        return table


def title(report: Report) -> str:
    ceilings = report.ceilings
    return (
        f"{report.device}, {report.quantization or report.dtype}, {report.routing} routing; "
        f"{ceilings.read_bytes_per_second / 1e9:,.0f} GB/s read, "
        f"{ceilings.flop_per_second / 1e12:.3g} TFLOP/s"
    )


def us(microseconds: float) -> str:
    return f"{microseconds:,.1f}" if microseconds < 100 else f"{microseconds:,.0f}"


def moezoo_layer(weights: Weights | QuantizedWeights, k: int) -> Implementation:
    def run(x: Tensor, logits: Tensor) -> Tensor:
        topk_weights, topk_ids = softmax_topk(logits, k, renormalize=True)
        return fused_experts(x, weights.w13, weights.w2, topk_weights, topk_ids)

    return run


@torch.inference_mode()
def measure(
    runs: Mapping[str, Implementation],
    inputs: Inputs,
    oracle: Oracle,
    *,
    budget_ms: float,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Return the timings of `runs` on `inputs`, and the reasons why others have none.

    Each is timed for about budget_ms. Results are checked before and after timing. The
    implementations take turns, see `in_turns`.
    """
    ready: dict[str, Graph | Calls] = {}
    errors: dict[str, float] = {}
    failures: dict[str, Exception] = {}
    pool = torch.cuda.graph_pool_handle() if inputs.x.is_cuda else None
    for name, run in runs.items():
        try:
            errors[name] = oracle.error(0, run(inputs.x, inputs.logits[0]))
            calls = [partial(run, inputs.x, logits) for logits in inputs.logits]
            ready[name] = Graph(calls, pool) if inputs.x.is_cuda else Calls(calls)
        except Exception as error:  # one must not take the others with it
            failures[name] = error
            if pool is not None:  # a capture that failed may have left it unusable
                pool = torch.cuda.graph_pool_handle()
    samples = in_turns(ready, budget_ms)
    timings: dict[str, Timing] = {}
    for name, timed in ready.items():
        timed.replay()
        try:
            last = oracle.error(len(inputs.logits) - 1, timed.out)
        except WrongResultError as error:
            failures[name] = error
            continue
        times = [1e6 * seconds / timed.launches for seconds in samples[name]]
        timings[name] = Timing(
            median_us=statistics.median(times),
            min_us=min(times),
            max_us=max(times),
            launches=timed.launches,
            replays=len(times),
            error=max(errors[name], last),
        )
    return timings, failures


@torch.inference_mode()
def measure_ceilings(
    device: torch.device, dtype: torch.dtype, quantization: str | None = None
) -> Ceilings:
    """Measure a reduction over memory that no cache holds, and a large square matrix product.

    The product is in fp8 with one scale per matrix if `quantization` multiplies fp8, on CUDA.
    """
    on_gpu = device.type == "cuda"
    data = torch.randn(2**29 if on_gpu else 2**26, device=device)
    read = data.nbytes / _best(data.sum, device)
    del data
    size = 8192 if on_gpu else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    multiply = partial(torch.nn.functional.linear, a, b)
    if multiplies_fp8(quantization) and on_gpu:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        multiply = partial(
            torch._scaled_mm, a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )
    return Ceilings(read, 2 * size**3 / _best(multiply, device))


def _best(run: Callable[[], object], device: torch.device) -> float:
    samples = [seconds_of(run, on_gpu=device.type == "cuda") for _ in range(13)]
    return min(samples[3:])


def new_cell(
    name: str, inputs: Inputs, ceilings: Ceilings, *, quantization: str | None = None
) -> Cell:
    """Return a cell of layer `name` for these inputs, with its floor and no timings yet."""
    layer = LAYERS[name]
    num_tokens, dtype = len(inputs.x), inputs.x.dtype
    nbytes = inputs.experts_hit * expert_bytes(layer, dtype, quantization)
    launches = len(inputs.logits) if inputs.disjoint else 1
    return Cell(
        *(name, num_tokens, inputs.experts_hit),
        ceilings.floor_us(round(nbytes), layer.flop(num_tokens)),
        len(inputs.logits),
        round(launches * nbytes),
    )


def bench(
    layers: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    *,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    device: str | None = None,
    skewed: bool = False,
    budget_ms: float = 50.0,
    progress: Callable[[Cell], None] = lambda cell: None,
) -> Report:
    """Measure moezoo's layer and return the report; `progress` gets each cell when it is done.

    `quantization` is one of `FORMATS`, or None for weights in `dtype`. A layer is skipped whose
    weights do not fit into memory, or whose sizes the format cannot hold. Raises ValueError for a
    layer that is not in `LAYERS`, and for a device that is not there.
    """
    kind = device_of(device)
    names = checked_names(layers or default_layers(kind, quantization))
    report = new_report(dtype=dtype, device=device, skewed=skewed, quantization=quantization)
    for name in names:
        layer = LAYERS[name]
        try:
            weights = random_weights(layer, getattr(torch, dtype), kind, quantization)
        except (RuntimeError, QuantizationError) as error:
            report.skipped[name] = _why_skipped(error)
            continue
        run = moezoo_layer(weights, layer.k)
        for num_tokens in tokens or DEFAULT_TOKENS[kind.type]:
            inputs = Inputs.random(layer, num_tokens, getattr(torch, dtype), kind, skewed=skewed)
            cell = new_cell(name, inputs, report.ceilings, quantization=quantization)
            try:
                oracle = Oracle(weights, layer.k, inputs)
                cell.timings, failures = measure(
                    {"moezoo": run}, inputs, oracle, budget_ms=budget_ms
                )
                if failures:
                    raise failures["moezoo"]
            except (WrongResultError, RuntimeError) as error:
                cell.skipped["moezoo"] = _why_skipped(error)
            report.cells.append(cell)
            progress(cell)
        del weights, run
        if kind.type == "cuda":
            torch.cuda.empty_cache()
    return report


def _why_skipped(error: Exception) -> str:
    """Return the first line of the error, or raise it: of RuntimeErrors only those for want of
    memory are a reason."""
    if isinstance(error, RuntimeError) and not is_out_of_memory(error):
        raise error
    return str(error).split("\n")[0]


def default_layers(device: torch.device, quantization: str | None) -> tuple[str, ...]:
    if quantization is None or device.type != "cuda":
        return DEFAULT_LAYERS[device.type]
    return FP8_LAYERS if multiplies_fp8(quantization) else WEIGHT_ONLY_LAYERS


def multiplies_fp8(quantization: str | None) -> bool:
    return quantization is not None and FORMATS[quantization][0].quantizes_activations


def new_report(
    *, dtype: str, device: str | None, skewed: bool, quantization: str | None = None
) -> Report:
    """Measure the ceilings and return a report without cells.

    Raises ValueError for a quantization that is not in `FORMATS`, and QuantizationError for fp8 on
    a GPU that cannot multiply it.
    """
    kind = device_of(device)
    if quantization is not None and quantization not in FORMATS:
        raise ValueError(f"quantization must be one of {[*FORMATS]} or None, got {quantization!r}")
    if multiplies_fp8(quantization):
        require_fp8(kind, FOR_EXPERTS)
    return Report(
        device_name(kind),
        dtype,
        "skewed (Zipf)" if skewed else "uniform",
        measure_ceilings(kind, getattr(torch, dtype), quantization),
        _versions(),
        quantization,
    )


def checked_names(names: Iterable[str]) -> list[str]:
    """Return the names; raise ValueError if one of them is not in `LAYERS`."""
    names = list(names)
    for name in names:
        if name not in LAYERS:
            raise ValueError(f"there is no layer {name!r}; known are {', '.join(LAYERS)}")
    return names


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    import moezoo

    versions = {"moezoo": moezoo.__version__, "torch": torch.__version__}
    if torch.cuda.is_available():
        import triton

        versions["triton"] = triton.__version__
    return versions
