"""The state space of Mamba-2 against transformers' functions."""

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional as F
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as theirs

from moezoo.layers.state_space import state_space

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(batch, length, *, heads=3, width=5, state=7, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    return {
        "x": randn(batch, length, heads, width),
        "b": randn(batch, length, state),
        "c": randn(batch, length, state),
        "dt": F.softplus(randn(batch, length, heads)),
        "rate": -randn(heads).exp(),
        "state": randn(batch, heads, width, state),
    }


def part(x, places):
    return {name: t if name in ("state", "rate") else t[:, places] for name, t in x.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 2, 64, 65, 150])
def test_as_transformers(length, device):
    x = inputs(2, length, device=device)
    y, state = state_space(**x)
    expected, after = theirs.mamba2_chunk_scan(
        x["x"],
        x["dt"],
        x["rate"],
        x["b"][:, :, None],
        x["c"][:, :, None],
        chunk_size=32,
        initial_states=x["state"],
        return_final_states=True,
    )
    assert_close(y, expected)
    assert_close(state, after)


@pytest.mark.parametrize("lengths", [(64, 1, 1), (1, 70), (100, 3, 64)])
def test_pieces_go_on_from_the_state(lengths):
    x = inputs(2, sum(lengths))
    whole, after = state_space(**x)
    pieces, start = [], 0
    for length in lengths:
        y, x["state"] = state_space(**part(x, slice(start, start + length)))
        pieces.append(y)
        start += length
    assert_close(torch.cat(pieces, 1), whole)
    assert_close(x["state"], after)


def test_a_token_without_a_time_step_leaves_the_state():
    x = inputs(2, 70)
    x["dt"][0, 40:] = 0
    _, state = state_space(**x)
    _, expected = state_space(**part(x, slice(40)))
    assert_close(state[0], expected[0])
    _, state = state_space(**part(x, slice(40, 41)))
    assert state[0].equal(x["state"][0])
