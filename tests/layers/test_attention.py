"""Attention with sinks against gpt-oss' own in transformers."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import nn
from transformers import DynamicCache, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.context import DenseContext
from moezoo.layers.mask import CausalMask
from moezoo.layers.rope import RotaryEmbedding
from moezoo.layers.softmax_attention import attend

HIDDEN, HEADS, KEY_HEADS, DIM = 20, 6, 2, 10


def pair(window: int | None) -> tuple[GroupedQueryAttention, GptOssAttention, GptOssConfig]:
    """Both with the same random weights, biases and sinks."""
    kind = "full_attention" if window is None else "sliding_attention"
    config = GptOssConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=DIM,
        num_hidden_layers=1,
        sliding_window=window,
        layer_types=[kind],
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = GptOssAttention(config, layer_idx=0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = GroupedQueryAttention(
        *(HIDDEN, HEADS, KEY_HEADS),
        head_dim=DIM,
        qkv_bias=True,
        out_bias=True,
        window=window,
        sinks=nn.Parameter(theirs.sinks.detach().clone()),
    )
    state = theirs.state_dict()
    parts = {
        f"qkv.{kind}": torch.cat([state[f"{part}_proj.{kind}"] for part in "qkv"])
        for kind in ("weight", "bias")
    }
    kept = {f"o.{kind}": state[f"o_proj.{kind}"] for kind in ("weight", "bias")}
    ours.load_state_dict(parts | kept | {"sinks": state["sinks"]})
    return ours, theirs, config


def additive(mask: CausalMask, num_keys: int, window: int | None) -> torch.Tensor | None:
    allowed = mask(num_keys, window)
    if allowed is None:
        return None
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_sinks_in_chunks(window: int | None, padded: bool) -> None:
    """Two chunks and single tokens, longer than the window, on transformers' cache."""
    ours, theirs, config = pair(window)
    x = torch.randn(2, 11, HIDDEN)
    visible = torch.ones(2, 11, dtype=torch.bool)
    visible[1, :3] = not padded
    caches = DynamicCache(config=config), DynamicCache(config=config)
    start = 0
    for size in (5, 3, 1, 1, 1):
        end = start + size
        positions = torch.arange(start, end)[None]
        mask = CausalMask(start, size, x.device, visible[:, :end] if padded else None)
        rotation = RotaryEmbedding(config)(positions, torch.float32)
        out = ours(x[:, start:end], DenseContext(rotation, mask, caches[0]), 0)
        angles = GptOssRotaryEmbedding(config)(x, positions)
        num_keys = end if window is None else min(end, size + window - 1)
        expected, _ = theirs(
            x[:, start:end], angles, additive(mask, num_keys, window), past_key_values=caches[1]
        )
        kept = visible[:, start:end]
        assert_close(out[kept], expected[kept])
        start = end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 7, 9])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_sinks_in_sixteen_bits(dtype: torch.dtype, length: int, device: str) -> None:
    """A width whose scale is no power of two, sinks that outweigh the keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, tokens, 24, generator=generator).to(device, dtype)
        for heads, tokens in ((6, length), (2, 9), (2, 9))
    )
    sinks = torch.linspace(-3, 9, 6, device=device).to(dtype)
    mask = CausalMask(9 - length, length, q.device)
    out = attend(q, k, v, mask, window=5, scale=24**-0.5, sinks=sinks)
    k, v = (x.double().repeat_interleave(3, 1) for x in (k, v))
    numerators = (24**-0.5 * q.double() @ k.mT).exp()
    allowed = mask(9, 5)
    assert allowed is not None
    numerators = numerators.masked_fill(~allowed, 0.0)
    total = numerators.sum(-1, keepdim=True) + sinks.double().exp()[:, None, None]
    assert_close(out, (numerators / total @ v).to(dtype))


def test_sinks_learn() -> None:
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    sinks = torch.zeros(2, requires_grad=True)
    mask = CausalMask(0, 3, q.device)
    attend(q, k, v, mask, scale=1.0, sinks=sinks).square().sum().backward()
    step = 1e-3 * torch.eye(2)[0]
    losses = [
        attend(q, k, v, mask, scale=1.0, sinks=moved.detach()).square().sum()
        for moved in (sinks + step, sinks - step)
    ]
    assert sinks.grad is not None
    slope = (losses[0] - losses[1]) / 2e-3
    torch.testing.assert_close(sinks.grad[0], slope, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("visible", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("length", [1, 7, 9])
@pytest.mark.parametrize(("width", "value_width"), [(12, 8), (8, 12), (8, 8)])
@torch.inference_mode()
def test_values_of_another_width(
    width: int, value_width: int, length: int, visible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU torch gets heads of one width for a prompt: that it then takes one kernel."""
    q, k = torch.randn(2, 4, length, width), torch.randn(2, 2, 9, width)
    v = torch.randn(2, 2, 9, value_width)
    past = 9 - length
    shown = torch.ones(2, 9, dtype=torch.bool)
    shown[0, 0] = not (visible and past)
    mask = CausalMask(past, length, q.device, shown if visible else None)
    scores = 0.3 * q @ k.repeat_interleave(2, 1).mT
    allowed = torch.ones(length, 9, dtype=torch.bool).tril(past) & shown[:, None, None]
    scores = scores.masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    widths = []
    attention = F.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        widths.append({x.shape[-1] for x in (q, k, v)})
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    assert_close(attend(q, k, v, mask, scale=0.3), expected)
    assert widths == [{max(width, value_width)} if length > 1 else {width, value_width}]
