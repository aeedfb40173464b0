"""Transfer of experts' weights between ranks.

Weights arrive in staging memory while the model runs with its old ones, and are copied to their
slots between two steps. The tensors of the slots never move, since captured graphs read them.
Weights are sent as bytes, so that the format does not matter, and in pieces. The thread that runs
the model posts a piece between two steps, on the model's own communicator: NCCL forbids that the
work of two communicators is in different orders on different ranks.

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
"""Alignment in bytes of each tensor in staging memory."""

Layer = Sequence[Tensor]
"""The tensors of a layer's experts, [S, ..] each."""


@dataclass(frozen=True)
class Switch:
    """The change of a layer to a new map."""

    layer: int
    slots: Tensor
    """The new map, int64 [P]."""
    moves: LayerMoves


def plan_waves(
    old: Tensor, new: Tensor, num_ranks: int, *, between: Callable[[], object] = lambda: None
) -> list[list[Switch]]:
    """Group the layers whose maps int64 [L, P] differ into waves that fit in staging memory.

    In a wave no rank receives more than S experts, the most that it might receive in one layer. All
    ranks find the same waves. `between` is called after each layer.
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
    """Bytes `start` to `stop` of a tensor of experts that all have other senders and receivers."""

    layer: int
    moves: tuple[Move, ...]
    tensor: int
    start: int
    stop: int


@dataclass(frozen=True)
class Wave:
    """Layers that are switched together, and the pieces that have to be sent before."""

    switches: list[Switch]
    rows: dict[tuple[int, tuple[int, ...]], int]
    """Rows of staging memory where this rank's experts arrive, by layer and target slots."""
    pieces: deque[list[Part]]


class Transfer:
    """Sends and receives experts on a rank.

    `layers` are the experts' tensors of each MoE layer; `mesh` is None for a single process. All
    ranks post all pieces of a wave in order, one at a time, wait for each, and then commit.

    Raises `MoEOutOfMemoryError` without memory for one layer's experts of this rank.
    """

    def __init__(self, layers: Sequence[Layer], mesh: Mesh | None) -> None:
        self._octets = [[_octets(tensor) for tensor in layer] for layer in layers]
        """The tensors as bytes, uint8 [S, ..]: NCCL does not know every dtype, E8M0 for one."""
        self._starts = [
            [0, *accumulate(_aligned(tensor.shape[1]) for tensor in layer)]
            for layer in self._octets
        ]
        """Start of each layer's tensors in a row of staging memory, and their end."""
        self._mesh = mesh
        self._rank = 0 if mesh is None else mesh.ep_rank
        row = max((starts[-1] for starts in self._starts), default=0)
        most = max((len(layer[0]) for layer in layers), default=0)
        device = layers[0][0].device if layers else torch.device("cpu")
        self._timed: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque(maxlen=16)
        """Begin, end and bytes of the last pieces."""
        try:
            # Allocated at the beginning: later a KV cache may take all memory.
            self._staging = torch.empty(most, row, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise MoEOutOfMemoryError(
                f"EPLB takes {most * row / 2**30:.2f} GiB of {device} where experts arrive, as "
                f"much as this rank's experts of a layer: {error}; more ranks have fewer each, "
                'and eplb={"enabled": False} moves none'
            ) from error

    def wave(self, switches: list[Switch], piece_bytes: int) -> Wave:
        """Make a wave whose pieces have at most `piece_bytes` per rank, the same on all ranks."""
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
        """Return an upper bound for the bytes that a rank sends, or receives, in these waves."""
        return sum(
            self._row_bytes(switch.layer) * len(switch.moves.rounds)
            for wave in waves
            for switch in wave
        )

    def _row_bytes(self, layer: int) -> int:
        return sum(tensor.shape[1] for tensor in self._octets[layer])

    def post(self, wave: Wave, piece: Sequence[Part]) -> Pending[list[Tensor]] | None:
        """Begin to send and receive a piece of a wave; every rank calls it.

        On a GPU, later launches run after it, and the host never waits. Raises `RankError` where a
        rank is gone.
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
        # Only the stream waits. Otherwise the piece could be in flight together with collectives of
        # a captured step, which run on another stream.
        pending.wait()
        end.record()
        nbytes = max(sum(x.nbytes for x, _ in side) for side in (sent, received))
        self._timed.append((begin, end, nbytes))
        return pending

    def bytes_per_second(self) -> float | None:
        """Return the best rate of the last pieces, or None where none has been timed.

        Only pieces that have arrived already count, as the host does not wait.
        """
        rates = [
            1e3 * nbytes / max(begin.elapsed_time(end), 1e-3)
            for begin, end, nbytes in self._timed
            if nbytes and end.query()
        ]
        return max(rates, default=None)

    def commit_(self, wave: Wave) -> None:
        """Copy experts that have arrived, and those that move within this rank, to their slots."""
        arrive, leave = _Copies(), _Copies()
        for switch in wave.switches:
            tensors, starts = self._octets[switch.layer], self._starts[switch.layer]
            size = switch.moves.slots_per_rank
            for move in switch.moves.local:
                if move.source // size == self._rank:
                    row = self._staging[wave.rows[switch.layer, move.targets]]
                    for tensor, start in zip(tensors, starts, strict=False):
                        octets = tensor[move.source % size]
                        arrive.add(row[start : start + len(octets)], octets)
        for (layer, targets), at in wave.rows.items():
            row = self._staging[at]
            for tensor, start in zip(self._octets[layer], self._starts[layer], strict=False):
                octets = row[start : start + tensor.shape[1]]
                for target in targets:
                    leave.add(tensor[target % len(tensor)], octets)
        arrive.make()  # all sources are read before any slot is overwritten
        leave.make()


class _Copies:
    """Copies of bytes, uint8 [n] each, that are made together in few launches."""

    def __init__(self) -> None:
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []

    def add(self, target: Tensor, source: Tensor) -> None:
        self._targets.append(target)
        self._sources.append(source)

    def make(self) -> None:
        if not self._targets:
            return
        both = (*self._targets, *self._sources)
        # A GPU thread copies a few elements at a time: the wider they are the better.
        wide = all(len(x) % 8 == 0 and x.data_ptr() % 8 == 0 for x in both)
        targets, sources = (
            [x.view(torch.int64) for x in tensors] if wide else tensors
            for tensors in (self._targets, self._sources)
        )
        torch._foreach_copy_(targets, sources)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _octets(tensor: Tensor) -> Tensor:
    """Return a view of a tensor [S, ..] as bytes, uint8 [S, bytes]."""
    return tensor.detach().view(len(tensor), tensor.shape[1:].numel()).view(torch.uint8)
