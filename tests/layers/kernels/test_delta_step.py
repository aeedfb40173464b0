import re
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F

from moezoo.layers.delta_rule import gated_delta_rule
from moezoo.layers.kernels.convolution_step import convolution_step, convolution_step_ref
from moezoo.layers.kernels.delta_step import delta_step, delta_step_ref

SHAPES = [(1, 1, 1, 1, 1), (5, 2, 6, 6, 5), (3, 1, 2, 40, 72), (2, 4, 8, 128, 128)]
"""Rows, key heads, value heads, and their widths."""


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def step_inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    rows, k_heads, heads, k_dim, v_dim = shape
    drawn = generator()

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=drawn).to(dtype).to(device)

    wide = normal(rows, heads * v_dim + 3)
    return {
        "qkv": normal(rows, 2 * k_heads * k_dim + heads * v_dim),
        "z": wide[:, 3:].unflatten(1, (heads, v_dim)),
        "b": normal(rows, 2 * heads)[:, ::2],
        "a": normal(rows, heads),
        "state": normal(rows + 2, heads, k_dim, v_dim, dtype=torch.float32)[1:-1],
        "A_log": normal(heads),
        "dt_bias": normal(heads),
        "norm_weight": 1 + normal(v_dim) / 4,
        "eps": 1e-3,
    }


def rows_of(device: torch.device, *values: bool) -> Tensor:
    return torch.tensor(values, device=device)


def both(ours: Any, reference: Any, arguments: dict[str, Any], changed: str) -> None:
    found = []
    for function in (ours, reference):
        state = arguments[changed].clone()
        found.append((function(**arguments | {changed: state}), state))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    both(delta_step, delta_step_ref, step_inputs(shape, dtype, device), "state")


def test_the_reference_is_the_rule(device: torch.device) -> None:
    x = step_inputs((5, 2, 6, 6, 5), torch.float32, device)
    q, k, v = (part[:, None] for part in x["qkv"].split_with_sizes((12, 12, 30), -1))
    y, state = gated_delta_rule(
        q.unflatten(-1, (2, 6)),
        k.unflatten(-1, (2, 6)),
        v.unflatten(-1, (6, 5)),
        g=-x["A_log"].exp()[:, None] * F.softplus(x["a"] + x["dt_bias"])[:, None, :, None],
        beta=x["b"].sigmoid()[:, None],
        state=x["state"],
    )
    expected = F.rms_norm(y[:, 0], (5,), x["norm_weight"], x["eps"]) * F.silu(x["z"])
    assert_close(delta_step(**x), expected.flatten(1))
    assert_close(x["state"], state)


def test_rows_that_are_not_used_keep_their_state(device: torch.device) -> None:
    x = step_inputs((5, 2, 6, 6, 5), torch.float32, device)
    used = rows_of(device, True, False, False, True, False)
    both(delta_step, delta_step_ref, x | {"used": used}, "state")
    before = x["state"].clone()
    x["a"][1] = torch.nan
    delta_step(**x, used=used)
    assert x["state"][~used].equal(before[~used])
    assert (x["state"][used] != before[used]).any()


def test_large_gates(device: torch.device) -> None:
    x = step_inputs((3, 1, 2, 8, 8), torch.float32, device)
    x["a"] *= 1e3
    x["b"] = x["b"] * 1e3
    x["z"] = x["z"] * 1e2
    both(delta_step, delta_step_ref, x, "state")


def test_no_rows(device: torch.device) -> None:
    assert delta_step(**step_inputs((0, 1, 2, 8, 8), torch.float32, device)).shape == (0, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(3, 33)}, "qkv must be [N, 2 Hk 8 + 16] of dense rows"),
        ({"qkv": torch.zeros(3, 64)}, "Hk a divisor of 2, got [3, 64]"),
        ({"state": torch.zeros(3, 2, 8, 8).half()}, "state must be [3, H, Dk, Dv] float32"),
        ({"state": torch.zeros(3, 2, 8, 8).mT}, "state must have dense rows"),
        ({"z": torch.zeros(3, 16)}, "z must be [3, 2, 8] and dense, got [3, 16]"),
        ({"a": torch.zeros(3, 1)}, "a must be [3, 2]"),
        ({"used": torch.ones(3)}, "used must be [3] bool"),
    ],
)
def test_refused(changes: dict[str, Tensor], message: str) -> None:
    x = step_inputs((3, 1, 2, 8, 8), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        delta_step(**x | changes)


def convolution_inputs(
    rows: int, channels: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    drawn = generator()
    x, window, weight = (
        torch.randn(*size, generator=drawn).to(dtype).to(device)
        for size in ((rows, 2 * channels), (rows, width, channels), (channels, width))
    )
    return {"x": x[:, channels:], "window": window.mT, "weight": weight}


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize(("channels", "width"), [(1, 1), (40, 3), (600, 4), (256, 7)])
def test_convolution_matches_reference(
    channels: int, width: int, activation: str | None, dtype: torch.dtype, device: torch.device
) -> None:
    x = convolution_inputs(3, channels, width, dtype, device)
    x |= {"activation": activation, "used": rows_of(device, True, False, True)}
    both(convolution_step, convolution_step_ref, x, "window")
    x["bias"] = x["weight"][:, 0].contiguous()
    both(convolution_step, convolution_step_ref, x, "window")


def test_convolution_is_that_of_torch(device: torch.device) -> None:
    x = convolution_inputs(3, 40, 4, torch.float32, device)
    inputs = torch.cat((x["window"][..., 1:], x["x"][..., None]), -1)
    expected = F.conv1d(inputs, x["weight"][:, None], groups=40)[..., 0]
    assert_close(convolution_step(**x), expected)
    assert x["window"].equal(inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": torch.zeros(3, 40, 5)}, "window must be [3, 40, 4] torch.float32"),
        ({"weight": torch.zeros(4, 40).mT}, "weight must be [40, W] and contiguous"),
        ({"bias": torch.zeros(4)}, "bias must be [40]"),
        ({"x": torch.zeros(40, 3).mT}, "x must have dense rows"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"used": torch.ones(2, dtype=torch.bool)}, "used must be [3] bool"),
    ],
)
def test_convolution_refused(changes: dict[str, Any], message: str) -> None:
    x = convolution_inputs(3, 40, 4, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        convolution_step(**x | changes)
