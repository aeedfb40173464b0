"""The command line: `moezoo generate`, `inspect`, `convert`, `routing`, `eplb`, `tune`, `bench`.

Exit codes: 0 all done; 1 a failure while running; 2 wrong options or bad input; 3 finished, but
some prompts or input lines failed, or (inspect) moezoo cannot run the model; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moezoo
from moezoo.errors import ExpertMapError, MoEZooError, RankError, naming

if TYPE_CHECKING:
    from moezoo.generation.offline import Completion, Prompt
    from moezoo.loaders.checkpoint import Checkpoint
    from moezoo.parallel.mesh import Parallel
    from moezoo.tools.job import Job

DONE, FAILED, USAGE, PARTLY, INTERRUPTED = 0, 1, 2, 3, 130
QUANTIZATIONS = ("fp8_w8a8", "int8_w8a16", "int4_w4a16", "mxfp4")
TUNED = ("fp8_w8a8",)
MEASURED = ("fp8_w8a8", "fp8_w8a8_channel", "int8_w8a16", "int4_w4a16", "mxfp4")
EPLB_POLICIES = ("default", "least_movement")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DISPATCHES = ("all_to_all", "all_gather")

_COMMON_CODES = """\
exit codes:
  0    all done
  1    a failure while running (the model cannot be loaded, out of memory, disk full)
  2    wrong options or bad input; nothing was done
"""
EXIT_CODES = f"""\
{_COMMON_CODES}  3    finished, but some prompts or input lines failed (each is named on stderr);
       inspect: moezoo cannot run the model (the report says why)
  130  interrupted; generate with --output: the same command without --overwrite
       goes on where it stopped
"""
GENERATE_CODES = f"""\
{_COMMON_CODES}  3    finished, but some prompts or input lines failed (each is named on stderr)
  130  interrupted; with --output, the same command without --overwrite goes on
       where it stopped
"""
INSPECT_CODES = f"""\
{_COMMON_CODES}  3    moezoo cannot run the model (the report says why)
  130  interrupted
"""
OTHER_CODES = f"""\
{_COMMON_CODES}  130  interrupted; what was not finished is not kept
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        code: int = arguments.run(arguments)
        with naming("stdout"):
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if _rank() == 0:
            _say("interrupted" + _how_to_go_on(arguments))
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has gone; keep the interpreter from flushing into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (MoEZooError, ValueError, OSError) as error:
        if arguments.debug:
            traceback.print_exc()
        # Every rank has these.
        if _rank() == 0 or not isinstance(error, ValueError | ExpertMapError):
            _say(f"error: {error}")
        if isinstance(error, RankError) and "RANK" in os.environ:
            os._exit(FAILED)  # the GPU may wait for the lost rank, and a usual end for the GPU
        return _code(error)


def _code(error: Exception) -> int:
    return USAGE if isinstance(error, ValueError) else FAILED


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    if not hasattr(arguments, "overwrite") or arguments.output is None:
        return ""
    if arguments.overwrite:
        return "; leave out --overwrite to go on where it stopped"
    return "; the same command goes on where it stopped"


def _say(message: str) -> None:
    place = f"rank {_rank()}: " if _rank() else ""
    # At once, so that lines of several ranks do not mix.
    sys.stderr.write(f"moezoo: {place}{message}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moezoo",
        description="Run Mixture-of-Experts language models from Hugging Face checkpoints.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show versions and the GPU")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_routing(commands)
    _add_eplb(commands)
    _add_tune(commands)
    _add_bench(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import torch

        print(f"moezoo {moezoo.__version__}")
        print(f"torch {torch.__version__}")
        for package in ("triton", "transformers"):
            try:
                print(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                print(f"{package} not installed")
        for index in range(torch.cuda.device_count()):
            print(f"GPU {index} {torch.cuda.get_device_name(index)}")
        if not torch.cuda.is_available():
            print("GPU none")
        parser.exit()


def _add_command(
    commands: Any, name: str, run: Any, *, help: str, description: str, codes: str = OTHER_CODES
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument(
        "--local-files-only", action="store_true", help="use the hub cache, never the network"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_generate(commands: Any) -> None:
    parser = _add_command(
        commands,
        "generate",
        _generate,
        help="complete prompts",
        codes=GENERATE_CODES,
        description=(
            "Complete prompts. One --prompt is printed as text; several, and those of --input, as "
            "JSON lines,\neach when it is finished: in any order, told apart by their ids.\nWith "
            "--output, a run that was stopped goes on where it stopped: finished prompts are kept, "
            "none is\ndone twice."
        ),
    )
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
    at_least_1, fraction = _number(int, 1), _number(float, 0, 1)
    not_negative = _number(float, 0)
    sampling.add_argument("--max-new-tokens", type=at_least_1, metavar="N", help="default 256")
    sampling.add_argument("--greedy", action="store_true", help="always the likeliest token")
    sampling.add_argument("--temperature", type=not_negative, metavar="T", help="0 is --greedy")
    sampling.add_argument("--top-k", type=_number(int, 0), metavar="K", help="0 is off")
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
        type=_number(float, 0.001, 1e6),
        metavar="G",
        help="memory of the KV cache (default: what is free on a GPU, at most 4 on a CPU)",
    )
    running.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored")
    _add_quantization(running, "quantise the experts while they load (default: as stored)")
    running.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one")
    running.add_argument("--quiet", action="store_true", help="no progress, only errors")
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
        type=_number(float, 0.1),
        metavar="S",
        help="end with an error when a process is gone for so many seconds (default 60)",
    )


def _add_inspect(commands: Any) -> None:
    parser = _add_command(
        commands,
        "inspect",
        _inspect,
        help="tell what a checkpoint holds and needs, before downloading it",
        codes=INSPECT_CODES,
        description=(
            "Tell what a checkpoint holds and needs, from its config and the headers of its "
            "files; no weight is read.\nA model that moezoo cannot run is reported too, with the "
            "reason, and exit code 3."
        ),
    )
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument(
        "--expert-parallel",
        type=_number(int, 1),
        metavar="N",
        help="also what each of N ranks that share the experts reads and holds",
    )
    parser.add_argument(
        "--placement",
        default="linear",
        metavar="P",
        help="with --expert-parallel: linear (default), round_robin, or a placement file",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def _add_convert(commands: Any) -> None:
    parser = _add_command(
        commands,
        "convert",
        _convert,
        help="write a checkpoint anew, its experts quantised",
        description=(
            "Write a checkpoint anew with its experts quantised, a layer at a time: as compressed-"
            "tensors, fp8 or\nmxfp4, whichever has the format, which other libraries read too. "
            "Tokenizer and model card come along."
        ),
    )
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("output", type=_folder, help="folder, new or empty")
    _add_quantization(parser, "of the experts (default: as stored)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default 5GB")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress, only errors")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is '', expected the name of a folder")
    return Path(text)


def _add_routing(commands: Any) -> None:
    parser = _add_command(
        commands,
        "routing",
        _routing,
        help="record which experts the tokens of prompts go to",
        description=(
            "Run prompts through a model and record which experts their tokens go to, for moezoo "
            "eplb\nand RoutingTrace.load."
        ),
    )
    parser.set_defaults(prompt=None)
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
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    at_least_1 = _number(int, 1)
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
    _add_quantization(parser, "quantise the experts while they load (default: as stored)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one")
    parser.add_argument("--quiet", action="store_true", help="no table, only errors")


def _add_eplb(commands: Any) -> None:
    eplb = commands.add_parser("eplb", help="plan where experts go on several GPUs")
    actions = eplb.add_subparsers(title="actions", required=True, metavar="ACTION")
    at_least_1, at_least_0 = _number(int, 1), _number(int, 0)

    parser = actions.add_parser(
        "plan",
        help="a placement for the loads of a trace",
        description="Place experts, and copies of the busiest, for the loads that moezoo routing "
        'recorded; eplb={"placement": FILE} starts from the file.',
    )
    parser.set_defaults(run=_eplb_plan)
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE")
    parser.add_argument("--gpus", type=at_least_1, required=True, metavar="N")
    parser.add_argument(
        "--redundant", type=at_least_0, default=0, metavar="N", help="copies of experts (default 0)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON")
    parser.add_argument("--policy", choices=EPLB_POLICIES, default="default")
    parser.add_argument("--nodes", type=at_least_1, default=1, metavar="N", help="default 1")
    parser.add_argument(
        "--groups",
        type=at_least_1,
        default=1,
        metavar="N",
        help="groups of experts that stay on one node (default 1; as the router has them)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

    parser = actions.add_parser(
        "simulate",
        help="balancedness over time, for different settings",
        description="Replay the loads of a trace, or made-up ones by Zipf's law, and tell how "
        "balanced ranks would have been\nand what would have moved. Options that take several "
        "values are tried in all combinations.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_eplb_simulate)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="of moezoo routing")
    source.add_argument(
        "--zipf", type=_number(float, 0), metavar="S", help="the n-th most popular: n ** -S"
    )
    zipf = parser.add_argument_group("loads of --zipf")
    zipf.add_argument("--experts", type=at_least_1, default=256, metavar="N", help="default 256")
    zipf.add_argument("--layers", type=at_least_1, default=4, metavar="N", help="default 4")
    zipf.add_argument("--steps", type=_number(int, 2), default=1000, metavar="N", help="def. 1000")
    zipf.add_argument(
        "--tokens",
        type=at_least_1,
        default=32768,
        metavar="N",
        help="routed to a layer's experts in a step (default 32768: 4096 tokens of 8 experts)",
    )
    zipf.add_argument(
        "--half-life",
        type=_number(float, 1),
        metavar="STEPS",
        help="popularity correlates by 1/2 with itself so many steps before (default: no drift)",
    )
    zipf.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpus", type=at_least_1, nargs="+", required=True, metavar="N")
    parser.add_argument("--redundant", type=at_least_0, nargs="+", default=[0], metavar="N")
    parser.add_argument(
        "--window", type=at_least_1, nargs="+", metavar="N", help="steps (default: the interval)"
    )
    parser.add_argument(
        "--interval", type=at_least_1, nargs="+", metavar="N", help="steps (default: a tenth)"
    )
    parser.add_argument("--policy", choices=EPLB_POLICIES, nargs="+", default=list(EPLB_POLICIES))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_quantization(parser: Any, help: str) -> None:
    parser.add_argument(
        "--quantization",
        type=_quantization,
        metavar="SCHEME",
        help=f"{help}: {', '.join(QUANTIZATIONS)}, or JSON with its choices, such as "
        """'{"type": "int4_w4a16", "group_size": 64}'""",
    )


def _quantization(text: str) -> Any:
    from moezoo.loaders.quantization import Quantization

    try:
        value = json.loads(text) if text.lstrip().startswith("{") else text
        Quantization.of(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def _add_tune(commands: Any) -> None:
    parser = _add_command(
        commands,
        "tune",
        _tune,
        help="find the best tiles for a model's experts on this GPU",
        description=(
            "Time the MoE kernels with the tiles that can be best on this GPU, and keep the best "
            "ones; models\nwith experts of these sizes use them from then on. It takes about a "
            "minute a layer."
        ),
    )
    parser.add_argument(
        "layer",
        metavar="MODEL_OR_SHAPE",
        help="hub id or folder, or experts,chosen,hidden,intermediate, such as 128,8,2048,768",
    )
    parser.add_argument(
        "--tokens",
        type=_number(int, 2),
        action="append",
        metavar="N",
        help="numbers of tokens to tune for, repeatable (default: 2 to 16384)",
    )
    parser.add_argument("--quantization", choices=TUNED, help="of the weights (default: 16 bit)")
    parser.add_argument("--output", type=Path, help="JSON file instead of the user's table")


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure moezoo on this machine")
    subjects = bench.add_subparsers(title="subjects", required=True, metavar="SUBJECT")
    parser = subjects.add_parser(
        "layer",
        help="the MoE layer, beside what memory and matrix units allow",
        description="Time the MoE layer of released models with random weights; its result is "
        "compared with fp32 before.",
    )
    parser.set_defaults(run=_bench_layer)
    parser.add_argument("--layer", nargs="+", metavar="NAME", help="default: all; on CPU one")
    parser.add_argument("--tokens", nargs="+", type=_number(int, 1), metavar="N")
    parser.add_argument("--dtype", choices=DTYPES[1:], default="bfloat16")
    parser.add_argument("--quantization", choices=MEASURED, help="default: weights in --dtype")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one")
    parser.add_argument("--skewed", action="store_true", help="some experts are popular (Zipf)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        number = kind(text)
        if not low <= number <= high:
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return number

    parse.__name__ = kind.__name__  # argparse names it when kind refuses the text
    return parse


def _generate(arguments: argparse.Namespace) -> int:
    from moezoo.generation.offline import check_options

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
    """In one process, or as the rank that reads and writes all."""
    from moezoo.generation.prompt_files import OutputFile

    with _told(job):
        prompts, problems = _prompts(arguments)
        for problem in problems:
            _say(problem if arguments.strict else f"skipped {problem}")
        if problems and arguments.strict:
            raise ValueError(f"{len(problems)} bad input lines and --strict: nothing was generated")
        if not prompts:
            raise ValueError("there is no prompt to complete")
        # Opened once, so that the fingerprint, the model and the tokenizer are of one commit.
        checkpoint = _open(arguments)
        run = _fingerprint(checkpoint, arguments, options)
        file = None
        if arguments.output is not None:
            file = OutputFile(arguments.output, prompts, run, overwrite=arguments.overwrite)
    finished = {} if file is None else file.finished
    num_finished_before = len(finished)
    pending = [prompt for prompt in prompts if prompt.id not in finished]
    with naming("stdout" if file is None else file.path), file or nullcontext():
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
                        _say(f"prompt {completion.id!r} failed: {completion.error}")

                if job is not None:
                    job.collect(completions, pending, take)
                else:
                    for completion in completions:
                        take(completion)
    num_failed = sum(finished.values())
    if file is not None and not arguments.quiet:
        _say(
            f"{file.path}: {len(finished)} completions, {num_failed} of them failed, "
            f"{num_finished_before} were there before"
        )
    code = PARTLY if num_failed or problems else DONE
    if job is not None:
        (job.end if pending else job.begin)(code)
    return code


@contextmanager
def _told(job: Job | None) -> Iterator[None]:
    """Where the block fails, before there is anything to do, all ranks end with its exit code."""
    try:
        yield
    except (MoEZooError, ValueError, OSError) as error:
        if job is not None:
            job.begin(_code(error))
            job.mesh.leave()
        raise


def _generate_for_rank_0(arguments: argparse.Namespace, options: dict[str, Any], job: Job) -> int:
    arguments.quiet = True
    code = job.begin(None)
    if code is None:
        prompts = job.dealt()
        completions, _ = _completions(_open(arguments), arguments, prompts, options, job)
        job.hand_on(completions)
        code = job.end(None)
    assert code is not None
    return code


def _open(arguments: argparse.Namespace) -> Checkpoint:
    from moezoo.loaders.checkpoint import open_checkpoint

    _quieten_hub(arguments)
    return open_checkpoint(
        _model_id(arguments),
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
    )


def _quieten_hub(arguments: argparse.Namespace) -> None:
    """Keep huggingface_hub from writing each of its attempts to stderr; ours is the last word."""
    from huggingface_hub.utils import logging

    if not arguments.debug:
        logging.set_verbosity_error()


def _sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `GenerationConfig` that the command line sets."""
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


def _prompts(arguments: argparse.Namespace) -> tuple[list[Prompt], list[str]]:
    from moezoo.generation.offline import Prompt
    from moezoo.generation.prompt_files import read_prompts

    if arguments.prompt is not None:
        return [Prompt(id, text) for id, text in enumerate(arguments.prompt, start=1)], []
    if arguments.input == "-":
        return read_prompts(sys.stdin.buffer, "stdin")
    try:
        with open(arguments.input, "rb") as lines:
            return read_prompts(lines, arguments.input)
    except OSError as error:
        raise ValueError(f"--input cannot be read: {error}") from error


def _model_id(arguments: argparse.Namespace) -> str:
    if arguments.model is None:
        from moezoo.assets import tiny_model

        if not arguments.quiet:
            _say("no model given, using the small one inside the package")
        return str(tiny_model())
    return str(arguments.model)


def _fingerprint(
    checkpoint: Checkpoint, arguments: argparse.Namespace, options: dict[str, Any]
) -> str:
    """Short hash of all that decides what a prompt's completion is."""
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
    """Load the model; its completions as they finish, which they do as they are asked for.

    And whether they are printed already, token by token.
    """
    from transformers import TextStreamer

    from moezoo.generation.offline import generate

    model, tokenizer = _model(checkpoint, arguments, job)
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


def _model(
    checkpoint: Checkpoint, arguments: argparse.Namespace, job: Job | None = None
) -> tuple[Any, Any]:
    """Load the model, or this rank's part of it, and its tokenizer."""
    from transformers.utils import logging

    from moezoo.layers.moe import FusedMoE
    from moezoo.loaders.load import from_checkpoint

    if not arguments.debug:
        logging.set_verbosity_error()
    mesh = None if job is None else job.mesh
    with nullcontext() if mesh is None else mesh.together("loading the model"):
        tokenizer = _tokenizer(checkpoint, local_files_only=arguments.local_files_only)
        if arguments.chat and tokenizer.chat_template is None:
            raise ValueError(f"{checkpoint.name} has no chat template: leave --chat out")
        started = time.perf_counter()
        model = from_checkpoint(
            checkpoint,
            dtype=arguments.dtype,
            device=arguments.device if mesh is None else mesh.device,
            quantization=arguments.quantization,
            mesh=mesh,
            progress=not arguments.quiet and sys.stderr.isatty(),
        )
    if not arguments.quiet:
        dtype = str(model.dtype).removeprefix("torch.")
        formats = {
            moe.quantized.name
            for moe in model.modules()
            if isinstance(moe, FusedMoE) and moe.quantized is not None
        }
        if formats:
            dtype += f", experts in {' and '.join(sorted(formats))},"
        seconds = time.perf_counter() - started
        place = str(model.device)
        if mesh is not None and mesh.world_size > 1:
            place = f"{mesh.world_size} ranks ({mesh.device.type})"
        _say(f"loaded {checkpoint.name} as {dtype} on {place} in {seconds:.1f} s")
    return model, tokenizer


def _tokenizer(checkpoint: Checkpoint, *, local_files_only: bool) -> Any:
    from transformers import AutoTokenizer

    from moezoo.errors import CheckpointError

    # Without a vocabulary transformers makes an empty tokenizer, or asks for another package.
    if not any(
        file in VOCABULARIES or file.endswith((".model", ".tiktoken"))
        for file in checkpoint.files.listing()
    ):
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer: none of its files is {', '.join(VOCABULARIES)}, "
            "*.model or *.tiktoken; add the tokenizer's files of the model that it was made of, "
            "as AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes them"
        )
    try:
        # By default transformers asks on the terminal whether to run a checkpoint's code.
        return AutoTokenizer.from_pretrained(
            checkpoint.name,
            revision=checkpoint.revision,
            local_files_only=local_files_only,
            trust_remote_code=False,
        )
    except Exception as error:  # what the tokenizers library raises has no class of its own
        raise CheckpointError(
            f"{checkpoint.name}: its tokenizer cannot be loaded: {error}"
        ) from error


def _prints_text(arguments: argparse.Namespace) -> bool:
    return arguments.output is None and arguments.prompt is not None and len(arguments.prompt) == 1


def _print(arguments: argparse.Namespace, run: str, streamed: bool) -> Callable[[Completion], None]:
    """Print a completion: as a JSON line, or the only one as text unless that has happened."""
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
    """A bar on a terminal, a line every few seconds elsewhere, nothing for a single prompt."""
    from moezoo.tools.progress import Lines, bar

    if arguments.quiet or _prints_text(arguments):
        yield lambda num_tokens: None
    elif sys.stderr.isatty():
        with bar(total, finished) as advance:
            yield advance
    else:
        yield Lines(total, finished, _say).advance


def _inspect(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from moezoo.tools.inspect import inspect

    _quieten_hub(arguments)
    report = inspect(
        arguments.model,
        expert_parallel_size=arguments.expert_parallel,
        placement=arguments.placement,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
    )
    with naming("stdout"):
        if arguments.json:
            print(json.dumps(report.to_dict(), indent=2))
        else:
            Console().print(report)
    return DONE if report.supported else PARTLY


def _convert(arguments: argparse.Namespace) -> int:
    from moezoo.loaders.checkpoint import open_checkpoint
    from moezoo.loaders.convert import convert

    _quieten_hub(arguments)
    checkpoint = open_checkpoint(
        arguments.model,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
    )
    started = time.perf_counter()
    done = convert(
        checkpoint,
        arguments.output,
        quantization=arguments.quantization,
        dtype=arguments.dtype,
        device=arguments.device,
        max_shard_size=arguments.max_shard_size,
        progress=not arguments.quiet and sys.stderr.isatty(),
    )
    if not arguments.quiet:
        seconds = time.perf_counter() - started
        kinds = f"in {' and '.join(done.kinds)}" if done.kinds else "not quantised"
        if done.weight_error is not None:
            kinds += f" (relative error {done.weight_error:.2%})"
        _say(
            f"{arguments.output}: experts {kinds}; {done.bytes_before:,} bytes of weights became "
            f"{done.bytes_after:,} in {seconds:.1f} s"
        )
    return DONE


def _routing(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from moezoo.generation.offline import generate
    from moezoo.tools.routing import record_routing

    _require_folder(arguments, "output", "plot", "html")
    prompts, problems = _prompts(arguments)
    for problem in problems:
        _say(f"skipped {problem}")
    if not prompts:
        raise ValueError("there is no prompt to run")
    model, tokenizer = _model(_open(arguments), arguments)
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
                _say(f"prompt {completion.id!r} failed: {completion.error}")
    if arguments.output is not None:
        with naming(arguments.output):
            trace.save(arguments.output)
    if arguments.html is not None:
        with naming(arguments.html):
            arguments.html.write_text(trace.html(), encoding="utf-8")
    _save_plot(arguments.plot, trace)
    with naming("stdout"):
        if arguments.json:
            print(json.dumps(trace.to_dict(), indent=2))
        elif not arguments.quiet:
            Console().print(trace)
    if not arguments.quiet:
        files = [str(path) for path in (arguments.output, arguments.html, arguments.plot) if path]
        written = f"; written: {', '.join(files)}" if files else ""
        _say(f"{len(prompts) - num_failed} prompts, {num_failed} failed{written}")
    return PARTLY if num_failed or problems else DONE


def _eplb_plan(arguments: argparse.Namespace) -> int:
    from moezoo.tools.balance import plan
    from moezoo.tools.routing import RoutingTrace

    _require_folder(arguments, "output")
    made = plan(
        RoutingTrace.load(arguments.trace),
        arguments.gpus,
        arguments.redundant,
        policy=arguments.policy,
        num_groups=arguments.groups,
        num_nodes=arguments.nodes,
    )
    with naming(arguments.output):
        made.placement.save(arguments.output)
    linear = "" if math.isnan(made.linear) else f"; linear and without copies {made.linear:.3f}"
    _say(f"{arguments.output}: balancedness {made.planned:.3f} for the trace{linear}")
    return DONE


def _eplb_simulate(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from moezoo.tools.balance import compare, history
    from moezoo.tools.simulate import zipf_loads

    _require_folder(arguments, "plot", "json")
    if arguments.trace is not None:
        loads, trace = history(arguments.trace)
        expert_bytes = trace.about.get("expert_bytes")
        source = {"trace": str(arguments.trace), **trace.about}
    else:
        names = ("steps", "layers", "experts", "tokens", "half_life", "seed")
        source = {"zipf": arguments.zipf, **{name: getattr(arguments, name) for name in names}}
        expert_bytes = None
        loads = zipf_loads(
            arguments.steps,
            arguments.layers,
            arguments.experts,
            exponent=arguments.zipf,
            half_life=arguments.half_life,
            tokens=arguments.tokens,
            seed=arguments.seed,
        )
    intervals = arguments.interval or [max(1, len(loads) // 10)]
    comparison = compare(
        loads,
        num_ranks=arguments.gpus,
        num_redundant=arguments.redundant,
        windows=arguments.window,
        intervals=intervals,
        policies=arguments.policy,
        expert_bytes=expert_bytes,
    )
    for reason in comparison.skipped:
        _say(f"left out: {reason}")
    with naming("stdout"):
        Console().print(comparison)
    _save_plot(arguments.plot, comparison)
    if arguments.json is not None:
        with naming(arguments.json):
            record = {"loads": source, **comparison.to_dict()}
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return DONE


def _require_folder(arguments: argparse.Namespace, *options: str) -> None:
    """What is wrong should be said before minutes are spent."""
    for option in options:
        path = getattr(arguments, option)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"--{option} {path}: there is no folder {path.parent}")
    if getattr(arguments, "plot", None) is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError("--plot needs matplotlib: pip install 'moezoo[plots]'") from None


def _save_plot(path: Path | None, subject: Any) -> None:
    if path is not None:
        with naming(path):
            subject.plot().savefig(path)


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA device, and torch finds none")
    from moezoo.layers.kernels.tiles import user_table
    from moezoo.tools.tune import TOKENS, check, read_entries, save, tune

    device = torch.device("cuda", torch.cuda.current_device())
    layer = _layer(arguments)
    path = arguments.output or user_table(device)
    # What is wrong should be said before minutes are spent.
    check(layer, device, arguments.quantization)
    read_entries(path)
    entry = tune(
        layer,
        tokens=arguments.tokens or TOKENS,
        quantization=arguments.quantization,
        report=_say,
    )
    _say(f"written to {save([entry], path)}")
    return DONE


def _layer(arguments: argparse.Namespace) -> Any:
    from moezoo.tools.layer import Layer

    sizes = arguments.layer.split(",")
    if all(size.strip().isdecimal() for size in sizes):
        numbers = [int(size) for size in sizes]
        if len(numbers) != 4 or min(numbers) < 1 or numbers[1] > numbers[0]:
            raise ValueError(
                "a shape is experts,chosen,hidden,intermediate, none of them 0 and no more chosen "
                f"than experts, such as 128,8,2048,768, got {arguments.layer!r}"
            )
        return Layer(*numbers)
    from moezoo.tools.inspect import inspect

    _quieten_hub(arguments)
    report = inspect(
        arguments.layer,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
    )
    if report.experts is None or report.hidden_size is None:
        raise ValueError(f"{arguments.layer}: {report.reason or 'no experts found'}")
    experts = report.experts
    sizes_ = (experts.num_experts, experts.per_token, report.hidden_size)
    return Layer(*sizes_, experts.intermediate_size)


def _bench_layer(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from moezoo.tools.layer import bench

    _require_folder(arguments, "json")
    report = bench(
        arguments.layer,
        arguments.tokens,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        device=arguments.device,
        skewed=arguments.skewed,
        progress=lambda cell: _say(f"{cell.layer}, {cell.num_tokens} tokens: done"),
    )
    with naming("stdout"):
        Console().print(report)
    if arguments.json is not None:
        with naming(arguments.json):
            arguments.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return FAILED if report.skipped or any(cell.skipped for cell in report.cells) else DONE
