"""`moezoo routing`: which experts the tokens of prompts go to."""

import argparse
from pathlib import Path
from typing import Any

from moezoo.cli.models import loaded, opened, read
from moezoo.cli.options import DTYPES, add_command, add_hub, add_json, add_quantization, number
from moezoo.cli.output import DONE, PARTLY, require_writable, save_plot, say, show
from moezoo.errors import naming_file


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "routing",
        _routing,
        help="record which experts the tokens of prompts go to",
        examples="""
routing --input prompts.jsonl --html report.html
routing MODEL --input prompts.jsonl --output trace.safetensors --max-new-tokens 64
routing MODEL --input prompts.jsonl --choices --json
""",
        description=(
            "Run prompts through a model and record which experts their tokens go to, for moezoo "
            "eplb\nand RoutingTrace.load."
        ),
    )
    parser.set_defaults(prompt=None)
    add_hub(parser)
    parser.add_argument(
        "model", nargs="?", help="hub id or folder (default: the small model in the package)"
    )
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="JSON lines as generate takes; - is stdin"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="keep the trace there, as safetensors"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="a page about it, which needs no other file"
    )
    add_json(parser)
    at_least_1 = number(int, 1)
    parser.add_argument(
        "--max-new-tokens",
        type=at_least_1,
        default=1,
        metavar="N",
        help="let the prompts go on for so many tokens (default 1: the prompts alone)",
    )
    parser.add_argument(
        "--history",
        type=at_least_1,
        default=1024,
        metavar="N",
        help="keep the loads of the last N forward passes one by one (default 1024)",
    )
    parser.add_argument(
        "--choices", action="store_true", help="keep the experts and weights of each token too"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    parser.add_argument(
        "--chat", action="store_true", help="wrap prompts with the tokenizer's chat template"
    )
    parser.add_argument("--batch-size", type=at_least_1, metavar="N", help="most prompts at once")
    parser.add_argument(
        "--batch-tokens", type=at_least_1, metavar="N", help="most prompt tokens in a forward pass"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored")
    add_quantization(parser, "quantise the experts while they load (default: as stored)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one")


def _routing(arguments: argparse.Namespace) -> int:
    from moezoo.generation.offline import generate
    from moezoo.tools.routing import record_routing

    require_writable(arguments, "output", "plot", "html")
    prompts, problems = read(arguments)
    for problem in problems:
        say(f"skipped {problem}")
    if not prompts:
        raise ValueError("there is no prompt to run")
    model, tokenizer = loaded(opened(arguments), arguments)
    options = {
        name: getattr(arguments, name)
        for name in ("batch_size", "batch_tokens")
        if getattr(arguments, name) is not None
    }
    num_failed = 0
    with record_routing(model, choices=arguments.choices, history=arguments.history) as trace:
        completions = generate(
            model,
            tokenizer,
            prompts,
            chat=arguments.chat,
            do_sample=False,
            max_new_tokens=arguments.max_new_tokens,
            **options,
        )
        for completion in completions:
            if completion.error is not None:
                num_failed += 1
                say(f"prompt {completion.id!r} failed: {completion.error}")
    if arguments.output is not None:
        with naming_file(arguments.output):
            trace.save(arguments.output)
    if arguments.html is not None:
        with naming_file(arguments.html):
            arguments.html.write_text(trace.html(), encoding="utf-8")
    save_plot(arguments.plot, trace)
    if arguments.json or not arguments.quiet:
        show(trace, as_json=arguments.json)
    if not arguments.quiet:
        files = [str(path) for path in (arguments.output, arguments.html, arguments.plot) if path]
        written = f"; written: {', '.join(files)}" if files else ""
        say(f"{len(prompts) - num_failed} prompts, {num_failed} failed{written}")
    return PARTLY if num_failed or problems else DONE
