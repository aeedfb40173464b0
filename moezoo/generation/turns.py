"""Forward passes that all ranks make together, where experts are divided over them.

In one process, where the decoder has no `peers`, these functions do nothing.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moezoo.layers.decoder import Decoder
from moezoo.layers.peers import Turn


def joint_pass(decoder: Decoder, new_ids: Tensor) -> AbstractContextManager[None]:
    """Return a context for a forward pass over new_ids [B, T]; it is entered with all ranks."""
    peers = decoder.peers
    if peers is None:
        return nullcontext()
    rows, length = new_ids.shape
    if length == 1 and not peers.same_tokens:
        return peers.forward_pass(peers.begin(rows))
    return peers.forward_pass(peers.begin(0, new_ids.tolist()))


@torch.inference_mode()
def make_remaining_passes(decoder: Decoder) -> None:
    """Make the forward passes that other ranks still have, without tokens of this rank."""
    if decoder.peers is not None:
        while (turn := decoder.peers.begin(0)).goes_on:
            pass_without_tokens(decoder, turn)


def pass_without_tokens(decoder: Decoder, turn: Turn) -> None:
    """Make one forward pass of the other ranks, without tokens of this rank."""
    assert decoder.peers is not None
    with decoder.peers.forward_pass(turn):
        decoder.peers.step_without_tokens(decoder)


def limited(decoder: Decoder, num_tokens: int) -> int:
    """Return `num_tokens`, or the most that a rank may have in a forward pass if that is less."""
    limit = None if decoder.peers is None else decoder.peers.limit
    return num_tokens if limit is None else min(num_tokens, limit)


def chosen(decoder: Decoder, tensor: Tensor) -> Tensor:
    """Return what this rank chose for its rows, or the first rank's choice if all have the same."""
    return tensor if decoder.peers is None else decoder.peers.chosen(tensor)


def largest(decoder: Decoder, *numbers: int) -> list[int]:
    """Return the maximum over ranks of each number."""
    return list(numbers) if decoder.peers is None else decoder.peers.largest(*numbers)


def smallest(decoder: Decoder, *numbers: int) -> list[int]:
    """Return the minimum over ranks of each number."""
    return [-number for number in largest(decoder, *(-number for number in numbers))]
