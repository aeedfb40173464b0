"""Dispatchers: they bring tokens to the ranks that hold their experts, and the outputs back.

Rounding points: a rank sums the outputs of its experts for a token in fp32 and rounds the sum to
the model's dtype, as one process does. These sums are sent back, added in fp32 in the order of
ranks (with `AllGather` in that of the collective, which is the same on all ranks), and rounded once
more.

Legend: T tokens of this rank, H hidden, K experts per token, R ranks of the expert group, C
capacity, S rows sent: a token once for each rank that it goes to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from moezoo.device import HostCopies
from moezoo.layers.kernels.row_format import RowFormat
from moezoo.layers.moe import Arrival, Flight
from moezoo.parallel.mesh import Mesh, Pending
from moezoo.parallel.pack import (
    destinations,
    local_rows,
    pack_order,
    pack_rows,
    sum_answers,
    unpack_rows,
)

Tokens = tuple[Tensor, Tensor, Tensor]
"""x [T, H], topk_weights [T, K] and slots [T, K]."""

BEGINNING = "beginning a forward pass"
_SENDING, _ANSWERING = "sending tokens to experts", "sending the experts' outputs back"

FEW_ROWS = 1024
"""Number of rows up to which a fixed buffer is cheaper than counting: to send a rank so many
superfluous rows (15 MB of DeepSeek-V3) takes 0.04 ms by NVLink and 0.3 ms by a network of 50 GB/s;
for the host to exchange counts takes 0.5 ms on four H200."""


class _Ranks:
    """The base of both dispatchers: rank r has slots bounds[r] to bounds[r + 1]."""

    def __init__(self, mesh: Mesh, bounds: Sequence[int], *, chunks: int = 1) -> None:
        self.mesh = mesh
        self.chunks = chunks
        self.first, self.stop = bounds[mesh.ep_rank], bounds[mesh.ep_rank + 1]
        sizes = [end - start for start, end in pairwise(bounds)]
        owners = torch.arange(len(sizes) + 1).repeat_interleave(torch.tensor([*sizes, 1]))
        self.rank_of_slot = owners.to(mesh.device)
        """The rank of each slot, int64 [P + 1], as `destinations` takes it."""


class AllGather(_Ranks):
    """All ranks have the same tokens; each applies its own experts, and the outputs are summed.

    If ranks had different tokens, the sums would be wrong without any error. So ranks compare their
    numbers of tokens, since collectives of different sizes could wait for ever, and a digest of the
    tokens in a forward pass's first layer. On a GPU the host reads the digests when all layers are
    queued: it waits for the first layer only, while the others still run.
    """

    _agreed = False
    _in_pass = False
    _compared: HostCopies | None = None
    """The ranks' digests of this forward pass, fp64 [R]; None before they are exchanged."""

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Skip the comparison in the block: its tokens are known to be the same on all ranks."""
        before, self._agreed = self._agreed, True
        try:
            yield
        finally:
            self._agreed = before

    @contextmanager
    def forward_pass(self, num_tokens: int) -> Iterator[None]:
        """Return a context for one forward pass over so many tokens.

        Raises ValueError, on every rank: at the beginning where ranks have different numbers of
        tokens, and at the end where the tokens were different.
        """
        if not self._agreed and not _is_captured(self.mesh.device):
            counts = [number for (number,) in self.mesh.numbers([num_tokens], BEGINNING)]
            self._require_same([count != num_tokens for count in counts])
        self._in_pass = True
        try:
            yield
            self._compare()
        finally:
            self._in_pass, self._compared = False, None

    def dispatch(self, x: Tensor, topk_weights: Tensor, slots: Tensor) -> Flight:
        """Return the flight of a layer's tokens.

        Raises ValueError as `forward_pass` does, but at once on a CPU and outside of that.
        """
        _refuse_gradient(x)
        if not self._agreed and self._compared is None and not _is_captured(x.device):
            own = _digest(x)[None]
            self._compared = HostCopies(self.mesh.all_gather(own, "comparing tokens").wait())
            if not (self._in_pass and x.is_cuda):
                self._compare()
            if not self._in_pass:
                self._compared = None
        return _Shared(self, x, topk_weights, slots)

    def _compare(self) -> None:
        if self._compared is None:
            return
        (digests,) = self._compared.wait()
        digests = digests.view(torch.int64)
        self._require_same((digests != digests[self.mesh.ep_rank]).tolist())

    def _require_same(self, differs: Sequence[bool]) -> None:
        if any(differs):
            raise ValueError(
                f"rank {self.mesh.group_ranks[differs.index(True)]} has other tokens than rank "
                f"{self.mesh.rank}, and dispatch='all_gather' is for the same ones on all ranks; "
                "give all the same inputs, or use dispatch='all_to_all'"
            )


def _digest(x: Tensor) -> Tensor:
    """Return a digest fp64 [] of x [T, H], which depends on the tokens, their order and T."""
    places = torch.arange(1, len(x) + 1, dtype=torch.float64, device=x.device)
    return x.sum(1, dtype=torch.float64).add_(1).dot(places)


class _Shared:
    """The flight of one layer's tokens with `AllGather`."""

    def __init__(self, ranks: AllGather, x: Tensor, topk_weights: Tensor, slots: Tensor) -> None:
        self._mesh, self._dtype = ranks.mesh, x.dtype
        tokens = x, topk_weights, local_rows(slots, ranks.first, ranks.stop)
        self._parts = [Arrival(*part) for part in _parts(tokens, ranks.chunks)]
        self._sums: list[Pending[Tensor]] = []

    def arrivals(self) -> Iterator[Arrival]:
        yield from self._parts

    def answer(self, y: Tensor) -> None:
        self._sums.append(self._mesh.all_reduce(y.float(), "summing the experts' outputs"))

    def combine(self) -> Tensor:
        return _joined([part.wait() for part in self._sums]).to(self._dtype)


class AllToAll(_Ranks):
    """Each rank has tokens of its own, and sends each token to every rank that has experts of it.

    Either ranks exchange in each layer how many tokens go where, for which the host waits, or
    buffers have a fixed size, the capacity, and every rank sends all its tokens to all ranks. If no
    capacity is set, ranks exchange once per forward pass how many tokens each has; the largest
    number is the capacity of the pass where that is cheaper, see `capacity_for`.
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
        self._form: RowFormat | None = None
        self._tokens: Sequence[int] | None = None
        """Number of tokens of each rank in this forward pass, if known."""

    @contextmanager
    def fixed(self, capacity: int) -> Iterator[None]:
        """Set the capacity of forward passes in the block; all ranks give the same number."""
        before, self.capacity = self.capacity, capacity
        try:
            yield
        finally:
            self.capacity = before

    @contextmanager
    def agreed(self, tokens: Sequence[int]) -> Iterator[None]:
        """Set the numbers of tokens of each rank in the block, so that they are not exchanged."""
        before, self._tokens = self._tokens, tokens
        try:
            yield
        finally:
            self._tokens = before

    @contextmanager
    def forward_pass(self, num_tokens: int) -> Iterator[None]:
        """Return a context for one forward pass; ranks exchange numbers of tokens if needed."""
        # A graph would replay with the numbers of its capture.
        if self.capacity is not None or _is_captured(self.mesh.device):
            yield
            return
        if self._tokens is not None:
            assert self._tokens[self.mesh.ep_rank] == num_tokens, "not what was agreed on"
            yield
            return
        with self.agreed([number for (number,) in self.mesh.numbers([num_tokens], BEGINNING)]):
            yield

    def capacity_for(self, k: int) -> int | None:
        """Return the capacity of this pass for tokens of k experts each, or None to count.

        Under even routing a token goes to a rank with probability p = 1 - (1 - 1/R)^K. So of T_r
        tokens on rank r, counting sends p T_r to each rank, while a capacity C, the largest of the
        T_r, sends C: R C rows instead of p sum(T_r). The capacity is used where that is at most
        twice as many, or R C is small: with equal numbers, up to 12 ranks for 8 experts per token,
        and 3 for 2.
        """
        if self.capacity is not None or self._tokens is None:
            return self.capacity
        ranks, most = self.mesh.ep_size, max(self._tokens)
        counted = (1 - (1 - 1 / ranks) ** k) * sum(self._tokens)
        return most if ranks * most <= max(FEW_ROWS, 2 * counted) else None

    def dispatch(self, x: Tensor, topk_weights: Tensor, slots: Tensor) -> Flight:
        """Return the flight of a layer's tokens; raises ValueError for more than the capacity."""
        _refuse_gradient(x)
        capacity = self.capacity_for(slots.shape[1])
        if capacity is None:
            return _Counted(self, x, topk_weights, slots)
        if len(x) > capacity:
            raise beyond_capacity(self.mesh.rank, len(x), capacity)
        return _Fixed(self, x, topk_weights, slots, capacity)

    def format(self, x: Tensor, slots: Tensor) -> RowFormat:
        """Return the row format of tokens; the last one is kept, as most models have one only."""
        form, sizes = self._form, (x.shape[1], slots.shape[1], x.dtype)
        if form is None or (form.hidden_size, form.k, form.dtype) != sizes:
            form = self._form = RowFormat(*sizes, self.fp8)
        return form

    def arrival(self, form: RowFormat, rows: Tensor) -> Arrival:
        """Unpack received rows; choices of other ranks' experts become -1."""
        return Arrival(*unpack_rows(form, rows, self.first, self.stop))


class _Counted:
    """A flight with exchanged counts: ranks send exactly the rows that are needed.

    Tokens travel in parts, each while experts work on the one before. The host waits once, for the
    counts of all parts.
    """

    def __init__(self, ranks: AllToAll, x: Tensor, topk_weights: Tensor, slots: Tensor) -> None:
        self._mesh = ranks.mesh
        parts = _parts((x, topk_weights, slots), ranks.chunks)
        self._parts = [_Part(ranks, *part) for part in parts]
        sent = torch.stack([part.counts for part in self._parts], 1)
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
        return _joined([part.combine() for part in self._parts])


class _Part:
    """One part of a `_Counted` flight."""

    sent: list[int]
    """Number of rows for each rank, [R]."""
    received: list[int]
    """Number of rows from each rank, [R]."""

    def __init__(
        self, dispatcher: AllToAll, x: Tensor, topk_weights: Tensor, slots: Tensor
    ) -> None:
        self._dispatcher, self._mesh = dispatcher, dispatcher.mesh
        self._form, self._tokens = dispatcher.format(x, slots), (x, topk_weights, slots)
        self._there = destinations(slots, dispatcher.rank_of_slot, self._mesh.ep_size)
        self.counts = self._there.sum(0)

    def send(self) -> None:
        order, self._places = pack_order(self._there, self.counts, sum(self.sent), self._form.k)
        rows = pack_rows(self._form, *self._tokens, len(self._tokens[0]))
        self._rows = self._mesh.all_to_all(
            rows.index_select(0, order), _SENDING, sent=self.sent, received=self.received
        )

    def arrive(self) -> Arrival:
        return self._dispatcher.arrival(self._form, self._rows.wait())

    def answer(self, y: Tensor) -> None:
        self._answers = self._mesh.all_to_all(y, _ANSWERING, sent=self.received, received=self.sent)

    def combine(self) -> Tensor:
        return sum_answers(self._answers.wait(), self._places)


class _Fixed:
    """A flight of fixed size: C tokens of each rank go to every rank, and all answers come back.

    Tokens travel in parts, as in `_Counted`.
    """

    def __init__(
        self, ranks: AllToAll, x: Tensor, topk_weights: Tensor, slots: Tensor, capacity: int
    ) -> None:
        self._ranks, self._mesh = ranks, ranks.mesh
        self._form, self._tokens = ranks.format(x, slots), (x, topk_weights, slots)
        # Sizes are the same on all ranks, and not 0, which not every backend supports.
        size = max(1, -(-capacity // ranks.chunks))
        starts = range(0, max(1, capacity), size)
        self._parts = [slice(start, min(start + size, max(1, capacity))) for start in starts]
        self._answers: list[Pending[Tensor]] = []

    def _send(self, part: slice) -> Pending[Tensor]:
        tokens = self._tokens
        if len(self._parts) > 1:
            tokens = tokens[0][part], tokens[1][part], tokens[2][part]
        rows = pack_rows(self._form, *tokens, part.stop - part.start)
        return self._mesh.all_gather(rows, _SENDING)

    def arrivals(self) -> Iterator[Arrival]:
        coming = self._send(self._parts[0])
        for following in [*self._parts[1:], None]:
            arrival = self._ranks.arrival(self._form, coming.wait())
            if following is not None:
                coming = self._send(following)
            yield arrival

    def answer(self, y: Tensor) -> None:
        self._answers.append(self._mesh.all_to_all(y, _ANSWERING))

    def combine(self) -> Tensor:
        num_tokens = len(self._tokens[0])
        sums = []
        for part, pending in zip(self._parts, self._answers, strict=True):
            answers = pending.wait()
            answers = answers.view(self._mesh.ep_size, -1, answers.shape[1])
            number = min(max(0, num_tokens - part.start), answers.shape[1])
            # Added in fp32 by torch, and rounded once.
            sums.append(answers.narrow(1, 0, number).sum(0))
        return _joined(sums)


def beyond_capacity(rank: int, num_tokens: int, capacity: int) -> ValueError:
    """Make the error for a rank with more tokens than the capacity."""
    return ValueError(
        f"rank {rank} has {num_tokens} tokens in a forward pass, and the capacity is {capacity}; "
        "give fewer at a time, or Parallel a larger capacity, or None for any number"
    )


def _parts(tokens: Tokens, number: int) -> list[Tokens]:
    if number == 1:
        return [tokens]
    return list(zip(*(tensor.tensor_split(number) for tensor in tokens), strict=True))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse_gradient(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "there is no gradient through experts of other ranks; use torch.no_grad() or "
            "torch.inference_mode()"
        )
