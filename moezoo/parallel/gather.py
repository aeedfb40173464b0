"""Gathers the experts of all ranks on the job's first rank, layer by layer, for saving.

Legend: E experts, R ranks of an expert group.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moezoo.layers.decoder import Decoder
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import QuantizedWeights
from moezoo.parallel.eplb.balancer import Balancer
from moezoo.parallel.mesh import Mesh

SAVING = "saving the model"
_OF_EXPERTS = ("w13", "w2", "bias13", "bias2")
"""Names of the tensors of a `FusedMoE` with a row for each expert."""


def check_formats(decoder: Decoder, mesh: Mesh) -> None:
    """Raise ValueError, on every rank, where a rank does not know the format of others' experts."""
    layers = decoder.moe_layers.values()
    own = [None if moe.quantized is None else moe.quantized.name for moe in layers]
    for rank, theirs in enumerate(map(json.loads, mesh.watch.exchange(SAVING, json.dumps(own)))):
        if theirs != own:
            without = mesh.rank if any(moe.w2.shape[0] == 0 for moe in layers) else rank
            raise ValueError(
                f"rank {without} has no experts in some layers, and does not know how those of "
                "others are quantised: save from fewer ranks, or use moezoo convert"
            )


@contextmanager
def whole_on_meta(decoder: Decoder) -> Iterator[None]:
    """Replace, in the block, each MoE layer's own experts by those of all ranks, on meta."""
    held = [
        (moe, name, own)
        for moe in decoder.moe_layers.values()
        for name in _OF_EXPERTS
        if (own := getattr(moe, name)) is not None
    ]
    try:
        for moe, name, own in held:
            setattr(moe, name, _whole(own, moe.num_experts))
        yield
    finally:
        for moe, name, own in held:
            setattr(moe, name, own)


def _whole(own: nn.Parameter | QuantizedWeights, num_experts: int) -> nn.Module | nn.Parameter:
    def blank(tensor: Tensor) -> Tensor:
        return torch.empty(num_experts, *tensor.shape[1:], dtype=tensor.dtype, device="meta")

    if isinstance(own, QuantizedWeights):
        whole = QuantizedWeights(own().map(blank))
        whole.kind = own.kind
        return whole
    return nn.Parameter(blank(own), requires_grad=False)


def gathered(decoder: Decoder, mesh: Mesh, layer: int) -> dict[str, Tensor]:
    """Gather one layer's tensors of experts, [E, ..] each, on the host of the job's first rank.

    Returns them by their names in the decoder there, and an empty dict on other ranks. Every rank
    calls it. A GPU needs memory for one tensor of one rank's experts. Redundant experts are not
    sent.
    """
    # The rank that writes may take long, and collectives do not wait for long.
    mesh.watch.exchange(SAVING, "", patient=True)
    if mesh.group_ranks[0] != 0:
        return {}
    moe = decoder.layers[layer].mlp
    assert isinstance(moe, FusedMoE) and isinstance(decoder.balancer, Balancer)
    experts = decoder.balancer.held(list(decoder.moe_layers).index(layer))
    return {
        f"layers.{layer}.mlp.{name}": whole
        for name, own in moe.named_parameters()
        if name.partition(".")[0] in _OF_EXPERTS
        if (whole := _gathered(own.detach(), experts, moe.num_experts, mesh)) is not None
    }


def _gathered(
    own: Tensor, experts: list[dict[int, int]], num_experts: int, mesh: Mesh
) -> Tensor | None:
    """Gather one tensor; `experts` are those that each rank sends, with their rows."""
    writes = mesh.ep_rank == 0
    whole = torch.empty(num_experts if writes else 0, *own.shape[1:], dtype=own.dtype)
    for rank, rows in enumerate(experts):
        part = own.new_empty(len(rows), *own.shape[1:])
        octets = part.view(-1).view(torch.uint8)
        if mesh.ep_rank == rank:
            for i, row in enumerate(rows.values()):
                part[i].copy_(own[row])
        # All ranks call it, so that their counts of collectives agree.
        mesh.exchange(
            [(octets, 0)] if rows and mesh.ep_rank == rank != 0 else [],
            [(octets, rank)] if rows and rank != 0 and writes else [],
            SAVING,
        ).wait()
        if writes:
            for i, expert in enumerate(rows):
                whole[expert].copy_(part[i])
    return whole if writes else None
