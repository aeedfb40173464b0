"""Experts' weights on their way between ranks.

They arrive in memory of their own, while the model runs with the weights that it has, and are
copied to their slots between two steps: the weights stay where they are, for captured graphs read
them there. Everything travels as bytes, so that the format does not matter, and in pieces, each
posted between two steps by the thread that runs the model and on the communicator that the model
uses: NCCL forbids that two communicators' work is in another order on one rank than on another.

Legend: L MoE layers, S slots of a rank, R ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.errors import MoEOutOfMemoryError
from moezoo.parallel.eplb.movement import LayerMoves, Move, plan_moves
from moezoo.parallel.mesh import Mesh, Pending

ALIGNMENT = 16
"""Of each tensor in the memory where weights arrive."""

PIECE_BYTES = 64 << 20
"""The most that a rank sends, or receives, between two steps. NVLink carries this in 0.2 ms, at
most 4 % of a step of 5 ms, and a network of 50 GB/s in 1.3 ms; with less, the experts of a large
model (20 GB a rank) would not arrive within an interval of 3,000 steps."""

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


@dataclass(frozen=True)
class Part:
    """Bytes start to stop of one tensor of some experts, none of which shares its sender or its
    receiver with another one."""

    layer: int
    moves: tuple[Move, ...]
    tensor: int
    start: int
    stop: int


class Transfer:
    """Brings experts to this rank, and sends others theirs.

    `layers` are the experts' tensors of each MoE layer; without a mesh this is a process alone. Of
    a wave, every rank posts all `pieces`, in their order and one at a time, and waits for each;
    then it commits.

    Raises `MoEOutOfMemoryError` without memory for one layer's experts of this rank.
    """

    def __init__(
        self, layers: Sequence[Layer], mesh: Mesh | None, *, piece_bytes: int = PIECE_BYTES
    ) -> None:
        self._layers = layers
        self._mesh = mesh
        self._rank = 0 if mesh is None else mesh.ep_rank
        self._piece_bytes = piece_bytes
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

    def pieces(self, wave: Sequence[Switch]) -> list[list[Part]]:
        """What travels together: of `piece_bytes` at most for each rank, alike on all of them."""
        pieces: list[list[Part]] = []
        left = 0
        for switch in wave:
            sizes = [tensor[0].nbytes for tensor in self._layers[switch.layer]]
            for together in switch.moves.rounds:
                for n, size in enumerate(sizes):
                    for start in range(0, size, self._piece_bytes):
                        stop = min(size, start + self._piece_bytes)
                        if stop - start > left:
                            pieces.append([])
                            left = self._piece_bytes
                        pieces[-1].append(Part(switch.layer, together, n, start, stop))
                        left -= stop - start
        return pieces

    def post(self, wave: Sequence[Switch], piece: Sequence[Part]) -> Pending[list[Tensor]] | None:
        """Begin to send and to receive a piece of a wave; every rank calls it.

        On a GPU, all that is launched from now on is done after it, and the host never waits.
        Raises `RankError` where a rank is gone.
        """
        if self._mesh is None:
            return None
        rows = self._rows(wave)
        sent: list[tuple[Tensor, int]] = []
        received: list[tuple[Tensor, int]] = []
        moves = {switch.layer: switch.moves for switch in wave}
        for part in piece:
            of_layer, tensor = moves[part.layer], self._layers[part.layer][part.tensor].detach()
            for move in part.moves:
                sender, receiver = of_layer.rank_of(move.source), of_layer.rank_of(move.targets[0])
                if sender == self._rank:
                    expert = tensor[move.source % of_layer.slots_per_rank]
                    sent.append((_octets(expert)[part.start : part.stop], receiver))
                if receiver == self._rank:
                    row = rows[part.layer, move.targets][part.tensor]
                    received.append((_octets(row)[part.start : part.stop], sender))
        pending = self._mesh.exchange(sent, received, "moving experts")
        if self._staging.is_cuda:
            # Only streams wait. A captured step that runs next launches collectives from another
            # stream than this, which would otherwise be in flight at the same time.
            pending.wait()
        return pending

    def commit_(self, wave: Sequence[Switch]) -> None:
        """Put what came, and what moves within this rank, into its slots."""
        rows = self._rows(wave)
        for switch in wave:
            for move in switch.moves.local:  # all read what was there before
                if switch.moves.rank_of(move.source) == self._rank:
                    source = move.source % switch.moves.slots_per_rank
                    arriving = rows[switch.layer, move.targets]
                    for tensor, row in zip(self._layers[switch.layer], arriving, strict=True):
                        row.copy_(tensor.detach()[source])
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


def _views(memory: Tensor, layer: Layer) -> Iterator[Tensor]:
    """Of uint8 [row]: a tensor for each of the layer's, of one slot."""
    start = 0
    for tensor in layer:
        one = tensor[0]
        yield memory[start : start + one.nbytes].view(one.dtype).view(one.shape)
        start += _aligned(one.nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _octets(tensor: Tensor) -> Tensor:
    """The bytes: NCCL does not know every dtype, E8M0 for one."""
    return tensor.reshape(-1).view(torch.uint8)
