"""Experts' weights on their way between ranks.

They arrive in memory of their own, while the model runs with the weights that it has, and are
copied to their slots between two steps: the weights stay where they are, for captured graphs read
them there. Everything travels as bytes, so that the format does not matter.

Legend: L MoE layers, S slots of a rank, R ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moezoo.errors import MoEOutOfMemoryError
from moezoo.parallel.eplb.movement import LayerMoves, plan_moves

ALIGNMENT = 16
"""Of each tensor in the memory where weights arrive."""

Layer = Sequence[Tensor]
"""All tensors of a layer's experts, [S, ..] each."""


@dataclass(frozen=True)
class Switch:
    """A layer that goes to a new map."""

    layer: int
    slots: Tensor
    """int64 [P]: the new map."""
    moves: LayerMoves


def plan_waves(old: Tensor, new: Tensor, num_ranks: int) -> list[list[Switch]]:
    """The layers whose maps int64 [L, P] differ, in order, those together that fit in staging.

    In a wave no rank gets more than S experts, as many as it might get in one layer alone. Every
    rank finds the same waves.
    """
    waves: list[list[Switch]] = []
    coming = torch.zeros(num_ranks, dtype=torch.int64)
    for layer in (old != new).any(1).nonzero()[:, 0].tolist():
        moves = plan_moves(old[layer], new[layer], num_ranks)
        of_layer = torch.zeros_like(coming)
        for move in moves.all():
            of_layer[moves.rank_of(move.targets[0])] += 1
        if not waves or (coming + of_layer).max() > moves.slots_per_rank:
            waves.append([])
            coming = torch.zeros_like(coming)
        waves[-1].append(Switch(layer, new[layer].clone(), moves))
        coming += of_layer
    return waves


class Transfer:
    """Brings experts to this rank, and sends others theirs.

    `layers` are the experts' tensors of each MoE layer. `group` has R ranks, and only this object
    may use it, from one thread; None is a process alone.

    Raises `MoEOutOfMemoryError` without memory for one layer's experts of this rank.
    """

    def __init__(self, layers: Sequence[Layer], group: dist.ProcessGroup | None) -> None:
        self._layers = layers
        self._group = group
        self._rank = 0 if group is None else group.rank()
        row = max((sum(_aligned(t[0].nbytes) for t in layer) for layer in layers), default=0)
        most = max((len(layer[0]) for layer in layers), default=0)
        device = layers[0][0].device if layers else torch.device("cpu")
        try:
            # There from the beginning: later all memory may be a cache's.
            self._staging = torch.empty(most, row, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise MoEOutOfMemoryError(
                f"EPLB takes {most * row / 2**30:.2f} GiB of {device} where experts arrive, as "
                f"much as this rank's experts of a layer: {error}; more ranks have fewer each, "
                'and eplb={"enabled": False} moves none'
            ) from error

    def fetch(self, wave: Sequence[Switch]) -> None:
        """Get what the layers of a wave need on this rank, and send what others need.

        On a GPU this is queued on the current stream. Raises `RuntimeError` where a rank is gone.
        """
        rows = self._rows(wave)
        for switch in wave:
            layer, moves = self._layers[switch.layer], switch.moves
            for move in moves.local:
                if moves.rank_of(move.source) == self._rank:
                    source = move.source % moves.slots_per_rank
                    for tensor, row in zip(layer, rows[switch.layer, move.targets], strict=True):
                        row.copy_(tensor.detach()[source])
            for together in moves.rounds:
                operations = []
                for move in together:
                    sender, receiver = moves.rank_of(move.source), moves.rank_of(move.targets[0])
                    if sender == self._rank:
                        source = move.source % moves.slots_per_rank
                        operations += [
                            self._operation(dist.isend, tensor.detach()[source], receiver)
                            for tensor in layer
                        ]
                    if receiver == self._rank:
                        operations += [
                            self._operation(dist.irecv, row, sender)
                            for row in rows[switch.layer, move.targets]
                        ]
                if operations:
                    for work in dist.batch_isend_irecv(operations):
                        work.wait()

    def commit_(self, wave: Sequence[Switch]) -> None:
        """Copy what came with `fetch` to the slots of this rank."""
        rows = self._rows(wave)
        for (layer, targets), arrived in rows.items():
            for tensor, row in zip(self._layers[layer], arrived, strict=True):
                for target in targets:
                    tensor.detach()[target % len(tensor)].copy_(row)

    def _rows(self, wave: Sequence[Switch]) -> dict[tuple[int, tuple[int, ...]], list[Tensor]]:
        """Where the experts of this rank arrive, by layer and target slots."""
        free = iter(self._staging)
        return {
            (switch.layer, move.targets): list(_views(next(free), self._layers[switch.layer]))
            for switch in wave
            for move in switch.moves.all()
            if switch.moves.rank_of(move.targets[0]) == self._rank
        }

    def _operation(self, kind: Callable[..., Any], tensor: Tensor, peer: int) -> dist.P2POp:
        # Bytes: NCCL does not know every dtype, E8M0 for one.
        data = tensor.reshape(-1).view(torch.uint8)
        return dist.P2POp(kind, data, group=self._group, group_peer=peer)


def _views(memory: Tensor, layer: Layer) -> Iterator[Tensor]:
    """Of uint8 [row]: a tensor for each of the layer's, of one slot."""
    start = 0
    for tensor in layer:
        one = tensor[0]
        yield memory[start : start + one.nbytes].view(one.dtype).view(one.shape)
        start += _aligned(one.nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
