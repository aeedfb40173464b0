"""transformers' own model with experts_implementation="moezoo" and with its own implementations.

    python benchmarks/in_transformers.py [--case qwen3-30b-a3b] [--layers 48] [--compile]

One model in memory, random weights, whose implementation is switched. Three things are timed:

* step: a decode step over a static cache, the token chosen included, captured by hand in a CUDA
  graph (on a CPU there is no graph); --compile adds the step under torch.compile at batch 1, whose
  first calls take minutes;
* prefill: the prompt of one sequence, in one pass;
* generate: transformers' `generate`, prefill included. "default" is what transformers does unasked:
  grouped_mm for the prompt and batched_mm for the tokens after it. "grouped_mm" runs it for both,
  under another name, since `generate` would replace it.

In each row, the logits of the last position are compared with those of "eager" before anything is
timed. Roofline: the bytes that a step has to read, the experts that the batch hits counted, over
the read bandwidth measured in the same run. What fails is skipped by name with the reason, and the
results are written after each row.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CASES, TOLERANCE, in_transformers
from machine import describe, read_bandwidth, synchronize, write_result
from rich.console import Console
from rich.table import Table
from subject import forward, greedy
from torch import Tensor, nn
from transformers import StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moezoo
from moezoo.tools.layer_inputs import WrongResultError

DEFAULT_CASE = {"cpu": "tiny-qwen3-moe", "cuda": "qwen3-30b-a3b"}
CONTENDERS = {
    "step": ("batched_mm", "grouped_mm", "moezoo"),
    "compiled step": ("grouped_mm", "moezoo"),
    "prefill": ("eager", "batched_mm", "grouped_mm", "moezoo"),
    "generate": ("default", "grouped_mm", "moezoo"),
}
KEPT = "grouped_mm_kept"
IMPLEMENTATION = {"default": "grouped_mm", "grouped_mm": KEPT}
"""Contender -> the implementation set in transformers, where it has another name."""
WARM_UP = 3

Run = Callable[[], object]


def say(message: str) -> None:
    print(f"in_transformers: {message}", file=sys.stderr, flush=True)


def use(model: nn.Module, contender: str) -> None:
    model.set_experts_implementation(IMPLEMENTATION.get(contender, contender))


@torch.no_grad()
def last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits [B, V] of the tokens after `ids` [B, T]."""
    return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def step_bytes(model: nn.Module, ids: Tensor) -> int:
    """Return the bytes of weights that one decode step of the batch `ids` [B, T] reads.

    `model` is transformers', whose decorator marks the modules that hold stacked experts.
    """
    layers = [module for module in model.modules() if hasattr(module, "is_transposed")]
    stacked = {layer: sum(p.nbytes for p in layer.parameters()) for layer in layers}
    hit = 0

    def count(experts: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal hit
        hit += len(args[1].unique()) * stacked[experts] // experts.num_experts

    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        hooks = [layer.register_forward_pre_hook(count) for layer in layers]
        model(ids[:, -1:], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    tied = model.config.tie_word_embeddings
    embedding = 0 if tied else model.get_input_embeddings().weight.nbytes
    return sum(p.nbytes for p in model.parameters()) - sum(stacked.values()) - embedding + hit


class Check:
    """A check of logits [B, V] against those of eager experts, in the model's own dtype."""

    def __init__(self, model: nn.Module, ids: Tensor, tolerance: float) -> None:
        use(model, "eager")
        self.expected = last_logits(model, ids).double()
        self.tolerance = tolerance
        self.difference = 0.0

    def __call__(self, logits: Tensor) -> None:
        difference = (logits.double() - self.expected).norm() / self.expected.norm()
        self.difference = difference.item()
        if not self.difference <= self.tolerance:
            raise WrongResultError(
                f"logits are {self.difference:.1e} away from eager's, allowed is {self.tolerance:g}"
            )


class StaticDecoder:
    """Greedy decoding over a static cache, of a batch `ids` [B, T]; the last column is step 1's."""

    def __init__(self, model: nn.Module, ids: Tensor, num_steps: int) -> None:
        self.forward = model
        self.model, self.ids = model, ids
        self.token = ids[:, -1:].clone()
        self.cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + num_steps)

    @torch.no_grad()
    def start(self) -> None:
        self.cache.reset()
        self.model(self.ids[:, :-1], past_key_values=self.cache, logits_to_keep=1)
        self.token.copy_(self.ids[:, -1:])

    @torch.no_grad()
    def step(self) -> Tensor:
        """Run a step: return its logits [B, V] and choose the next token."""
        logits = self.forward(self.token, past_key_values=self.cache).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def captured(self) -> Callable[[], Tensor]:
        """Return the step as one CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def steps(
    model: nn.Module, ids: Tensor, check: Check, args: argparse.Namespace, *, how: str
) -> Run:
    num_steps = max(WARM_UP, 1 + args.new_tokens * args.repeats)
    decoder = StaticDecoder(model, ids, num_steps)
    if how == "compiled step":
        decoder.forward = torch.compile(model, mode="reduce-overhead")
    decoder.start()
    for _ in range(WARM_UP):
        decoder.step()
    step = decoder.captured() if how == "step" and ids.is_cuda else decoder.step
    decoder.start()
    check(step())

    def run() -> None:
        for _ in range(args.new_tokens):
            step()

    return run


def prompt(model: nn.Module, ids: Tensor, check: Check) -> Run:
    check(last_logits(model, ids))
    run = forward(model, ids)
    run()
    return run


def generation(model: nn.Module, ids: Tensor, check: Check, args: argparse.Namespace) -> Run:
    check(last_logits(model, ids))
    greedy(model, ids, 2)()
    return greedy(model, ids, args.new_tokens)


def timings(run: Run, device: torch.device, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of up to args.repeats runs, until they have taken args.cell seconds."""
    seconds: list[float] = []
    while len(seconds) < args.repeats and sum(seconds) < args.cell:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "runs": len(seconds),
    }


def prepare(
    phase: str, model: nn.Module, ids: Tensor, check: Check, args: argparse.Namespace
) -> Run:
    """Return the call to time, warmed up and with its logits checked."""
    if phase == "prefill":
        return prompt(model, ids, check)
    if phase == "generate":
        return generation(model, ids, check, args)
    return steps(model, ids, check, args, how=phase)


def measure(phase: str, model: nn.Module, ids: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a batch `ids` [B, T]."""
    row: dict[str, Any] = {"phase": phase, "batch": len(ids), "prompt_tokens": ids.shape[1]}
    row |= {"seconds": {}, "tokens_per_second": {}, "logit_difference": {}, "skipped": {}}
    tokens = ids.numel() if phase == "prefill" else len(ids) * args.new_tokens
    check = None
    for name in CONTENDERS[phase]:
        run = None
        try:
            check = check or Check(model, ids, TOLERANCE[args.dtype])
            use(model, name)
            run = prepare(phase, model, ids, check, args)
            row["logit_difference"][name] = check.difference
            row["seconds"][name] = taken = timings(run, ids.device, args)
            row["tokens_per_second"][name] = speed = tokens / taken["median"]
            spread = ", ".join(f"{key} {1e3 * taken[key]:.1f}" for key in ("median", "min", "max"))
            say(f"{phase}, {shape(row)}: {name} {speed:.1f} tokens/s ({spread} ms)")
        except Exception as error:  # one must not take the others with it
            reason = str(error).strip().split("\n")[0][:200]
            row["skipped"][name] = f"{type(error).__name__}: {reason}"
            say(f"{phase}, {shape(row)}: {name} skipped: {row['skipped'][name]}")
        del run
        if phase == "compiled step":
            torch.compiler.reset()
        gc.collect()
        if ids.is_cuda:
            torch.cuda.empty_cache()
    speeds = dict(row["tokens_per_second"])
    ours = speeds.pop("moezoo", None)
    if ours and speeds:
        row["times_best_other"] = ours / max(speeds.values())
    return row


def shape(row: dict[str, Any]) -> str:
    return f"batch {row['batch']}, {row['prompt_tokens']} tokens"


def rows(model: nn.Module, args: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Yield the rows, those that take longest last."""

    def draw(batch: int, num_tokens: int) -> Tensor:
        shape = (batch, num_tokens)
        return torch.randint(1, model.config.vocab_size, shape, device=args.device)

    work = [("step", batch, args.prompt) for batch in args.batch]
    work += [("prefill", 1, num_tokens) for num_tokens in args.prefill]
    work += [("generate", batch, args.prompt) for batch in args.batch]
    work += [("compiled step", 1, args.prompt)] if args.compile else []
    for phase, batch, num_tokens in work:
        ids = draw(batch, num_tokens)
        row = measure(phase, model, ids, args)
        if phase != "prefill":
            try:
                use(model, "grouped_mm")
                nbytes = step_bytes(model, ids)
            except torch.OutOfMemoryError as error:
                row["skipped"]["roofline"] = str(error).split("\n")[0]
            else:
                row["step_bytes"] = nbytes
                row["roofline_tokens_per_second"] = batch * bandwidth / nbytes
        yield row


def table(measured: list[dict[str, Any]], title: str) -> Table:
    shown = Table(title=title)
    names = ("default", "eager", "batched_mm", "grouped_mm", "moezoo")
    for column in ("", "batch", "prompt", "unit", *names, "times best other", "of roofline"):
        shown.add_column(column, justify="right" if column else "left")
    for row in measured:
        prefilled = row["phase"] == "prefill"
        cells = []
        for name in names:
            if name in row["seconds"] and prefilled:
                cells.append(f"{1e3 * row['seconds'][name]['median']:.1f}")
            elif name in row["seconds"]:
                cells.append(f"{row['tokens_per_second'][name]:.1f}")
            else:
                cells.append("skipped" if name in row["skipped"] else "")
        ratio, ours = row.get("times_best_other"), row["tokens_per_second"].get("moezoo")
        roofline = row.get("roofline_tokens_per_second")
        shown.add_row(
            *(row["phase"], str(row["batch"]), str(row["prompt_tokens"])),
            *("ms" if prefilled else "tokens/s", *cells),
            f"{ratio:.2f}" if ratio else "",
            f"{ours / roofline:.0%}" if ours and roofline else "",
        )
    return shown


def write(model: nn.Module, measured: list[dict[str, Any]], content: dict[str, Any]) -> Path:
    content = content | {"layers": model.config.num_hidden_layers, "rows": measured}
    return write_result("in_transformers", model.device, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", choices=CASES, help="default: by device")
    parser.add_argument("--layers", type=int, help="default: all of the case")
    parser.add_argument("--dtype", default="bfloat16", choices=TOLERANCE)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens before decoding")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cell", type=float, default=5, metavar="SECONDS", help="no further repeat after so long"
    )
    parser.add_argument("--compile", action="store_true", help="also the step under torch.compile")
    args = parser.parse_args()
    start = time.perf_counter()
    case = args.case or DEFAULT_CASE[torch.device(args.device).type]
    config = CASES[case]()
    if args.layers:
        config.num_hidden_layers = args.layers
    torch.manual_seed(0)
    bandwidth = read_bandwidth(args.device)
    # Both models share their memory; only transformers' is run.
    model = in_transformers(
        moezoo.from_config(config, dtype=getattr(torch, args.dtype), device=args.device)
    )
    ALL_EXPERTS_FUNCTIONS.register(KEPT, ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    say(f"{case} of {config.num_hidden_layers} layers after {time.perf_counter() - start:.0f} s")
    content = {"case": case, "dtype": args.dtype, "new_tokens": args.new_tokens}
    content |= {"read_bytes_per_second": bandwidth, "tolerance": TOLERANCE[args.dtype]}
    measured: list[dict[str, Any]] = []
    for row in rows(model, args, bandwidth):
        measured.append(row)
        seconds = time.perf_counter() - start
        path = write(model, measured, content | {"seconds": seconds})
        say(f"{row['phase']}, {shape(row)} done after {seconds:.0f} s")
    device = describe(args.device)["device"]
    title = f"{case}, {args.dtype}, {device}, {bandwidth / 1e9:.0f} GB/s read"
    Console(width=150).print(table(measured, title))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
