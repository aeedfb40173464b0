"""Dividing the experts of a model that was built for one process over ranks.

Legend: E experts, P slots.
"""

from collections.abc import Collection
from functools import partial

import torch
from torch import nn

from moezoo.errors import ExpertMapError
from moezoo.layers.decoder import Decoder
from moezoo.layers.moe import Dispatcher
from moezoo.layers.quant import BlockFp8, Format
from moezoo.parallel.dispatch import AllGather, AllToAll
from moezoo.parallel.eplb.balancer import Balancer
from moezoo.parallel.eplb.options import EPLB
from moezoo.parallel.mesh import Mesh
from moezoo.parallel.slots import Slots


def slots_of(decoder: Decoder, mesh: Mesh, options: EPLB | None) -> Slots:
    """Return the initial slots of a model's experts, by `eplb` and `Parallel.placement`.

    Raises ExpertMapError for a placement that does not fit it, and a model without experts.
    """
    layers = decoder.moe_layers
    sizes = {moe.num_experts for moe in layers.values()}
    if len(sizes) != 1:
        raise ExpertMapError(
            "the model has no MoE layers to divide; leave parallel None"
            if not sizes
            else f"the MoE layers have {sorted(sizes)} experts, and a placement is for one number"
        )
    placement = mesh.parallel.placement
    if options is not None:
        return options.slots(sizes.pop(), list(layers), mesh.ep_size, placement)
    return Slots.of(placement, sizes.pop(), list(layers), mesh.ep_size)


def shard_(decoder: Decoder, mesh: Mesh, slots: Slots) -> None:
    """Reduce each MoE layer, on meta, to the experts in this rank's slots, and attach the
    dispatcher. No parameter needs a gradient from then on.

    Raises ExpertMapError where the slots differ between ranks.
    """
    mesh.agree({"the map of experts": slots.fingerprint})
    dispatcher = dispatcher_of(mesh, slots)
    held = slots.of_rank(mesh.ep_rank)
    for layer, moe in decoder.moe_layers.items():
        for name in ("w13", "w2", "bias13", "bias2"):
            whole = getattr(moe, name)
            if whole is None:
                continue
            setattr(moe, name, nn.Parameter(whole.new_empty(len(held[layer]), *whole.shape[1:])))
        moe.dispatcher = dispatcher
    decoder.dispatcher = dispatcher
    decoder.requires_grad_(False)


def balance_(
    decoder: Decoder, mesh: Mesh, slots: Slots, options: EPLB | None, *, num_groups: int = 1
) -> None:
    """Attach a balancer to a decoder that `shard_` divided and whose weights are loaded.

    It chooses the slots that tokens go to and, by `options`, moves experts. Each of `num_groups`
    groups of experts stays on one node, if the groups divide over the nodes. In one process whose
    slots are the experts in order there is nothing to attach.
    """
    trivial = torch.arange(slots.num_experts).repeat(len(slots.layers), 1)
    if mesh.ep_size == 1 and torch.equal(slots.physical_to_logical_map, trivial):
        return
    layers = decoder.moe_layers.values()
    balancer = Balancer(
        slots,
        [moe.expert_tensors() for moe in layers],
        options=options,
        mesh=mesh,
        num_groups=num_groups,
    )
    decoder.balancer = balancer
    for i, moe in enumerate(layers):
        moe.physical_ids = partial(balancer.physical_ids, i)


def dispatcher_of(mesh: Mesh, slots: Slots) -> Dispatcher | None:
    """Return the dispatcher for `Parallel.dispatch`, or None where one rank has all the slots."""
    parallel = mesh.parallel
    if mesh.ep_size == 1:
        return None
    if parallel.dispatch == "all_gather":
        return AllGather(mesh, slots.bounds, chunks=parallel.chunks)
    return AllToAll(
        mesh,
        slots.bounds,
        chunks=parallel.chunks,
        capacity=parallel.capacity,
        fp8=parallel.wire == "fp8",
    )


def check_wire(mesh: Mesh, formats: Collection[type[Format] | None]) -> None:
    """Raise ValueError where tokens are to be sent in fp8 and not all experts are in block fp8.

    Experts in block fp8 round their inputs to fp8 anyway. `formats` are those of the experts, None
    for 16 or 32 bits.
    """
    if mesh.parallel.wire == "fp8" and set(formats) - {BlockFp8}:
        names = {"not quantised" if format is None else format.name for format in formats}
        held = " and ".join(sorted(names))
        raise ValueError(
            f"wire='fp8' is for experts in {BlockFp8.name} in blocks, and these are {held}; leave "
            "wire 'model', or quantise them"
        )


def step_without_tokens(decoder: Decoder) -> None:
    """Take part in a forward pass of the other ranks, as a rank without tokens."""
    if decoder.balancer is not None:
        decoder.balancer.begin(None)
    with decoder.forward_pass(0):
        for moe in decoder.moe_layers.values():
            if moe.dispatcher is None:
                continue
            nothing = moe.gate.new_empty(0, moe.gate.shape[1])
            # One row is routed and cut off: the router alone knows the number of experts per token.
            route = moe.reroute or moe.route
            topk_weights, topk_ids = route(moe.gate.new_zeros(1, len(moe.gate)).float())
            slots = topk_ids if moe.physical_ids is None else moe.physical_ids(topk_ids[:0])
            moe.dispatched(nothing, topk_weights[:0], slots[:0])
    decoder.end_step(dummy=True)
