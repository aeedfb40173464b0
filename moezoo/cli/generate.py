"""`moezoo generate`: completions of prompts, one by one or of a whole file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.cli.models import check_placement, loaded, opened, read
from moezoo.cli.options import (
    DTYPES,
    GENERATE_CODES,
    add_command,
    add_hub,
    add_quantization,
    number,
)
from moezoo.cli.output import DONE, INTERRUPTED, PARTLY, code_of, require_writable, say
from moezoo.errors import MoEZooError, naming_file

if TYPE_CHECKING:
    from moezoo.generation.texts import Completion, Prompt
    from moezoo.loaders.checkpoint import Checkpoint
    from moezoo.parallel.mesh import Parallel
    from moezoo.tools.job import Job

DISPATCHES = ("all_to_all", "all_gather")


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "generate",
        _generate,
        help="complete prompts",
        codes=GENERATE_CODES,
        examples="""
generate --prompt "Once upon a time" --seed 1
generate Qwen/Qwen3-30B-A3B --chat --prompt "Why is the sky blue?"
generate MODEL --input prompts.jsonl --output out.jsonl --max-new-tokens 128
generate MODEL --input - --greedy --quantization fp8_w8a8 < prompts.jsonl
generate MODEL --input prompts.jsonl --output out.jsonl --expert-parallel 8
""",
        description=(
            "Complete prompts. One --prompt is printed as text; several, and those of --input, as "
            "JSON lines,\neach when it is finished: in any order, told apart by their ids.\nWith "
            "--output, a run that was stopped goes on where it stopped: finished prompts are kept, "
            "none is\ndone twice."
        ),
    )
    add_hub(parser)
    parser.add_argument(
        "model", nargs="?", help="hub id or folder (default: the small model in the package)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    source.add_argument(
        "--input",
        metavar="FILE",
        help='JSON lines with "prompt" or "messages" and, if wished, "id"; - is stdin',
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON lines, appended to as prompts finish, in any order",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start --output anew instead of going on"
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop before generating if an input line is bad"
    )
    parser.add_argument(
        "--chat", action="store_true", help="wrap prompts with the tokenizer's chat template"
    )
    sampling = parser.add_argument_group(
        "sampling", "what is not given comes from the checkpoint's generation_config.json"
    )
    at_least_1, fraction = number(int, 1), number(float, 0, 1)
    not_negative = number(float, 0)
    sampling.add_argument("--max-new-tokens", type=at_least_1, metavar="N", help="default 256")
    sampling.add_argument("--greedy", action="store_true", help="always the likeliest token")
    sampling.add_argument("--temperature", type=not_negative, metavar="T", help="0 is --greedy")
    sampling.add_argument("--top-k", type=number(int, 0), metavar="K", help="0 is off")
    sampling.add_argument("--top-p", type=fraction, metavar="P")
    sampling.add_argument("--min-p", type=fraction, metavar="P")
    sampling.add_argument("--repetition-penalty", type=not_negative, metavar="R")
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    sampling.add_argument("--seed", type=int, help="the same seed gives the same completions")
    running = parser.add_argument_group("running")
    running.add_argument(
        "--batch-size",
        type=at_least_1,
        metavar="N",
        help="the most prompts at once (default: 256 on a GPU, 8 on a CPU; fewer if they do not "
        "fit the KV cache)",
    )
    running.add_argument(
        "--batch-tokens",
        type=at_least_1,
        metavar="N",
        help="the most prompt tokens in one forward pass (default 8192); longer prompts take "
        "several",
    )
    running.add_argument(
        "--cache-gib",
        type=number(float, 0.001, 1e6),
        metavar="G",
        help="memory of the KV cache (default: what is free on a GPU, at most 4 on a CPU)",
    )
    running.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored")
    add_quantization(running, "quantise the experts while they load (default: as stored)")
    running.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one")
    ranks = parser.add_argument_group(
        "several GPUs",
        "each of N processes has a part of the experts. They are started here, or were by\n"
        "torchrun or accelerate launch (-m moezoo generate ..), on several hosts too",
    )
    ranks.add_argument(
        "--expert-parallel", type=at_least_1, metavar="N", help="processes that share the experts"
    )
    ranks.add_argument(
        "--dispatch",
        choices=DISPATCHES,
        help="all_to_all (default): each process completes prompts of its own; all_gather: all the "
        "same prompts",
    )
    ranks.add_argument(
        "--placement",
        metavar="HOW",
        help="of experts: linear (default), round_robin, or a file of moezoo eplb plan",
    )
    ranks.add_argument(
        "--rank-timeout",
        type=number(float, 0.1),
        metavar="S",
        help="end with an error when a process is gone for so many seconds (default 60)",
    )


def _generate(arguments: argparse.Namespace) -> int:
    from moezoo.generation.settings import check_options

    options = _sampling_options(arguments)
    check_options(**options)
    if arguments.overwrite and arguments.output is None:
        raise ValueError("--overwrite needs --output")
    files = [os.path.realpath(file) for file in (arguments.input, arguments.output) if file]
    if len(files) > len(set(files)):
        raise ValueError(f"--input and --output are the same file, {arguments.output}")
    parallel = _parallel(arguments)
    if parallel is None:
        return _generate_alone(arguments, options, None)
    if "WORLD_SIZE" not in os.environ:
        check_placement(parallel.placement_file)
    if parallel.expert_parallel_size > 1 and "WORLD_SIZE" not in os.environ:
        from moezoo.parallel.launch import launch

        try:
            return launch(parallel.expert_parallel_size, "moezoo", arguments.argv)
        except KeyboardInterrupt:
            return INTERRUPTED  # rank 0 has said so
    from moezoo.parallel.mesh import join
    from moezoo.tools.job import Job

    job = Job(join(parallel, arguments.device))
    with job.failing_together():
        run = _generate_alone if job.leads else _generate_for_rank_0
        code = run(arguments, options, job)
    job.mesh.leave()
    return code


def _parallel(arguments: argparse.Namespace) -> Parallel | None:
    given = {
        name: getattr(arguments, option)
        for name, option in (
            ("dispatch", "dispatch"),
            ("placement", "placement"),
            ("timeout", "rank_timeout"),
        )
        if getattr(arguments, option) is not None
    }
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if arguments.expert_parallel is None:
        if world_size > 1:
            raise ValueError(
                f"there are {world_size} processes: say with --expert-parallel how many of them "
                "share the experts, or start one process"
            )
        if given:
            raise ValueError("--dispatch, --placement and --rank-timeout need --expert-parallel")
        return None
    from moezoo.parallel.mesh import Parallel

    num_ranks = arguments.expert_parallel
    if ":" in (arguments.device or "") and max(num_ranks, world_size) > 1:
        raise ValueError(
            f"--device {arguments.device} is one GPU, and each process takes its own: leave it out"
        )
    return Parallel(num_ranks, **given)


def _generate_alone(arguments: argparse.Namespace, options: dict[str, Any], job: Job | None) -> int:
    """Generate in one process, or as the rank that reads and writes everything."""
    from moezoo.generation.prompt_files import OutputFile

    with _told(job):
        require_writable(arguments, "output")
        prompts, problems = read(arguments)
        for problem in problems:
            say(problem if arguments.strict else f"skipped {problem}")
        if problems and arguments.strict:
            raise ValueError(f"{len(problems)} bad input lines and --strict: nothing was generated")
        if not prompts:
            raise ValueError("there is no prompt to complete")
        # Opened once, so that the fingerprint, the model and the tokenizer are of one commit.
        checkpoint = opened(arguments)
        run = _fingerprint(checkpoint, arguments, options)
        file = None
        if arguments.output is not None:
            file = OutputFile(arguments.output, prompts, run, overwrite=arguments.overwrite)
    finished = {} if file is None else file.finished
    num_finished_before = len(finished)
    pending = [prompt for prompt in prompts if prompt.id not in finished]
    with naming_file("stdout" if file is None else file.path), file or nullcontext():
        if pending:
            own = pending if job is None else job.deal(pending)
            completions, streamed = _completions(checkpoint, arguments, own, options, job)
            write = _print(arguments, run, streamed) if file is None else file.write
            with _progress(arguments, len(prompts), num_finished_before) as advance:

                def take(completion: Completion) -> None:
                    finished[completion.id] = completion.error is not None
                    write(completion)
                    advance(len(completion.token_ids))
                    if completion.error is not None:
                        say(f"prompt {completion.id!r} failed: {completion.error}")

                if job is not None:
                    job.collect(completions, pending, take)
                else:
                    for completion in completions:
                        take(completion)
    num_failed = sum(finished.values())
    if file is not None and not arguments.quiet:
        say(
            f"{file.path}: {len(finished)} completions, {num_failed} of them failed, "
            f"{num_finished_before} were there before"
        )
    code = PARTLY if num_failed or problems else DONE
    if job is not None:
        (job.end if pending else job.begin)(code)
    return code


@contextmanager
def _told(job: Job | None) -> Iterator[None]:
    """Let all ranks end with the exit code of a failure in the block, before there is anything to
    do."""
    try:
        yield
    except (MoEZooError, ValueError, OSError) as error:
        if job is not None:
            job.begin(code_of(error))
            job.mesh.leave()
        raise


def _generate_for_rank_0(arguments: argparse.Namespace, options: dict[str, Any], job: Job) -> int:
    arguments.quiet = True
    code = job.begin(None)
    if code is None:
        prompts = job.dealt()
        completions, _ = _completions(opened(arguments), arguments, prompts, options, job)
        job.hand_on(completions)
        code = job.end(None)
    assert code is not None
    return code


def _sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `GenerationConfig` that the command line sets."""
    given = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature or None,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "stop_strings": arguments.stop,
    }
    options = {name: value for name, value in given.items() if value is not None}
    samples = options.keys() & {"temperature", "top_k", "top_p", "min_p"}
    if arguments.greedy or arguments.temperature == 0:
        if samples:
            raise ValueError(f"greedy generation does not use {', '.join(sorted(samples))}")
        options["do_sample"] = False
    elif samples:
        options["do_sample"] = True
    return options


def _fingerprint(
    checkpoint: Checkpoint, arguments: argparse.Namespace, options: dict[str, Any]
) -> str:
    """Return a short hash of everything that decides a prompt's completion."""
    identity = [
        checkpoint.fingerprint(),
        arguments.chat,
        arguments.dtype,
        arguments.seed,
        options,
        *([arguments.quantization] if arguments.quantization else []),
    ]
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _completions(
    checkpoint: Checkpoint,
    arguments: argparse.Namespace,
    prompts: list[Prompt],
    options: dict[str, Any],
    job: Job | None,
) -> tuple[Iterator[Completion], bool]:
    """Load the model, and yield its completions as they finish, on demand.

    And whether they are printed already, token by token.
    """
    from transformers import TextStreamer

    from moezoo.generation.offline import generate

    model, tokenizer = loaded(checkpoint, arguments, job)
    streamer = None
    # A streamer prints each token as it comes, so with stop strings also what is to be cut off.
    stops = arguments.stop or model.generation_config.stop_strings
    if job is None and _prints_text(arguments) and sys.stdout.isatty() and not stops:
        streamer = TextStreamer(tokenizer, skip_prompt=arguments.chat, skip_special_tokens=True)
    completions = generate(
        model,
        tokenizer,
        prompts,
        batch_size=arguments.batch_size if streamer is None else 1,
        cache_bytes=None if arguments.cache_gib is None else int(arguments.cache_gib * 2**30),
        seed=arguments.seed,
        chat=arguments.chat,
        streamer=streamer,
        **({} if arguments.batch_tokens is None else {"batch_tokens": arguments.batch_tokens}),
        **options,
    )
    return completions, streamer is not None


def _prints_text(arguments: argparse.Namespace) -> bool:
    return arguments.output is None and arguments.prompt is not None and len(arguments.prompt) == 1


def _print(arguments: argparse.Namespace, run: str, streamed: bool) -> Callable[[Completion], None]:
    """Return the function that prints a completion: as a JSON line, or a single one as text unless
    it was streamed."""
    from moezoo.generation.prompt_files import completion_line

    def write_text(completion: Completion) -> None:
        if completion.error is None and not streamed:
            print(completion.text if arguments.chat else f"{completion.prompt}{completion.text}")

    def write_line(completion: Completion) -> None:
        sys.stdout.buffer.write(completion_line(completion, run))
        sys.stdout.flush()

    return write_text if _prints_text(arguments) else write_line


@contextmanager
def _progress(
    arguments: argparse.Namespace, total: int, finished: int
) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, a line every few seconds elsewhere, nothing for a single prompt."""
    from moezoo.tools.progress import Lines, bar

    if arguments.quiet or _prints_text(arguments):
        yield lambda num_tokens: None
    elif sys.stderr.isatty():
        with bar(total, finished) as advance:
            yield advance
    else:
        yield Lines(total, finished, say).advance
