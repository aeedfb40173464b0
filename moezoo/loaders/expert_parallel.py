"""Divide a model without weights over ranks: each keeps its own experts, and all agree on what they
load."""

import json
from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from moezoo.layers.decoder import Decoder
from moezoo.layers.quant import Format
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.experts import experts_of
from moezoo.loaders.quantization import Quantization
from moezoo.loaders.weights import Planned
from moezoo.parallel.eplb.options import EPLB
from moezoo.parallel.mesh import Mesh, Parallel, join
from moezoo.parallel.peers import peers_of
from moezoo.parallel.sharding import check_wire, shard_, slots_of
from moezoo.parallel.slots import Slots


def joined(parallel: Parallel | None, device: torch.device | str | None) -> Mesh | None:
    """Join this process to those that share the experts; None where nothing is divided."""
    if parallel is None:
        return None
    if not isinstance(parallel, Parallel):
        raise ValueError(f"parallel is {parallel!r}, expected a moezoo.Parallel or None")
    return join(parallel, device)


def eplb_of(eplb: Mapping[str, object] | EPLB | None, parallel: Parallel | None) -> EPLB | None:
    """Return the options of load balancing; raises `ValueError` where experts are not divided."""
    balance = EPLB.of(eplb)
    if balance is not None and parallel is None:
        raise ValueError(
            f"eplb={eplb!r} is for experts that are divided over ranks: give parallel too, such as "
            "moezoo.Parallel(expert_parallel_size=8)"
        )
    return balance


def sharded(
    decoder: Decoder,
    mesh: Mesh,
    config: PreTrainedConfig,
    asked: Quantization | None,
    balance: EPLB | None,
) -> Slots:
    """Leave only this rank's experts in a decoder on meta, and return all ranks' slots."""
    fields = json.loads(config.to_json_string(use_diff=False))
    fields.pop("_name_or_path", None)  # a folder may be another on each host
    mesh.agree(
        {f"config.{name}": value for name, value in fields.items()}
        | {
            "quantization": asked,
            "eplb": balance and repr(replace(balance, placement=None)),
        }
    )
    slots = slots_of(decoder, mesh, balance)
    shard_(decoder, mesh, slots)
    decoder.peers = peers_of(decoder, mesh)
    return slots


def expert_groups(decoder: Decoder) -> int:
    """Return the number of groups of experts that routers choose first, 1 where they do not."""
    return min(moe.router.keywords.get("num_groups", 1) for moe in decoder.moe_layers.values())


def check_planned(mesh: Mesh, decoder: Decoder, planned: Planned) -> None:
    """Raise `ValueError` where the way tokens are sent does not fit the formats of the experts."""
    check_wire(mesh, formats(decoder, planned.quantized))


def formats(decoder: Decoder, quantized: Mapping[str, Kind]) -> set[type[Format] | None]:
    """Return the formats of this rank's experts, None standing for not quantised."""
    held = (name for name, layer in experts_of(decoder).items() if layer.w2.shape[0])
    return {quantized[name].format if name in quantized else None for name in held}


def union_over_ranks(mesh: Mesh, names: set[str]) -> set[str]:
    """Return the union of the names that the ranks give."""
    told = mesh.watch.exchange("comparing the experts", json.dumps(sorted(names)), patient=True)
    return set().union(*map(json.loads, told))
