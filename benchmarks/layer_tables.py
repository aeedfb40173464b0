"""The tables of what benchmarks/layer.py measured.

    python benchmarks/layer_tables.py README.md docs/performance.md

In each page what lies between `<!-- benchmarks/layer_tables.py NAME -->` and `<!-- end -->` becomes
the table of that name anew, from the results of an H100, or of an H200 where the name says so.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from marked_tables import MODEL_NAMES, renew_pages, table

from moezoo.tools.layer import us

RESULTS = Path(__file__).parent / "results"
H100, H200 = "nvidia_h100_80gb_hbm3", "nvidia_h200"

SHORT = {"int4_w4a16": "int4", "int8_w8a16": "int8", "mxfp4": "mxfp4", "fp8_w8a8": "block fp8"}

Cell = dict[str, Any]


def result(name: str, device: str = H100) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}_{device}.json").read_text())
    return found


def cells(document: dict[str, Any], layer: str = "qwen3-30b-a3b") -> list[Cell]:
    return [cell for cell in document["cells"] if cell["layer"] == layer]


def time_of(cell: Cell, name: str) -> float | None:
    """Return a time of this run, or the one kept from an earlier run."""
    timing = cell["timings"].get(name)
    found: float | None = timing["median_us"] if timing else cell["references_us"].get(name)
    return found


def times(found: list[Cell], rows: dict[str, str]) -> list[list[str]]:
    """Return a row for each implementation, the fastest at each number of tokens in bold."""
    lines = []
    best = [min(t for n in rows if (t := time_of(cell, n)) is not None) for cell in found]
    for name, title in rows.items():
        line = [title]
        for cell, least in zip(found, best, strict=True):
            time = time_of(cell, name)
            shown = "" if time is None else us(time)
            line.append(f"**{shown}**" if time == least else shown)
        lines.append(line)
    return lines


def head(found: Iterable[Cell]) -> list[str]:
    return ["tokens", *(f"{cell['num_tokens']:,}" for cell in found)]


def bf16() -> list[str]:
    document = result("layer")
    found = cells(document)
    ceilings = document["ceilings"]
    rows = times(
        found,
        {
            "moezoo": "moezoo",
            "triton_kernels": "triton_kernels",
            "torch_grouped_mm": "torch `grouped_mm`",
            "hf_grouped_mm": "transformers `grouped_mm`",
            "vllm_tuned": "vLLM 0.33, tuned tiles (measured earlier)",
        },
    )
    bandwidth, peak = ceilings["read_bytes_per_second"], ceilings["flop_per_second"]
    floor = f"floor: bytes over {bandwidth / 1e12:.2f} TB/s, FLOP over {peak / 1e12:.0f} TFLOP/s"
    rows.append([floor, *(us(cell["floor_us"]) for cell in found)])
    return table(head(found), rows)


def h200() -> list[str]:
    """Return times of each layer and, in brackets, the best peer's over them."""
    document = result("layer", H200)
    rows = []
    for layer, title in MODEL_NAMES.items():
        found = cells(document, layer)
        ratios = [cell["best_peer"]["times_moezoo"] for cell in found]
        ours = [cell["timings"]["moezoo"]["median_us"] for cell in found]
        rows.append([title, *(f"{us(t)} ({r:.2f})" for t, r in zip(ours, ratios, strict=True))])
    return table(head(found), rows)


def block_fp8() -> list[str]:
    found = cells(result("layer_fp8_w8a8"))
    rows = times(
        found,
        {
            "moezoo": "moezoo, block fp8",
            "moezoo_bf16": "moezoo, bf16, same run",
            "vllm_fp8_tuned": "vLLM 0.33, tuned tiles (measured earlier)",
            "deepgemm_fp8": "DeepGEMM (measured earlier)",
        },
    )
    return table(head(found), rows)


def quantized() -> list[str]:
    """Return speeds relative to bf16 and, up to 256 tokens, shares of the floor."""
    rows, first = [], cells(result("layer_int4_w4a16_partial"))
    for layer, formats in (
        ("qwen3-30b-a3b", ("int4_w4a16", "mxfp4", "int8_w8a16")),
        ("mixtral-8x7b", ("int4_w4a16", "mxfp4", "int8_w8a16", "fp8_w8a8")),
        ("gpt-oss-20b", ("mxfp4",)),
    ):
        for quantization in formats:
            by_tokens = {
                cell["num_tokens"]: cell
                for cell in cells(result(f"layer_{quantization}_partial"), layer)
            }
            line = [f"{MODEL_NAMES[layer]}, {SHORT[quantization]}"]
            for tokens in (cell["num_tokens"] for cell in first):
                cell = by_tokens[tokens]
                time = {n: timing["median_us"] for n, timing in cell["timings"].items()}
                ratio = f"{time['moezoo_bf16'] / time['moezoo']:.2f}"
                line.append(f"{ratio} ({cell['floor_share']:.0%})" if tokens <= 256 else ratio)
            rows.append(line)
    return table(head(first), rows)


TABLES = {"bf16": bf16, "h200": h200, "block_fp8": block_fp8, "quantized": quantized}


def main() -> None:
    renew_pages(__doc__, "layer_tables.py", TABLES)


if __name__ == "__main__":
    main()
