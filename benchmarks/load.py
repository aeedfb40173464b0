"""How long from_pretrained takes, beside transformers' and beside a plain copy of the same bytes.

    python benchmarks/load.py --folder /tmp/load [--layers 4] [--device cpu] [--repeats 5]

A synthetic Qwen3-MoE checkpoint in the hub's per-expert layout (experts as in Qwen3-30B-A3B; about
4.7 GiB with 4 layers) is written to the folder unless it is there, and loaded in fresh processes,
its files in the page cache. Imports are not timed. "copy" reads the files with threads into one
buffer that exists and has been written to before: the least that any loader does; "copy, fresh
memory" has to get its memory from the system as a loader has to. Extra memory is the peak of
anonymous resident memory less what there was before and less the weights.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from machine import device_name, write_result

CHUNK = 16 << 20
CONTENDERS = ("copy", "copy, fresh memory", "moezoo", "transformers")


def write_checkpoint(
    folder: Path, layers: int, *, num_experts: int = 128, part: tuple[int, int] = (0, 1)
) -> None:
    """Write the checkpoint, one shard per layer.

    Weights are random, since a page of zeros may cost nothing to copy. Of n processes, process i
    writes part (i, n) of the shards; the first also writes all that is not weights.
    """
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=num_experts,
        num_experts_per_tok=8,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )
    hidden, inner, head = config.hidden_size, config.moe_intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate.weight": (config.num_experts, hidden),
    }
    for e in range(config.num_experts):
        layer[f"mlp.experts.{e}.gate_proj.weight"] = (inner, hidden)
        layer[f"mlp.experts.{e}.up_proj.weight"] = (inner, hidden)
        layer[f"mlp.experts.{e}.down_proj.weight"] = (hidden, inner)
    shards = [
        {f"model.layers.{n}.{name}": shape for name, shape in layer.items()} for n in range(layers)
    ]
    shards[0]["model.embed_tokens.weight"] = (config.vocab_size, hidden)
    shards[-1]["model.norm.weight"] = (hidden,)
    shards[-1]["lm_head.weight"] = (config.vocab_size, hidden)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    for n, shapes in enumerate(shards, start=1):
        file = f"model-{n:05}-of-{layers:05}.safetensors"
        total += sum(2 * math.prod(shape) for shape in shapes.values())
        weight_map.update(dict.fromkeys(shapes, file))
        if n % part[1] == part[0]:
            tensors = {name: random_weight(shape) for name, shape in shapes.items()}
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if part[0]:
        return
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def random_weight(shape: tuple[int, ...]) -> torch.Tensor:
    """Return bf16 of random signs and mantissas and one exponent: quicker than a normal draw."""
    bits = torch.randint(-(2**63), 2**63 - 1, (math.prod(shape) // 4,))
    bits &= 0x807F807F807F807F - 2**64
    bits |= 0x3C803C803C803C80
    return bits.view(torch.bfloat16).view(shape)


def read_files(files: list[Path], buffer: torch.Tensor) -> None:
    """Read every byte of the files into `buffer`, one file after another."""
    jobs = []
    start = 0
    for path in files:
        size = path.stat().st_size
        descriptor = os.open(path, os.O_RDONLY)
        for offset in range(0, size, CHUNK):
            end = min(offset + CHUNK, size)
            jobs.append((descriptor, offset, buffer[start + offset : start + end].numpy()))
        start += size
    with ThreadPoolExecutor(4) as pool:
        for done in pool.map(lambda job: os.preadv(job[0], [job[2]], job[1]) == len(job[2]), jobs):
            assert done
    for descriptor in {job[0] for job in jobs}:
        os.close(descriptor)


def prepare(contender: str, folder: Path, device: str) -> Callable[[], object]:
    """Return the call to time, after untimed imports and the allocation of the copy's buffer."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    if contender == "moezoo":
        from moezoo import registry
        from moezoo.loaders.load import from_pretrained

        registry.architecture("qwen3_moe")  # imported on first use, as transformers' models are
        return lambda: from_pretrained(folder, device=device, progress=False)
    if contender == "transformers":
        from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM, logging

        assert Qwen3MoeForCausalLM is not None
        logging.disable_progress_bar()
        return lambda: AutoModelForCausalLM.from_pretrained(folder, device_map=device)
    pinned = device != "cpu"
    if contender == "copy, fresh memory":
        return lambda: read_files(files, torch.empty(size, dtype=torch.uint8))
    buffer = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    if not pinned:
        return lambda: read_files(files, buffer)
    on_gpu = torch.ones(size, dtype=torch.uint8, device=device)

    def copy() -> None:
        read_files(files, buffer)
        on_gpu.copy_(buffer)

    return copy


def anonymous_memory() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(contender: str, folder: Path, device: str) -> dict[str, float]:
    """Measure once; this runs in a process of its own."""
    call = prepare(contender, folder, device)
    if device != "cpu":
        torch.ones(1, device=device)
    before = peak = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    weights = 0
    if device == "cpu" and isinstance(result, torch.nn.Module):
        weights = sum(parameter.nbytes for parameter in result.parameters())
    return {
        "seconds": seconds,
        "extra_bytes": max(0, max(peak, anonymous_memory()) - before - weights),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the checkpoint is written"
    )
    parser.add_argument("--layers", type=int, default=4, help="1.17 GiB each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder, args.device)))
        return
    if not (args.folder / "config.json").exists():
        write_checkpoint(args.folder, args.layers)
    runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
    for _ in range(args.repeats):
        for contender in CONTENDERS:
            for path in args.folder.glob("*.safetensors"):
                with open(path, "rb", buffering=0) as file:
                    while file.read(CHUNK):
                        pass
            command = [sys.executable, __file__, "--folder", str(args.folder)]
            command += ["--device", args.device, "--measure", contender]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[contender].append(json.loads(output.splitlines()[-1]))
    report(runs, args)


def report(runs: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    size = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    medians = {name: statistics.median(run["seconds"] for run in runs[name]) for name in runs}
    table = Table(title=f"loading {size / 2**30:.2f} GiB to {device_name(args.device)}")
    for column in ("", "median s", "min", "max", "GiB/s", "of the copy", "extra MB"):
        table.add_column(column, justify="right" if column else "left")
    rows = {}
    for name, measured in runs.items():
        seconds = [run["seconds"] for run in measured]
        rows[name] = {
            "median_seconds": medians[name],
            "min_seconds": min(seconds),
            "max_seconds": max(seconds),
            "times_copy": medians[name] / medians["copy"],
            "times_copy_fresh_memory": medians[name] / medians["copy, fresh memory"],
            "peak_extra_anonymous_bytes": max(run["extra_bytes"] for run in measured),
        }
        table.add_row(
            name,
            f"{medians[name]:.2f}",
            f"{min(seconds):.2f}",
            f"{max(seconds):.2f}",
            f"{size / 2**30 / medians[name]:.1f}",
            f"{rows[name]['times_copy']:.2f}x",
            f"{rows[name]['peak_extra_anonymous_bytes'] / 1e6:.0f}" if "copy" not in name else "",
        )
    Console().print(table)
    speedup = medians["transformers"] / medians["moezoo"]
    print(f"moezoo is {speedup:.1f} times as fast as transformers")
    content = {
        "layers": args.layers,
        "bytes": size,
        "repeats": args.repeats,
        "transformers_over_moezoo": speedup,
        "contenders": rows,
    }
    print(f"written to {write_result('load', args.device, content)}")


if __name__ == "__main__":
    main()
