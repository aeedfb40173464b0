"""`moezoo tune`: the best tiles for a model's experts on this GPU."""

import argparse
from pathlib import Path
from typing import Any

from moezoo.cli.models import check_revision, quieten
from moezoo.cli.options import add_command, add_hub, number
from moezoo.cli.output import DONE, say
from moezoo.formats import QUANTIZATIONS


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "tune",
        _tune,
        help="find the best tiles for a model's experts on this GPU",
        examples="""
tune Qwen/Qwen3-30B-A3B
tune 128,8,2048,768 --quantization fp8_w8a8 --tokens 16 64
""",
        description=(
            "Time the MoE kernels with the tiles that can be best on this GPU (Hopper or newer), "
            "and keep the\nbest ones in ~/.cache/moezoo/tiles; models with experts of these sizes "
            "use them from then on.\nIt takes a few minutes a layer."
        ),
    )
    add_hub(parser)
    parser.add_argument(
        "layer",
        metavar="MODEL_OR_SHAPE",
        help="hub id or folder, or experts,chosen,hidden,intermediate, such as 128,8,2048,768",
    )
    parser.add_argument(
        "--tokens",
        type=number(int, 2),
        nargs="+",
        metavar="N",
        help="numbers of tokens to tune for (default: 2 to 16384)",
    )
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="of the experts, int4 in groups of 128 without zero points (default: as the model "
        "stores them; of a shape, 16 bits)",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file instead of that table; models do not read it"
    )


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    if arguments.output is not None and arguments.output.is_dir():
        raise ValueError(f"--output must be a file, and {arguments.output} is a folder")
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA device, and torch finds none")
    from moezoo.layers.kernels.tiles import user_table
    from moezoo.tools.tune import TOKENS, check, read_entries, save, tune

    device = torch.device("cuda", torch.cuda.current_device())
    layer, stored = _layer(arguments)
    quantization = arguments.quantization or stored
    path = arguments.output or user_table(device)
    # What is wrong should be said before minutes are spent.
    check(layer, device, quantization)
    read_entries(path)
    entry = tune(
        layer,
        tokens=arguments.tokens or TOKENS,
        quantization=quantization,
        report=(lambda message: None) if arguments.quiet else say,
    )
    written = save([entry], path)
    if not arguments.quiet:
        say(f"written to {written}")
    return DONE


def _layer(arguments: argparse.Namespace) -> tuple[Any, str | None]:
    """Return the layer, and the format in which a model stores its experts."""
    from moezoo.tools.layer_weights import Layer

    sizes = arguments.layer.split(",")
    if all(size.strip().isdecimal() for size in sizes):
        numbers = [int(size) for size in sizes]
        if len(numbers) != 4 or min(numbers) < 1 or numbers[1] > numbers[0]:
            raise ValueError(
                "a shape is experts,chosen,hidden,intermediate, none of them 0 and no more chosen "
                f"than experts, such as 128,8,2048,768, got {arguments.layer!r}"
            )
        return Layer(*numbers), None
    from moezoo.tools.inspect import inspect

    check_revision(arguments, arguments.layer)
    quieten(arguments)
    report = inspect(
        arguments.layer,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
    )
    if report.experts is None or report.hidden_size is None:
        raise ValueError(f"{arguments.layer}: {report.reason or 'no experts found'}")
    experts = report.experts
    if len(experts.formats) > 1 and arguments.quantization is None:
        raise ValueError(
            f"{arguments.layer} stores experts as {' and '.join(experts.formats)}: say with "
            "--quantization which to tune for"
        )
    sizes_ = (experts.num_experts, experts.per_token, report.hidden_size)
    return Layer(*sizes_, experts.intermediate_size), next(iter(experts.formats), None)
