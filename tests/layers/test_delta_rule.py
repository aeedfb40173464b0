"""The gated delta rule and its convolution, against transformers' functions and token by token."""

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional as F
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from moezoo.layers.convolution import CausalConvolution
from moezoo.layers.delta_rule import gated_delta_rule

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(batch, length, *, k_heads=2, v_heads=6, k_dim=7, v_dim=5, g_dim=1, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(batch, *shape, generator=generator).to(device)

    return {
        "q": randn(length, k_heads, k_dim),
        "k": randn(length, k_heads, k_dim),
        "v": randn(length, v_heads, v_dim),
        "g": -F.softplus(randn(length, v_heads, g_dim)),
        "beta": randn(length, v_heads).sigmoid(),
        "state": randn(v_heads, k_dim, v_dim),
    }


def part(x, places):
    return {name: t if name == "state" else t[:, places] for name, t in x.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_as_transformers_token_by_token(length, device):
    x = inputs(3, length, device=device)
    y, state = gated_delta_rule(**x)
    q, k = (x[name].repeat_interleave(3, 2) for name in "qk")
    expected, after = theirs.torch_recurrent_gated_delta_rule(
        q,
        k,
        x["v"],
        g=x["g"][..., 0],
        beta=x["beta"],
        initial_state=x["state"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    assert_close(y, expected)
    assert_close(state, after)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 150])
def test_a_decay_of_each_channel_as_transformers_token_by_token(length, device):
    x = inputs(3, length, g_dim=7, device=device)
    y, state = gated_delta_rule(**x)
    q, k = (x[name].repeat_interleave(3, 2) for name in "qk")
    expected, after = kimi.recurrent_kimi_delta_attention(
        q,
        k,
        x["v"],
        x["g"],
        x["beta"],
        initial_state=x["state"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    assert_close(y, expected)
    assert_close(state, after)


@pytest.mark.parametrize("length", [1, 5, 64, 90])
def test_channels_that_decay_alike_are_a_head_that_decays(length):
    x = inputs(2, length)
    expected, after = gated_delta_rule(**x)
    y, state = gated_delta_rule(**x | {"g": x["g"].expand(-1, -1, -1, 7)})
    assert_close(y, expected)
    assert_close(state, after)


@pytest.mark.parametrize("g_dim", [1, 7])
@pytest.mark.parametrize("lengths", [(64, 1, 1), (1, 70), (100, 3, 64)])
def test_pieces_go_on_from_the_state(lengths, g_dim):
    x = inputs(2, sum(lengths), v_heads=2, g_dim=g_dim)
    whole, after = gated_delta_rule(**x)
    pieces, start = [], 0
    for length in lengths:
        y, x["state"] = gated_delta_rule(**part(x, slice(start, start + length)))
        pieces.append(y)
        start += length
    assert_close(torch.cat(pieces, 1), whole)
    assert_close(x["state"], after)


@pytest.mark.parametrize("g_dim", [1, 7])
def test_a_token_without_beta_and_decay_leaves_the_state(g_dim):
    x = inputs(2, 70, g_dim=g_dim)
    x["g"][0, 40:], x["beta"][0, 40:] = 0, 0
    _, state = gated_delta_rule(**x)
    _, expected = gated_delta_rule(**part({n: t[:1] for n, t in x.items()}, slice(40)))
    assert_close(state[:1], expected)
    x = part(x, slice(40, 41))
    _, state = gated_delta_rule(**x)
    assert state[0].equal(x["state"][0])


@pytest.mark.parametrize("g_dim", [1, 7])
def test_a_decay_that_underflows_is_finite(g_dim):
    x = inputs(1, 130, g_dim=g_dim)
    x["g"] *= 1e4
    y, state = gated_delta_rule(**x)
    assert y.isfinite().all() and state.isfinite().all()


def test_a_channel_that_forgets_at_once_among_those_that_do_not():
    """exp(-decay) of a chunk would overflow."""
    x = inputs(2, 100, g_dim=7)
    x["g"][:, ::3] *= 300
    x["g"][..., -1] *= 20
    y, state = gated_delta_rule(**x)
    exact, after = gated_delta_rule(**part(x, slice(1)))
    pieces = [exact]
    for t in range(1, 100):
        exact, after = gated_delta_rule(**part(x, slice(t, t + 1)) | {"state": after})
        pieces.append(exact)
    assert_close(y, torch.cat(pieces, 1))
    assert_close(state, after)


def convolution(width, channels=6):
    layer = CausalConvolution(channels, width)
    torch.nn.init.normal_(layer.weight)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(9,), (1, 1, 1, 6), (2, 7), (5, 1, 3)])
def test_convolution_in_pieces_is_that_of_torch(width, lengths):
    layer = convolution(width)
    x = torch.randn(3, 9, 6)
    expected = F.conv1d(F.pad(x.mT, (width - 1, 0)), layer.weight, groups=6).mT
    state = torch.zeros(3, *layer.state_shape.shape)
    pieces = []
    for piece in x.split(lengths, 1):
        y, state = layer(piece, state, None)
        pieces.append(y)
    assert_close(torch.cat(pieces, 1), expected)
    assert state.equal(F.pad(x.mT, (width, 0))[..., -width:])


@torch.no_grad()
def test_convolution_past_places_without_tokens():
    layer = convolution(4)
    x, lengths = torch.randn(4, 7, 6), (7, 2, 0, 5)
    before = torch.randn(4, 6, 4)
    real = torch.arange(7) < torch.tensor(lengths)[:, None]
    y, state = layer(x.masked_fill(~real[..., None], torch.nan), before, real)
    for row, length in enumerate(lengths):
        if length == 0:
            assert state[row].equal(before[row])
            continue
        expected, after = layer(x[row : row + 1, :length], before[row : row + 1], None)
        assert_close(y[row : row + 1, :length], expected)
        assert state[row].equal(after[0])


@torch.no_grad()
def test_zeros_come_before_a_row_that_is_padded_on_the_left():
    layer = convolution(3)
    x = torch.randn(1, 6, 6)
    y, state = layer(x, torch.zeros(1, 6, 3), torch.tensor([[False] * 3 + [True] * 3]))
    expected, after = layer(x[:, 3:], torch.zeros(1, 6, 3), None)
    assert_close(y[:, 3:], expected)
    assert state.equal(after)
