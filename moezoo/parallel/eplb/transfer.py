"""Experts' weights on their way between ranks.

They arrive in memory of their own, while the model runs with the weights that it has, and are
copied to their slots between two steps: the weights stay where they are, for captured graphs read
them there. Everything travels as bytes, so that the format does not matter, and in pieces, each
posted between two steps by the thread that runs the model and on the communicator that the model
uses: NCCL forbids that two communicators' work is in another order on one rank than on another.

Legend: L MoE layers, S slots of a rank, R ranks.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from moezoo.errors import MoEOutOfMemoryError
from moezoo.parallel.eplb.movement import LayerMoves, Move, plan_moves
from moezoo.parallel.mesh import Mesh, Pending

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


def plan_waves(
    old: Tensor, new: Tensor, num_ranks: int, *, between: Callable[[], object] = lambda: None
) -> list[list[Switch]]:
    """The layers whose maps int64 [L, P] differ, in order, those together that fit in staging.

    In a wave no rank gets more than S experts, as many as it might get in one layer alone. Every
    rank finds the same waves. `between` is called after each layer.
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
        between()
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


@dataclass(frozen=True)
class Wave:
    """Layers that are switched together, and what travels before."""

    switches: list[Switch]
    rows: dict[tuple[int, tuple[int, ...]], int]
    """Where the experts of this rank arrive in staging, by layer and target slots."""
    pieces: deque[list[Part]]


class Transfer:
    """Brings experts to this rank, and sends others theirs.

    `layers` are the experts' tensors of each MoE layer; without a mesh this is a process alone. Of
    a wave, every rank posts all pieces, in their order and one at a time, and waits for each; then
    it commits.

    Raises `MoEOutOfMemoryError` without memory for one layer's experts of this rank.
    """

    def __init__(self, layers: Sequence[Layer], mesh: Mesh | None) -> None:
        self._octets = [[_octets(tensor) for tensor in layer] for layer in layers]
        """The bytes, uint8 [S, ..]: NCCL does not know every dtype, E8M0 for one."""
        self._starts = [
            [0, *accumulate(_aligned(tensor.shape[1]) for tensor in layer)]
            for layer in self._octets
        ]
        """Of each tensor in a row of staging, and the end."""
        self._mesh = mesh
        self._rank = 0 if mesh is None else mesh.ep_rank
        row = max((starts[-1] for starts in self._starts), default=0)
        most = max((len(layer[0]) for layer in layers), default=0)
        device = layers[0][0].device if layers else torch.device("cpu")
        self._timed: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque(maxlen=16)
        """Begin and end of the last pieces, and their bytes."""
        try:
            # There from the beginning: later all memory may be a cache's.
            self._staging = torch.empty(most, row, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise MoEOutOfMemoryError(
                f"EPLB takes {most * row / 2**30:.2f} GiB of {device} where experts arrive, as "
                f"much as this rank's experts of a layer: {error}; more ranks have fewer each, "
                'and eplb={"enabled": False} moves none'
            ) from error

    def wave(self, switches: list[Switch], piece_bytes: int) -> Wave:
        """Its pieces have `piece_bytes` at most for each rank, and are alike on all of them."""
        arriving = (
            (switch.layer, move.targets)
            for switch in switches
            for move in switch.moves.all()
            if switch.moves.rank_of(move.targets[0]) == self._rank
        )
        rows = {key: row for row, key in enumerate(arriving)}
        return Wave(switches, rows, deque(self._pieces(switches, piece_bytes)))

    def _pieces(self, switches: Sequence[Switch], piece_bytes: int) -> list[list[Part]]:
        pieces: list[list[Part]] = []
        left = 0
        for switch in switches:
            sizes = [tensor.shape[1] for tensor in self._octets[switch.layer]]
            for together in switch.moves.rounds:
                for n, size in enumerate(sizes):
                    for start in range(0, size, piece_bytes):
                        stop = min(size, start + piece_bytes)
                        if stop - start > left:
                            pieces.append([])
                            left = piece_bytes
                        pieces[-1].append(Part(switch.layer, together, n, start, stop))
                        left -= stop - start
        return pieces

    def bytes_sent(self, waves: Sequence[Sequence[Switch]]) -> int:
        """Of a rank, or that it gets, at most."""
        return sum(
            self._row_bytes(switch.layer) * len(switch.moves.rounds)
            for wave in waves
            for switch in wave
        )

    def _row_bytes(self, layer: int) -> int:
        return sum(tensor.shape[1] for tensor in self._octets[layer])

    def post(self, wave: Wave, piece: Sequence[Part]) -> Pending[list[Tensor]] | None:
        """Begin to send and to receive a piece of a wave; every rank calls it.

        On a GPU, all that is launched from now on is done after it, and the host never waits.
        Raises `RankError` where a rank is gone.
        """
        if self._mesh is None:
            return None
        sent: list[tuple[Tensor, int]] = []
        received: list[tuple[Tensor, int]] = []
        moves = {switch.layer: switch.moves for switch in wave.switches}
        for part in piece:
            of_layer = moves[part.layer]
            size = of_layer.slots_per_rank
            for move in part.moves:
                sender, receiver = move.source // size, move.targets[0] // size
                if sender == self._rank:
                    octets = self._octets[part.layer][part.tensor]
                    sent.append((octets[move.source % size, part.start : part.stop], receiver))
                if receiver == self._rank:
                    row = wave.rows[part.layer, move.targets]
                    first = self._starts[part.layer][part.tensor]
                    octets = self._staging[row, first + part.start : first + part.stop]
                    received.append((octets, sender))
        if not self._staging.is_cuda:
            return self._mesh.exchange(sent, received, "moving experts")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        pending = self._mesh.exchange(sent, received, "moving experts")
        # Only streams wait. A captured step that runs next launches collectives from another
        # stream than this, which would otherwise be in flight at the same time.
        pending.wait()
        end.record()
        nbytes = max(sum(x.nbytes for x, _ in side) for side in (sent, received))
        self._timed.append((begin, end, nbytes))
        return pending

    def bytes_per_second(self) -> float | None:
        """That pieces travelled with lately, at best; None where nothing is known. On a GPU only
        what has come already counts: the host does not wait."""
        rates = [
            1e3 * nbytes / max(begin.elapsed_time(end), 1e-3)
            for begin, end, nbytes in self._timed
            if nbytes and end.query()
        ]
        return max(rates, default=None)

    def commit_(self, wave: Wave) -> None:
        """Put what came, and what moves within this rank, into its slots."""
        for switch in wave.switches:
            tensors, starts = self._octets[switch.layer], self._starts[switch.layer]
            size = switch.moves.slots_per_rank
            for move in switch.moves.local:  # all read what was there before
                if move.source // size == self._rank:
                    row = self._staging[wave.rows[switch.layer, move.targets]]
                    for tensor, start in zip(tensors, starts, strict=False):
                        octets = tensor[move.source % size]
                        row[start : start + len(octets)].copy_(octets)
        for (layer, targets), at in wave.rows.items():
            row = self._staging[at]
            for tensor, start in zip(self._octets[layer], self._starts[layer], strict=False):
                octets = row[start : start + tensor.shape[1]]
                for target in targets:
                    tensor[target % len(tensor)].copy_(octets)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _octets(tensor: Tensor) -> Tensor:
    """[S, ..] -> uint8 [S, bytes], over the same memory."""
    return tensor.detach().view(len(tensor), tensor.shape[1:].numel()).view(torch.uint8)
