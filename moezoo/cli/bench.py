"""`moezoo bench`: how fast this machine is."""

import argparse
from typing import Any

from moezoo.cli.options import DTYPES, add_command, add_json, number
from moezoo.cli.output import DONE, FAILED, say, show
from moezoo.formats import FP8, INT4, INT8, MXFP4

MEASURED = (FP8, f"{FP8}_channel", INT8, INT4, MXFP4)


def add(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure moezoo on this machine")
    subjects = bench.add_subparsers(title="subjects", required=True, metavar="SUBJECT")
    parser = add_command(
        subjects,
        "layer",
        _bench_layer,
        examples="""
bench layer
bench layer --layer qwen3-30b-a3b --tokens 1 64 4096 --quantization fp8_w8a8 --json
""",
        help="the MoE layer, beside what memory and matrix units allow",
        description="Time the MoE layer of released models with random weights; its result is "
        "compared with fp32 before.",
    )
    parser.add_argument("--layer", nargs="+", metavar="NAME", help="default: all; on CPU one")
    parser.add_argument("--tokens", nargs="+", type=number(int, 1), metavar="N")
    parser.add_argument("--dtype", choices=DTYPES[1:], default="bfloat16")
    parser.add_argument("--quantization", choices=MEASURED, help="default: weights in --dtype")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one")
    parser.add_argument("--skewed", action="store_true", help="some experts are popular (Zipf)")
    add_json(parser)


def _bench_layer(arguments: argparse.Namespace) -> int:
    from moezoo.tools.layer import bench

    def done(cell: Any) -> None:
        if not arguments.quiet:
            say(f"{cell.layer}, {cell.num_tokens} tokens: done")

    report = bench(
        arguments.layer,
        arguments.tokens,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        device=arguments.device,
        skewed=arguments.skewed,
        progress=done,
    )
    show(report, as_json=arguments.json)
    return FAILED if report.skipped or any(cell.skipped for cell in report.cells) else DONE
