import re

import pytest
import torch
from tolerances import RELATIVE, relative_difference
from torch import Tensor

from kernels.fp8_cases import FORMATS, weights
from moezoo.layers.kernels.activations import Gating
from moezoo.layers.kernels.one_token_fp8 import one_token_fp8, one_token_fp8_ref
from moezoo.layers.quant.channel_fp8 import Fp8Weights
from moezoo.layers.quant.fp8 import BlockFp8


def inputs(
    shape: tuple[int, int, int, int],
    device: torch.device,
    format_: type[Fp8Weights] = BlockFp8,
) -> dict[str, object]:
    num_experts, k, hidden, intermediate = shape
    generator = torch.Generator().manual_seed(0)
    options = {"device": device, "format_": format_}
    return {
        "x": torch.randn(1, hidden, generator=generator).to(device, torch.float16),
        "w13": weights(num_experts, 2, intermediate, hidden, seed=1, **options),
        "w2": weights(num_experts, hidden, intermediate, seed=2, **options),
        "topk_weights": torch.rand(1, k, generator=generator).to(device),
        "topk_ids": torch.randperm(num_experts, generator=generator)[:k].int()[None].to(device),
    }


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """fp16, and a few elements of h that round to the neighbour in fp8 because of another order of
    sums."""
    assert actual.dtype == expected.dtype == torch.float16
    assert relative_difference(actual, expected) <= 4 * RELATIVE[torch.float16]


@pytest.mark.parametrize(
    "shape", [(4, 2, 40, 24), (1, 1, 1, 1), (8, 6, 200, 30), (4, 3, 1100, 300)], ids=str
)
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.usefixtures("fp8")
@pytest.mark.sampled(n=2)
def test_matches_reference(
    shape: tuple[int, int, int, int], format_: type[Fp8Weights], device: torch.device
) -> None:
    if device.type == "cpu" and shape[2] > 1000:
        pytest.skip("half a minute in the interpreter")
    arguments = inputs(shape, device, format_)
    assert_close(one_token_fp8(**arguments), one_token_fp8_ref(**arguments))


@pytest.mark.usefixtures("fp8")
def test_absent_experts_and_nan(device: torch.device) -> None:
    arguments = inputs((6, 4, 40, 24), device)
    arguments["topk_ids"][0, 2] = -1
    arguments["topk_weights"][0, 2] = torch.nan
    arguments["topk_ids"][0, 3] = 6
    assert_close(one_token_fp8(**arguments), one_token_fp8_ref(**arguments))
    arguments["topk_ids"].fill_(-1)
    assert not one_token_fp8(**arguments).any()


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.usefixtures("fp8")
def test_biases_gates_and_strides(format_: type[Fp8Weights], device: torch.device) -> None:
    arguments = inputs((4, 2, 144, 136), device, format_)
    generator = torch.Generator().manual_seed(3)
    arguments["bias13"] = torch.randn(4, 2, 136, generator=generator).to(device)
    arguments["bias2"] = torch.randn(4, 144, generator=generator).to(device)
    arguments["activation"] = Gating("quick_gelu", limit=0.5, up_offset=1.0)
    expected = one_token_fp8_ref(**arguments)
    for name in ("w13", "w2"):
        data, scales = arguments[name].data, arguments[name].scales
        arguments[name] = format_(data.mT.contiguous().mT, scales.mT.contiguous().mT)
    arguments["x"] = arguments["x"].repeat_interleave(2, 1)[:, ::2]
    assert_close(one_token_fp8(**arguments), expected)


@pytest.mark.usefixtures("fp8")
def test_without_a_gate(device: torch.device) -> None:
    arguments = inputs((4, 2, 40, 24), device)
    arguments["w13"] = weights(4, 1, 24, 40, device=device)
    arguments["activation"] = "relu2"
    assert_close(one_token_fp8(**arguments), one_token_fp8_ref(**arguments))


def test_refuses() -> None:
    arguments = inputs((4, 2, 40, 24), torch.device("cpu"))
    for change, message in (
        ({"x": torch.zeros(2, 40)}, "x must be [1, 40]"),
        ({"topk_ids": torch.zeros(1, 3).int()}, "topk_weights and topk_ids must be [1, K]"),
        ({"w13": weights(4, 48, 40, device=torch.device("cpu"))}, "w13 must be [E, 2 or 1, I, H]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            one_token_fp8(**(arguments | change))
