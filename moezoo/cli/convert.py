"""`moezoo convert`: a checkpoint written anew, its experts quantised."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from moezoo.cli.models import check_revision, quieten, tokenizer_of
from moezoo.cli.options import DTYPES, add_command, add_hub, add_quantization, folder
from moezoo.cli.output import DONE, say


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        _convert,
        help="write a checkpoint anew, its experts quantised",
        examples="""
convert Qwen/Qwen3-30B-A3B folder --quantization int4_w4a16
convert Qwen/Qwen3-30B-A3B folder --quantization mxfp4 --measure heldout.txt
convert folder other --quantization '{"type": "int4_w4a16", "group_size": 64}' --dtype float16
""",
        description=(
            "Write a checkpoint anew with its experts quantised, a layer at a time: as compressed-"
            "tensors, fp8 or\nmxfp4, whichever has the format, which other libraries read too. "
            "Tokenizer and model card come along."
        ),
    )
    add_hub(parser)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("output", type=folder, help="folder, new or empty")
    add_quantization(parser, "of the experts (default: as stored)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default 5GB")
    parser.add_argument(
        "--measure",
        type=Path,
        metavar="FILE",
        help='held-out text, or .jsonl with "text" in each line: measure the loss on it before and '
        "after, for the model card; loads each whole",
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one")


def _convert(arguments: argparse.Namespace) -> int:
    from moezoo.generation.held_out import HeldOut
    from moezoo.loaders.checkpoint import open_checkpoint
    from moezoo.loaders.convert import convert

    check_revision(arguments, arguments.model)
    quieten(arguments)
    checkpoint = open_checkpoint(
        arguments.model,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
    )
    held_out = None
    if arguments.measure is not None:
        tokenizer = tokenizer_of(checkpoint, local_files_only=arguments.local_files_only)
        try:
            held_out = HeldOut.read(arguments.measure, tokenizer)
        except ValueError as error:
            raise ValueError(f"--measure: {error}") from error
    started = time.perf_counter()
    done = convert(
        checkpoint,
        arguments.output,
        quantization=arguments.quantization,
        dtype=arguments.dtype,
        device=arguments.device,
        max_shard_size=arguments.max_shard_size,
        held_out=held_out,
        progress=not arguments.quiet and sys.stderr.isatty(),
    )
    if not arguments.quiet:
        seconds = time.perf_counter() - started
        kinds = f"in {' and '.join(done.experts)}" if done.experts else "not quantised"
        if done.weight_error is not None:
            kinds += f" (relative error {done.weight_error:.2%})"
        say(
            f"{arguments.output}: experts {kinds}; {done.bytes_before:,} bytes of weights became "
            f"{done.bytes_after:,} in {seconds:.1f} s"
        )
        if (measured := done.measured) is not None:
            say(
                f"loss on {measured.text}: {measured.before:.4f} nats a token became "
                f"{measured.after:.4f} ({measured.after - measured.before:+.4f}; "
                f"{measured.num_tokens:,} tokens)"
            )
    return DONE
