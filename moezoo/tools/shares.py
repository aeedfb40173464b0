"""Bytes that each rank of an expert-parallel job reads and holds, computed from headers alone.

Legend: E experts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from moezoo.layers.decoder import Decoder
from moezoo.loaders.checkpoint import Checkpoint
from moezoo.loaders.encodings import Encoding
from moezoo.loaders.experts import experts_of
from moezoo.loaders.mapping import Copy, ParameterInfo
from moezoo.loaders.weights import Planned
from moezoo.parallel.slots import Slots


@dataclass(frozen=True)
class RankShare:
    """What one rank reads and holds."""

    rank: int
    experts: int
    """Number of experts in all its layers, replicas included."""
    weight_bytes: int
    """Bytes of the weights in its memory."""
    read_bytes: int
    """Bytes read from files; an expert counts twice where the rank has two replicas of it."""
    download_bytes: int
    """Bytes of the files that hold what it reads."""


def rank_shares(
    decoder: Decoder,
    checkpoint: Checkpoint,
    planned: Planned,
    slots: Slots,
) -> tuple[RankShare, ...]:
    """Return the share of each rank; `planned` is the load of the whole model on one device."""
    owners = _owners(decoder)
    rest, held = held_bytes(decoder, planned.wanted)

    shared_bytes, shared_files = 0, set[str]()
    reads = defaultdict[tuple[int, int], int](int)
    files = defaultdict[tuple[int, int], set[str]](set)
    for copy in planned.plan.copies:
        stored = {name: checkpoint.tensors[name] for name in _tensors(copy, planned.encoding)}
        nbytes = sum(tensor.nbytes for tensor in stored.values())
        from_files = {tensor.file for tensor in stored.values()}
        if copy.target not in owners:
            shared_bytes += nbytes
            shared_files |= from_files
            continue
        first = copy.target_index[0]
        experts = [first] if isinstance(first, int) else range(slots.num_experts)
        for expert in experts:
            reads[owners[copy.target], expert] += nbytes // len(experts)
            files[owners[copy.target], expert] |= from_files

    sizes = defaultdict[str, int](int)
    for tensor in checkpoint.tensors.values():
        sizes[tensor.file] += tensor.nbytes
    shares = []
    for rank in range(len(slots.bounds) - 1):
        own = [(layer, expert) for layer, some in slots.of_rank(rank).items() for expert in some]
        opened = shared_files.union(*(files[place] for place in own))
        shares.append(
            RankShare(
                rank,
                len(own),
                weight_bytes=rest + sum(held[layer] // slots.num_experts for layer, _ in own),
                read_bytes=shared_bytes + sum(reads[place] for place in own),
                download_bytes=sum(sizes[file] for file in opened),
            )
        )
    return tuple(shares)


def held_bytes(
    decoder: Decoder, wanted: Mapping[str, ParameterInfo]
) -> tuple[int, Mapping[int, int]]:
    """Return the bytes of what every rank holds, and those of each layer's experts."""
    owners = _owners(decoder)
    rest, held = 0, defaultdict[int, int](int)
    for name, info in wanted.items():
        nbytes = prod(info.shape) * info.dtype.itemsize
        layer = owners.get(name, owners.get(name.rpartition(".")[0]))
        if layer is None:
            rest += nbytes
        else:
            held[layer] += nbytes
    return rest, held


def _owners(decoder: Decoder) -> dict[str, int]:
    """Return the layer of each parameter of experts, by the parameter's name."""
    layer_of = {moe: layer for layer, moe in decoder.moe_layers.items()}
    return {name: layer_of[moe] for name, moe in experts_of(decoder).items()}


def _tensors(copy: Copy, encoding: Encoding) -> Iterator[str]:
    """Yield the names of the stored tensors of a copy."""
    weight = encoding.weights.get(copy.source)
    if weight is None:
        yield copy.source
    else:
        yield weight.data
        yield from (extra.tensor for extra in weight.extras)
