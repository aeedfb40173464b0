"""The MoE layer beside its peers and its floor, in one run on one GPU.

    python benchmarks/layer.py [--layer qwen3-30b-a3b ...] [--tokens 1 64 ...] [--peers NAME ...]
                               [--quantization int4_w4a16]

`moezoo/tools/layer.py` says how it is measured. A peer that is not installed, or that fails on a
shape, is skipped by name with the reason. Figures that cannot be measured here (vLLM's, DeepGEMM's)
come from peers_h100.json, on a GPU of the same kind, and stand for an implementation only where
this run has no figure of its own.

Results are written after each layer as layer_partial_<GPU>.json, and once a run has gone through
all layers, numbers of tokens and peers, as layer_<GPU>.json instead; with the routing and the dtype
in the name where they are not uniform and bfloat16.

With quantised weights the peer is moezoo on the same weights in bfloat16; in block fp8 vLLM's and
DeepGEMM's figures are those in fp8. transformers' own experts for that format fetch their kernels
from the hub when they run, and are left out.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from compile_ahead import compile_ahead
from machine import result_path, write_result
from peers import PEERS, unfit
from rich.console import Console
from rich.table import Table

from moezoo.errors import QuantizationError
from moezoo.formats import FP8
from moezoo.tools.layer import (
    DEFAULT_TOKENS,
    Cell,
    Implementation,
    Report,
    checked_names,
    default_layers,
    measure,
    moezoo_layer,
    new_cell,
    new_report,
    title,
    us,
)
from moezoo.tools.layer_inputs import Inputs, Oracle
from moezoo.tools.layer_weights import FORMATS, LAYERS, QuantizedWeights, Weights, random_weights

REFERENCES = Path(__file__).parent / "peers_h100.json"
OWN_BF16 = "moezoo_bf16"
PACKAGES = ("transformers", "triton", "triton_kernels")


def references(report: Report) -> dict[str, dict[str, dict[int, float]]]:
    """Return layer -> implementation -> tokens -> microseconds, from earlier runs on such a GPU."""
    kept = json.loads(REFERENCES.read_text())
    if (report.device, report.dtype, report.routing) != (kept["gpu"], kept["dtype"], "uniform"):
        return {}
    if report.quantization not in (None, FP8):
        return {}
    layers = kept["fp8_layers" if report.quantization else "layers"]
    return {
        layer: {
            name: {
                num_tokens: microseconds
                for num_tokens, microseconds in zip(kept["tokens"], row, strict=True)
                if microseconds is not None
            }
            for name, row in rows.items()
        }
        for layer, rows in layers.items()
    }


def best(times: dict[str, float]) -> tuple[str, float] | None:
    """Return the fastest peer and its microseconds."""
    peers = {name: microseconds for name, microseconds in times.items() if name != "moezoo"}
    return min(peers.items(), key=lambda item: item[1]) if peers else None


def compare(cell: Cell, kept: dict[str, dict[str, dict[int, float]]]) -> dict[str, Any]:
    """Return the cell as JSON: times, the best peer of this run, the best with the figures kept."""
    measured = {name: timing.median_us for name, timing in cell.timings.items()}
    earlier = {
        name: row[cell.num_tokens]
        for name, row in kept.get(cell.layer, {}).items()
        if cell.num_tokens in row and name not in measured
    }
    row: dict[str, Any] = {"references_us": earlier}
    ours = measured.get("moezoo")
    for key, times in (("best_peer", measured), ("best_of_all", earlier | measured)):
        found = best(times)
        if found is not None:
            row[key] = {"name": found[0], "us": found[1]}
            if ours is not None:
                row[key]["times_moezoo"] = found[1] / ours
    if ours is not None:
        row["floor_share"] = cell.floor_us / ours
    return row


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def summary(cells: list[Cell], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratio of the peers' time to moezoo's: over all cells, and where it is least."""

    def ratios(key: str) -> dict[str, float]:
        return {
            f"{cell.layer} {cell.num_tokens}": row[key]["times_moezoo"]
            for cell, row in zip(cells, rows, strict=True)
            if "times_moezoo" in row.get(key, {})
        }

    against: dict[str, list[float]] = {}
    against_many: dict[str, list[float]] = {}
    for cell, row in zip(cells, rows, strict=True):
        times = {name: timing.median_us for name, timing in cell.timings.items()}
        ours = times.pop("moezoo", None)
        for name, microseconds in (row["references_us"] | times).items() if ours else ():
            against.setdefault(name, []).append(microseconds / ours)
            if cell.num_tokens >= 1024:
                against_many.setdefault(name, []).append(microseconds / ours)
    content: dict[str, Any] = {}
    for key in ("best_peer", "best_of_all"):
        found = ratios(key)
        content[key] = {
            "geometric_mean": geometric_mean(found.values()),
            "below_1": {cell: ratio for cell, ratio in found.items() if ratio < 1},
        }
    content["each"] = {name: geometric_mean(values) for name, values in against.items()}
    content["each_from_1024_tokens"] = {
        name: geometric_mean(values) for name, values in against_many.items()
    }
    return content


def table(report: Report, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=title(report))
    columns = ("layer", "tokens", "moezoo us", "best peer here", "ratio", "best of all", "ratio")
    for column in (*columns, "floor us", "of floor"):
        shown.add_column(column, justify="left" if column == "layer" else "right")
    for cell, row in zip(report.cells, rows, strict=True):
        ours = cell.timings.get("moezoo")
        found = []
        for key in ("best_peer", "best_of_all"):
            peer = row.get(key)
            found.append(f"{peer['name']} {us(peer['us'])}" if peer else "")
            found.append(f"{peer['times_moezoo']:.2f}" if peer and ours else "")
        shown.add_row(
            *(cell.layer, f"{cell.num_tokens:,}"),
            us(ours.median_us) if ours else "skipped",
            *found,
            us(cell.floor_us),
            f"{row['floor_share']:.0%}" if ours else "",
        )
    return shown


def say(message: str) -> None:
    print(f"layer: {message}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def peer(name: str, weights: Weights | QuantizedWeights, k: int) -> Implementation:
    if isinstance(weights, QuantizedWeights):
        return moezoo_layer(weights.dequantized(torch.bfloat16), k)
    return PEERS[name](weights.w13, weights.w2, k)


def implementations(
    weights: Weights | QuantizedWeights, k: int, peers: list[str]
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Return the implementations that can be built, and the reasons why others cannot."""
    built: dict[str, Implementation] = {"moezoo": moezoo_layer(weights, k)}
    failed: dict[str, str] = {}
    for name in peers:
        try:
            with torch.inference_mode():
                built[name] = peer(name, weights, k)
        except Exception as error:  # a peer must not take the others with it
            failed[name] = reason(error)
            say(f"{name} skipped: {failed[name]}")
    return built, failed


def run_cell(
    cell: Cell,
    built: dict[str, Implementation],
    inputs: Inputs,
    oracle: Oracle,
    *,
    budget_ms: float,
    expired: Callable[[], bool],
) -> None:
    fit: dict[str, Implementation] = {}
    for name, implementation in built.items():
        why = unfit(name, LAYERS[cell.layer], cell.num_tokens)
        if why is None and expired():
            why = "time budget"
        if why is None:
            fit[name] = implementation
        else:
            cell.skipped[name] = why

    cell.timings, failures = measure(fit, inputs, oracle, budget_ms=budget_ms)
    for name, error in failures.items():
        cell.skipped[name] = reason(error)
        say(f"{cell.layer}, {cell.num_tokens} tokens, {name} skipped: {cell.skipped[name]}")
    if inputs.x.is_cuda:
        torch.cuda.empty_cache()
    times = ", ".join(f"{name} {us(timing.median_us)}" for name, timing in cell.timings.items())
    say(f"{cell.layer}, {cell.num_tokens} tokens: {times}; floor {us(cell.floor_us)}")


def result_name(report: Report, *, partial: bool) -> str:
    parts = {
        "skewed": report.routing != "uniform",
        report.dtype: report.dtype != "bfloat16",
        report.quantization: report.quantization is not None,
        "partial": partial,
    }
    return "_".join(["layer", *(part for part, is_set in parts.items() if is_set)])


def write(report: Report, kept: dict[str, Any], seconds: float, *, name: str, device: Any) -> Path:
    document = report.to_dict()
    rows = [compare(cell, kept) for cell in report.cells]
    for cell, row in zip(document["cells"], rows, strict=True):
        cell.update(row)
    document["summary"] = summary(report.cells, rows)
    document["seconds"] = seconds
    return write_result(name, device, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layer", nargs="+", metavar="NAME", help="default: all; on CPU one")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N")
    parser.add_argument("--peers", nargs="*", choices=[*PEERS, OWN_BF16], help="default: all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--quantization", choices=[*FORMATS], help="default: none")
    parser.add_argument("--skewed", action="store_true", help="some experts are popular (Zipf)")
    parser.add_argument("--time-budget", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--cell-ms", type=float, default=40, help="timing of a cell, each peer")
    parser.add_argument(
        "--compile-ahead",
        type=float,
        default=90,
        metavar="SECONDS",
        help="compile on all processors before, for so long at most; 0 does not",
    )
    args = parser.parse_args()
    start = time.perf_counter()
    device = torch.device(args.device)
    default = default_layers(device, args.quantization)
    layers = checked_names(args.layer or default)
    all_peers = [OWN_BF16] if args.quantization else list(PEERS)
    peers = all_peers if args.peers is None else args.peers
    if others := sorted(set(peers) - set(all_peers)):
        parser.error(f"--peers {' '.join(others)}: here the peers are {' '.join(all_peers)}")
    tokens = args.tokens or list(DEFAULT_TOKENS[device.type])
    dtype = getattr(torch, args.dtype)

    def expired() -> bool:
        return time.perf_counter() - start > args.time_budget

    if device.type == "cuda" and args.compile_ahead:
        for problem in compile_ahead(layers, tokens, args.compile_ahead, args.quantization):
            say(f"compiling ahead: {problem}")
        say(f"compiled ahead in {time.perf_counter() - start:.0f} s")
    report = new_report(
        dtype=args.dtype, device=args.device, skewed=args.skewed, quantization=args.quantization
    )
    for package in PACKAGES:
        try:
            report.versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            report.versions[package] = "not installed"
    kept = references(report)
    draft = result_name(report, partial=True)
    for name in layers:
        layer = LAYERS[name]
        try:
            weights = random_weights(layer, dtype, device, args.quantization)
        except (torch.OutOfMemoryError, QuantizationError) as error:
            report.skipped[name] = reason(error)
            say(f"{name} skipped: {report.skipped[name]}")
            continue
        built, failed = implementations(weights, layer.k, peers)
        for num_tokens in tokens:
            inputs = Inputs.random(layer, num_tokens, dtype, device, skewed=args.skewed)
            cell = new_cell(name, inputs, report.ceilings, quantization=args.quantization)
            cell.skipped.update(failed)
            report.cells.append(cell)
            if expired():
                cell.skipped.update(dict.fromkeys(built, "time budget"))
                continue
            try:
                oracle = Oracle(weights, layer.k, inputs)
                run_cell(cell, built, inputs, oracle, budget_ms=args.cell_ms, expired=expired)
            except Exception as error:  # what was measured is kept, whatever happens later
                left = built.keys() - cell.timings.keys() - cell.skipped.keys()
                cell.skipped.update(dict.fromkeys(left, reason(error)))
                say(f"{name}, {num_tokens} tokens broken off: {reason(error)}")
        del weights, built, inputs
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write(report, kept, time.perf_counter() - start, name=draft, device=device)
        say(f"{name} done after {time.perf_counter() - start:.0f} s")
    whole = (
        set(layers) >= set(default)
        and set(tokens) >= set(DEFAULT_TOKENS[device.type])
        and set(peers) == set(all_peers)
        and not expired()
    )
    name = result_name(report, partial=not whole)
    path = write(report, kept, time.perf_counter() - start, name=name, device=device)
    if whole:
        result_path(draft, device).unlink(missing_ok=True)
    rows = [compare(cell, kept) for cell in report.cells]
    Console(width=150).print(table(report, rows))
    print(json.dumps(summary(report.cells, rows), indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
