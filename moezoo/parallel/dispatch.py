"""How tokens get to the ranks that hold their experts, and their outputs back.

Rounding points: what a rank's experts make of a token is summed in fp32 and rounded to the model's
dtype, as in one process; these sums travel, are added in fp32, in the order of ranks (with
`AllGather` in that of the collective, the same on all ranks), and rounded once more.

Legend: T tokens of this rank, H hidden, K experts per token, R ranks of the expert group, C
capacity, S rows sent: a token once for each rank that it goes to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.layers.moe import Arrival, Flight
from moezoo.parallel.mesh import Mesh, Pending
from moezoo.parallel.pack import (
    destinations,
    fp8_rows,
    from_fp8_rows,
    pack_choices,
    pack_order,
    sum_answers,
    unpack_choices,
)

_SENDING, _ANSWERING = "sending tokens to experts", "sending the experts' outputs back"


class _Ranks:
    """What both dispatchers know of the slots: rank r has bounds[r] to bounds[r + 1] of them."""

    def __init__(self, mesh: Mesh, bounds: Sequence[int], *, chunks: int = 1) -> None:
        self.mesh = mesh
        self.chunks = chunks
        self.first, self.stop = bounds[mesh.ep_rank], bounds[mesh.ep_rank + 1]
        sizes = [end - start for start, end in pairwise(bounds)]
        owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.rank_of_slot = owners.to(mesh.device)
        """int64 [P]."""

    def rows(self, slots: Tensor) -> Tensor:
        """Slots -> rows of this rank's w13 and w2, or -1."""
        here = (slots >= self.first) & (slots < self.stop)
        return torch.where(here, slots - self.first, -1).int()


class AllGather(_Ranks):
    """All ranks have the same tokens; each answers for its experts, and the answers are summed."""

    _compared = False

    def dispatch(self, x: Tensor, topk_weights: Tensor, slots: Tensor) -> Flight:
        """Raises ValueError, on every rank, where the first tokens of all are not the same."""
        _refuse_gradient(x)
        if not self._compared and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._compare(x)
            self._compared = True
        return _Shared(self, x, topk_weights, slots)

    def _compare(self, x: Tensor) -> None:
        """Other tokens on each rank would give sums that mean nothing, without any error."""
        count = torch.tensor(len(x), dtype=torch.float64, device=x.device)
        own = torch.stack((count, x.double().sum()))[None]
        sums = self.mesh.all_gather(own, "comparing tokens").wait()
        differs = (sums.view(torch.int64) != own.view(torch.int64)).any(1).tolist()
        if any(differs):
            raise ValueError(
                f"rank {self.mesh.group_ranks[differs.index(True)]} has other tokens than rank "
                f"{self.mesh.rank}, and dispatch='all_gather' is for the same ones on all ranks; "
                "give all the same inputs, or use dispatch='all_to_all'"
            )


class _Shared:
    def __init__(self, ranks: AllGather, x: Tensor, topk_weights: Tensor, slots: Tensor) -> None:
        self._mesh, self._dtype = ranks.mesh, x.dtype
        tokens = x, topk_weights, ranks.rows(slots)
        parts = (tensor.tensor_split(ranks.chunks) for tensor in tokens)
        self._parts = [Arrival(*part) for part in zip(*parts, strict=True)]
        self._sums: list[Pending] = []

    def arrivals(self) -> Iterator[Arrival]:
        yield from self._parts

    def answer(self, y: Tensor) -> None:
        self._sums.append(self._mesh.all_reduce(y.float(), "summing the experts' outputs"))

    def combine(self) -> Tensor:
        return torch.cat([part.wait() for part in self._sums]).to(self._dtype)


class AllToAll(_Ranks):
    """Each rank has tokens of its own, and sends each once to every rank that has experts of it.

    With a capacity all buffers have its size: every rank sends all its tokens to all ranks, and
    the host need not know how many go where. That is for few tokens, as decoding has them.
    """

    def __init__(
        self,
        mesh: Mesh,
        bounds: Sequence[int],
        *,
        chunks: int = 1,
        capacity: int | None = None,
        fp8: bool = False,
    ) -> None:
        super().__init__(mesh, bounds, chunks=chunks)
        self.capacity = capacity
        self.fp8 = fp8

    @contextmanager
    def fixed(self, capacity: int) -> Iterator[None]:
        """Forward passes in the block, of at most so many tokens on every rank, have buffers of
        this size. All ranks have to say the same."""
        before, self.capacity = self.capacity, capacity
        try:
            yield
        finally:
            self.capacity = before

    def dispatch(self, x: Tensor, topk_weights: Tensor, slots: Tensor) -> Flight:
        """Raises ValueError for more tokens than the capacity."""
        _refuse_gradient(x)
        if self.capacity is None:
            return _Counted(self, x, topk_weights, slots)
        if len(x) > self.capacity:
            raise ValueError(
                f"rank {self.mesh.rank} has {len(x)} tokens in a forward pass, and the capacity is "
                f"{self.capacity}; give Parallel a larger capacity, or None for any number"
            )
        return _Fixed(self, x, topk_weights, slots, self.capacity)

    def packed(self, x: Tensor) -> Tensor:
        """As tokens travel."""
        return fp8_rows(x) if self.fp8 else x

    def unpacked(self, rows: Tensor, like: Tensor) -> Tensor:
        return from_fp8_rows(rows, like.shape[1], like.dtype) if self.fp8 else rows


class _Counted:
    """Counts first, then as many rows as there are; in parts, each while experts work on another.

    The host waits once, for the counts of all parts.
    """

    def __init__(self, ranks: AllToAll, x: Tensor, topk_weights: Tensor, slots: Tensor) -> None:
        self._ranks, self._mesh = ranks, ranks.mesh
        tokens = x, topk_weights, slots
        parts = (tensor.tensor_split(ranks.chunks) for tensor in tokens)
        self._parts = [
            _Part(ranks, *part, ranks=ranks.mesh.ep_size) for part in zip(*parts, strict=True)
        ]
        sent = torch.stack([part.there.sum(0) for part in self._parts], 1)
        received = self._mesh.all_to_all(sent, "exchanging the counts of tokens").wait()
        counts = torch.stack([sent, received]).tolist()
        for i, part in enumerate(self._parts):
            part.sent, part.received = ([row[i] for row in side] for side in counts)
        self._answering = self._parts[0]

    def arrivals(self) -> Iterator[Arrival]:
        self._parts[0].send()
        for part, following in zip(self._parts, [*self._parts[1:], None], strict=True):
            arrival = part.arrive()
            if following is not None:
                following.send()
            self._answering = part
            yield arrival

    def answer(self, y: Tensor) -> None:
        self._answering.answer(y)

    def combine(self) -> Tensor:
        return torch.cat([part.combine() for part in self._parts])


class _Part:
    sent: list[int]
    """[R]"""
    received: list[int]
    """[R]"""

    def __init__(
        self, dispatcher: AllToAll, x: Tensor, topk_weights: Tensor, slots: Tensor, *, ranks: int
    ) -> None:
        self._dispatcher, self._mesh = dispatcher, dispatcher.mesh
        self._x = x
        self._choices = pack_choices(topk_weights, slots)
        self.there = destinations(slots, dispatcher.rank_of_slot, ranks)
        self._k = slots.shape[1]

    def send(self) -> None:
        order, self._places = pack_order(self.there, sum(self.sent), self._k)
        sizes = {"sent": self.sent, "received": self.received}
        rows = self._dispatcher.packed(self._x.index_select(0, order))
        self._rows = self._mesh.all_to_all(rows, _SENDING, **sizes)
        self._arriving = self._mesh.all_to_all(self._choices[order], _SENDING, **sizes)

    def arrive(self) -> Arrival:
        x = self._dispatcher.unpacked(self._rows.wait(), self._x)
        topk_weights, slots = unpack_choices(self._arriving.wait())
        return Arrival(x, topk_weights, self._dispatcher.rows(slots))

    def answer(self, y: Tensor) -> None:
        self._answers = self._mesh.all_to_all(y, _ANSWERING, sent=self.received, received=self.sent)

    def combine(self) -> Tensor:
        return sum_answers(self._answers.wait(), self._places)


class _Fixed:
    """All tokens of all ranks, C of each, come to every rank, and all answers go back."""

    def __init__(
        self, ranks: AllToAll, x: Tensor, topk_weights: Tensor, slots: Tensor, capacity: int
    ) -> None:
        self._ranks, self._mesh, self._x = ranks, ranks.mesh, x
        empty = (0, 0, 0, capacity - len(x))
        choices = pack_choices(F.pad(topk_weights, empty), F.pad(slots, empty, value=-1))
        self._rows = self._mesh.all_gather(ranks.packed(F.pad(x, empty)), _SENDING)
        self._choices = self._mesh.all_gather(choices, _SENDING)

    def arrivals(self) -> Iterator[Arrival]:
        x = self._ranks.unpacked(self._rows.wait(), self._x)
        topk_weights, slots = unpack_choices(self._choices.wait())
        yield Arrival(x, topk_weights, self._ranks.rows(slots))

    def answer(self, y: Tensor) -> None:
        self._answers = self._mesh.all_to_all(y, _ANSWERING)

    def combine(self) -> Tensor:
        answers = self._answers.wait().unflatten(0, (self._mesh.ep_size, -1))
        return answers[:, : len(self._x)].float().sum(0).to(self._x.dtype)


def _refuse_gradient(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "there is no gradient through experts of other ranks; use torch.no_grad() or "
            "torch.inference_mode()"
        )
