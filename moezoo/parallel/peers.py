"""The implementations of `Peers`: generation together with the other ranks of an expert group."""

from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager
from zlib import crc32

from torch import Tensor

from moezoo.errors import ExpertMapError
from moezoo.layers.decoder import Decoder
from moezoo.layers.peers import Peers, Turn
from moezoo.parallel.dispatch import BEGINNING, AllGather, AllToAll, beyond_capacity
from moezoo.parallel.mesh import Mesh
from moezoo.parallel.sharding import step_without_tokens

_AGREEING, _CHOOSING = "comparing the settings of generation", "agreeing on tokens"


def peers_of(decoder: Decoder, mesh: Mesh) -> Peers | None:
    """Return the `Peers` of a decoder that `shard_` divided, or None where one rank has all."""
    dispatcher = next(iter(decoder.moe_layers.values())).dispatcher
    if dispatcher is None:
        return None
    if isinstance(dispatcher, AllToAll):
        return _OwnTokens(mesh, dispatcher)
    assert isinstance(dispatcher, AllGather)
    return _SameTokens(mesh, dispatcher)


class _Ranks:
    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def step_without_tokens(self, decoder: Decoder) -> None:
        step_without_tokens(decoder)

    def largest(self, *numbers: int) -> list[int]:
        return _largest(self._mesh.numbers(numbers, _AGREEING))

    def same(self, **numbers: int) -> None:
        first, *others = self._mesh.numbers(list(numbers.values()), _AGREEING)
        ranks = self._mesh.group_ranks
        for rank, theirs in zip(ranks[1:], others, strict=True):
            for name, one, other in zip(numbers, first, theirs, strict=True):
                if one != other:
                    raise ExpertMapError(
                        f"{name} is {one} on rank {ranks[0]} and {other} on rank {rank}; give all "
                        "ranks the same"
                    )


class _SameTokens(_Ranks):
    """All ranks make the same passes over the same tokens, which the first rank chooses."""

    same_tokens = True
    limit: int | None = None

    def __init__(self, mesh: Mesh, dispatcher: AllGather) -> None:
        super().__init__(mesh)
        self._dispatcher = dispatcher

    def begin(self, rows: int, prompts: Sequence[Sequence[int]] = ()) -> Turn:
        digest = crc32(array("q", [rows, *map(len, prompts)]))
        for tokens in prompts:
            digest = crc32(array("q", tokens), digest)
        first, *others = (digest for (digest,) in self._mesh.numbers([digest], BEGINNING))
        for rank, other in zip(self._mesh.group_ranks[1:], others, strict=True):
            if other != first:
                raise ExpertMapError(
                    f"ranks {self._mesh.group_ranks[0]} and {rank} generate from other prompts or "
                    "with other settings than each other; with dispatch='all_gather' give all the "
                    "same, or use dispatch='all_to_all'"
                )
        number = rows + sum(map(len, prompts))
        return Turn(number > 0, rows or None, [number] * self._mesh.ep_size)

    def forward_pass(self, turn: Turn) -> AbstractContextManager[None]:
        return self._dispatcher.agreed()

    def chosen(self, tensor: Tensor) -> Tensor:
        return self._mesh.broadcast(tensor, _CHOOSING).wait()


class _OwnTokens(_Ranks):
    """Each rank has prompts of its own.

    In a pass in which a rank has a prompt, buffers follow from the ranks' numbers of tokens; in
    others their capacity is the largest number of rows.
    """

    same_tokens = False

    def __init__(self, mesh: Mesh, dispatcher: AllToAll) -> None:
        super().__init__(mesh)
        self._dispatcher = dispatcher
        self.limit = dispatcher.capacity

    def begin(self, rows: int, prompts: Sequence[Sequence[int]] = ()) -> Turn:
        own = [len(prompts) > 0, rows + sum(map(len, prompts))]
        given = self._mesh.numbers(own, BEGINNING)
        tokens = [number for _, number in given]
        most = max(tokens)
        if self.limit is not None and most > self.limit:
            raise beyond_capacity(self._mesh.group_ranks[tokens.index(most)], most, self.limit)
        has_prompts = any(prompted for prompted, _ in given)
        return Turn(most > 0, None if has_prompts else most, tokens)

    def forward_pass(self, turn: Turn) -> AbstractContextManager[None]:
        if turn.capacity is None:
            return self._dispatcher.agreed(turn.tokens)
        return self._dispatcher.fixed(turn.capacity)

    def chosen(self, tensor: Tensor) -> Tensor:
        return tensor


def _largest(numbers: Sequence[Sequence[int]]) -> list[int]:
    return [max(column) for column in zip(*numbers, strict=True)]
