"""What a model needs on several GPUs, by arithmetic from its config: memory, wire, and what bounds.

    python benchmarks/plan_parallel.py [MODEL] [--gpus 8 32 320] [--redundant 0 32 64]

MODEL is a hub id or a folder; a config.json is enough (default: DeepSeek-V3's, in benchmarks/data).
Attention, dense layers and shared experts are on every GPU and work on the GPU's own tokens; their
linear layers are in the format that --dense names, as far as moezoo keeps them so, embeddings, head
and router in the model's dtype. Experts are divided, in the format that --experts names. Tokens are
split over the GPUs (`all_to_all`). Routing is taken as uniform, so replicas and placement are taken
as perfect: divide rates by the balancedness that `moezoo eplb simulate` finds.

Legend: T tokens of a GPU, K experts per token, H hidden, I expert intermediate, R GPUs, P slots.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import comb, prod
from pathlib import Path

import torch

from moezoo import registry
from moezoo.loaders.checkpoint import open_config
from moezoo.loaders.config import transformers_config
from moezoo.loaders.linears import linears_of
from moezoo.loaders.mapping import parameter_infos
from moezoo.tools.inspect import EXPERTS_AS, inspect, matrix_bytes
from moezoo.tools.report import Report

DEEPSEEK_V3 = Path(__file__).parent / "data" / "deepseek-v3"
BYTES_ON_THE_WIRE = {"bf16": 2.0, "fp8": 1 + 4 / 128}
"""Bytes per number of a token, its share of the fp32 scale of a group of 128 included."""


@dataclass(frozen=True)
class Machine:
    """One GPU and its links; by default an H100 as measured here, with its links' nominal rates.

    3.03 TB/s is what copies reach, 690 TFLOP/s what moezoo's fp8 experts of DeepSeek-V3 reach at
    16,384 tokens (benchmarks/results/layer_fp8_w8a8_nvidia_h100_80gb_hbm3.json).
    """

    memory: float = 80e9
    read_rate: float = 3.03e12
    flop_rate: float = 690e12
    nvlink_rate: float = 450e9
    """Bytes per second in one direction between the GPUs of a node."""
    network_rate: float = 50e9
    """Bytes per second in one direction between nodes, of one GPU: 400 Gbit/s."""
    node_gpus: int = 8


@dataclass(frozen=True)
class Deployment:
    """A model on R GPUs, with `redundant` copies of experts."""

    report: Report
    gpus: int
    redundant: int
    dense_bytes: int
    """Bytes of all weights except routed experts."""
    experts: str = "fp8_w8a8"
    dispatched: str = "fp8"
    """Format in which tokens are sent to experts; their outputs come back in bf16."""
    machine: Machine = Machine()

    @property
    def slots(self) -> int:
        """Return the number of slots per GPU and layer."""
        assert self.report.experts is not None
        return -(-(self.report.experts.num_experts + self.redundant) // self.gpus)

    @property
    def expert_bytes(self) -> int:
        return expert_bytes(self.report, self.experts)

    @property
    def rank_expert_bytes(self) -> int:
        return self.slots * self.expert_bytes * (self.report.num_moe_layers or 0)

    @property
    def cached_tokens(self) -> float:
        """Return how many tokens' keys and values fit in the memory that weights leave on a GPU."""
        left = self.machine.memory - self.rank_expert_bytes - self.dense_bytes
        return left / (self.report.kv_cache_bytes_per_token or 1)

    def ranks_of_token(self) -> tuple[float, float]:
        """Return how many other GPUs a token is sent to: in its node, and in other nodes."""
        assert self.report.experts is not None
        total = self.slots * self.gpus
        k = self.report.experts.per_token
        missed = comb(total - self.slots, k) / comb(total, k)
        in_node = min(self.machine.node_gpus, self.gpus)
        return (1 - missed) * (in_node - 1), (1 - missed) * (self.gpus - in_node)

    def wire_bytes(self, tokens: int) -> tuple[float, float]:
        """Return the bytes that a GPU sends in a layer, with outputs: in its node and to others.

        A token is sent once to each GPU that has experts of it, with their ids and weights.
        """
        assert self.report.experts is not None and self.report.hidden_size is not None
        row = self.report.hidden_size * (BYTES_ON_THE_WIRE[self.dispatched] + 2)
        row += 8 * self.report.experts.per_token
        near, far = self.ranks_of_token()
        return tokens * near * row, tokens * far * row

    def experts_hit(self, tokens: int) -> float:
        """Return how many of a GPU's slots in a layer get a token of any GPU."""
        assert self.report.experts is not None
        share = self.report.experts.per_token / (self.slots * self.gpus)
        return self.slots * (1 - (1 - share) ** (tokens * self.gpus))

    def seconds(self, tokens: int) -> dict[str, float]:
        """Return the seconds of each part of an MoE layer by itself, for T tokens of each GPU.

        NVLink and network work at the same time.
        """
        experts = self.report.experts
        assert experts is not None and self.report.hidden_size is not None
        flop = 6 * self.report.hidden_size * experts.intermediate_size
        near, far = self.wire_bytes(tokens)
        machine = self.machine
        return {
            "reading experts": self.experts_hit(tokens) * self.expert_bytes / machine.read_rate,
            "products": tokens * experts.per_token * flop / machine.flop_rate,
            "NVLink": near / machine.nvlink_rate,
            "network": far / machine.network_rate,
        }

    def dense_seconds(self) -> float:
        """Return the seconds to read, in a step, the weights that every GPU has."""
        embedding = 2 * (self.report.vocab_size or 0) * (self.report.hidden_size or 0)
        return (self.dense_bytes - embedding) / self.machine.read_rate


def dense_bytes(model: str | Path, name: str) -> int:
    """Return the bytes of all weights except routed experts, with linear layers in a format."""
    config = transformers_config(open_config(model))
    with torch.device("meta"):
        decoder = registry.build(config)
    linears = linears_of(decoder).keys() - {"lm_head.weight"}
    total = 0
    for parameter, info in parameter_infos(decoder, torch.bfloat16).items():
        if parameter.endswith((".w13", ".w2")):
            continue
        stored = matrix_bytes(name, *info.shape) if parameter in linears else None
        total += prod(info.shape) * info.dtype.itemsize if stored is None else stored
    return total


def expert_bytes(report: Report, name: str) -> int:
    """Return the bytes of one expert in a format; raise ValueError if the format cannot hold it."""
    assert report.experts is not None and report.hidden_size is not None
    sizes = report.experts.intermediate_size, report.hidden_size
    gate_or_up, down = matrix_bytes(name, *sizes), matrix_bytes(name, *sizes[::-1])
    if gate_or_up is None or down is None:
        raise ValueError(f"{name} does not fit experts of {sizes[0]} x {sizes[1]}")
    return 2 * gate_or_up + down


def memory_table(deployments: list[Deployment]) -> Iterator[str]:
    yield "| GPUs | redundant | experts a GPU and layer | their bytes | all the rest | together |"
    yield "|---|---|---|---|---|---|"
    for it in deployments:
        held = it.rank_expert_bytes, it.dense_bytes, it.rank_expert_bytes + it.dense_bytes
        cells = [str(it.gpus), str(it.redundant), str(it.slots)]
        yield _row(*cells, *(f"{nbytes / 1e9:.1f} GB" for nbytes in held))


def cache_table(deployments: list[Deployment], memories: list[float]) -> Iterator[str]:
    yield _row("GPUs", *(f"of {memory / 1e9:.0f} GB" for memory in memories))
    yield "|---|" + "---|" * len(memories)
    for it in deployments:
        room = [replace(it, machine=Machine(memory)).cached_tokens for memory in memories]
        yield _row(str(it.gpus), *(f"{n:,.0f}" if n > 0 else "does not fit" for n in room))


def layer_table(deployments: list[Deployment], tokens: int) -> Iterator[str]:
    yield (
        "| GPUs | sent to | within the node | between nodes | reading experts | products | NVLink "
        "| network | bound by | all MoE layers |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for it in deployments:
        near, far = it.wire_bytes(tokens)
        taken = it.seconds(tokens)
        bound = max(taken, key=taken.__getitem__)
        whole = taken[bound] * (it.report.num_moe_layers or 0)
        yield _row(
            str(it.gpus),
            f"{sum(it.ranks_of_token()):.1f} GPUs",
            f"{near / 1e6:.2f} MB",
            f"{far / 1e6:.2f} MB",
            *(f"{seconds * 1e6:,.0f} us" for seconds in taken.values()),
            bound,
            f"{whole * 1e3:.1f} ms",
        )


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def page(deployments: list[Deployment], decode: int, prefill: int) -> str:
    """Return the tables of docs/parallel.md."""
    memories = [80e9, 141e9]
    lines = [
        "Memory of a GPU:",
        "",
        *memory_table(deployments),
        "",
        "Tokens of KV cache that a GPU has room for beside them:",
        "",
        *cache_table(deployments, memories),
        "",
        f"A MoE layer in a step of decoding, {decode} tokens a GPU:",
        "",
        *layer_table(deployments, decode),
        "",
        f"A MoE layer over prompts, {prefill:,} tokens a GPU:",
        "",
        *layer_table(deployments, prefill),
        "",
        "Every step reads the weights that each GPU has for itself as well: "
        f"{deployments[0].dense_seconds() * 1e3:.1f} ms.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEEPSEEK_V3)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 32, 320])
    parser.add_argument("--redundant", type=int, nargs="+", default=[0, 32, 64])
    parser.add_argument("--experts", choices=EXPERTS_AS, default="fp8_w8a8")
    parser.add_argument("--dense", choices=EXPERTS_AS, default="fp8_w8a8")
    parser.add_argument("--dispatched", choices=BYTES_ON_THE_WIRE, default="fp8")
    parser.add_argument("--decode", type=int, default=64, help="tokens of a GPU in a step")
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of a GPU in a pass")
    arguments = parser.parse_args()
    if len(arguments.gpus) != len(arguments.redundant):
        parser.error("--redundant takes a number for each of --gpus")
    report = inspect(arguments.model)
    if report.experts is None:
        parser.error(f"{arguments.model}: {report.reason or 'it has no experts'}")
    dense = dense_bytes(arguments.model, arguments.dense)
    deployments = [
        Deployment(report, gpus, redundant, dense, arguments.experts, arguments.dispatched)
        for gpus, redundant in zip(arguments.gpus, arguments.redundant, strict=True)
    ]
    print(page(deployments, arguments.decode, arguments.prefill), end="")


if __name__ == "__main__":
    main()
