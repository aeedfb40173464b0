"""Forward passes in step with other processes, where experts are divided over them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moezoo.layers.decoder import Decoder
from moezoo.layers.peers import Turn


def in_turn(decoder: Decoder, new_ids: Tensor) -> AbstractContextManager[None]:
    """For a pass over new_ids [B, T]: the block begins when all ranks begin one."""
    peers = decoder.peers
    if peers is None:
        return nullcontext()
    rows, length = new_ids.shape
    if length == 1 and not peers.alike:
        return peers.passing(peers.begin(rows))
    return peers.passing(peers.begin(0, new_ids.tolist()))


@torch.inference_mode()
def take_part(decoder: Decoder) -> None:
    """Go through the passes that other ranks still have."""
    if decoder.peers is not None:
        while (turn := decoder.peers.begin(0)).goes_on:
            pass_without_tokens(decoder, turn)


def pass_without_tokens(decoder: Decoder, turn: Turn) -> None:
    assert decoder.peers is not None
    with decoder.peers.passing(turn):
        decoder.peers.step_without_tokens(decoder)


def limited(decoder: Decoder, num_tokens: int) -> int:
    """As many, or fewer where a pass of a rank may not have so many."""
    limit = None if decoder.peers is None else decoder.peers.limit
    return num_tokens if limit is None else min(num_tokens, limit)


def chosen(decoder: Decoder, tensor: Tensor) -> Tensor:
    """What was chosen, as all ranks with the same tokens go on with."""
    return tensor if decoder.peers is None else decoder.peers.chosen(tensor)


def largest(decoder: Decoder, *numbers: int) -> list[int]:
    """The largest of all ranks' numbers, each."""
    return list(numbers) if decoder.peers is None else decoder.peers.largest(*numbers)


def smallest(decoder: Decoder, *numbers: int) -> list[int]:
    """The smallest of all ranks' numbers, each."""
    return [-number for number in largest(decoder, *(-number for number in numbers))]
