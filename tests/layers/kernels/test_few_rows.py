import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from moezoo.layers.kernels import few_rows
from moezoo.layers.kernels.activations import Gating
from moezoo.layers.kernels.add_norm import add_rms_norm
from moezoo.layers.kernels.few_rows import (
    FEW_ROWS,
    Launch,
    add_norm_linear,
    add_norm_linear_ref,
    few_rows_linear,
    few_rows_linear_ref,
    gated_linear,
    gated_linear_ref,
    takes_gated,
)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def inputs(
    num_rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Arguments of `few_rows_linear`."""
    if dtype == torch.bfloat16 and device.type == "cpu" and num_rows > few_rows.REGISTER_ROWS:
        pytest.skip("the interpreter multiplies bfloat16 matrices wrongly")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(num_rows, k, generator=generator),
        "weight": torch.randn(n, k, generator=generator) * k**-0.5,
        "bias": torch.randn(n, generator=generator),
    }
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


def norm_inputs(
    num_rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Arguments of `add_norm_linear`."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter rounds to bfloat16 wrongly")
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(num_rows, k, generator=generator)
    norm_weight = torch.rand(k, generator=generator) + 0.5
    more = {"update": update.to(device, dtype), "norm_weight": norm_weight.to(device, dtype)}
    return inputs(num_rows, n, k, dtype, device) | more | {"eps": 1e-5}


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (7, 100), (300, 65), (40, 2049), (576, 2048), (33, 10944), (33, 20000)]
)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 8])
@pytest.mark.sampled(n=5)
def test_matches_linear(
    num_rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and n * k > 100000:
        pytest.skip("slow in the interpreter")
    arguments = inputs(num_rows, n, k, dtype, device)
    x, weight, bias = (arguments[name] for name in ("x", "weight", "bias"))
    expected = F.linear(x.double(), weight.double(), bias.double()).to(dtype)
    assert_close(few_rows_linear(x, weight, bias), expected)


@pytest.mark.parametrize("num_rows", range(1, FEW_ROWS + 1))
def test_every_number_of_rows(num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    arguments = inputs(num_rows, 20, 130, dtype, device)
    x, weight = arguments["x"], arguments["weight"]
    expected = F.linear(x.double(), weight.double()).to(dtype)
    assert_close(few_rows_linear(x, weight), expected)


@pytest.mark.parametrize("k", [1, 100, 640])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 8])
@pytest.mark.sampled(n=2)
def test_sum_norm_and_linear(
    num_rows: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = norm_inputs(num_rows, 37, k, dtype, device)
    y, total = add_norm_linear(**arguments)
    assert torch.equal(total, arguments["x"] + arguments["update"])
    assert_close(y, add_norm_linear_ref(**arguments)[0])
    norm = Qwen3MoeRMSNorm(k, eps=1e-5).to(device, dtype)
    norm.weight.data.copy_(arguments["norm_weight"])
    assert_close(y, F.linear(norm(total), arguments["weight"], arguments["bias"]).detach())


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(5120, 2048), (576, 2048), (21888, 2048), (1536, 7168)])
@pytest.mark.parametrize("num_rows", [1, 2, 4, 8])
def test_sum_norm_and_linear_of_models(num_rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    arguments = norm_inputs(num_rows, n, k, dtype, torch.device("cuda"))
    y, total = add_norm_linear(**arguments)
    assert torch.equal(total, arguments["x"] + arguments["update"])
    assert_close(y, add_norm_linear_ref(**arguments)[0])


@pytest.mark.parametrize("num_rows", [1, 8])
def test_norm_without_an_update(num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    arguments = norm_inputs(num_rows, 37, 100, dtype, device) | {"update": None}
    y, total = add_norm_linear(**arguments)
    assert total is arguments["x"]
    assert_close(y, add_norm_linear_ref(**arguments)[0])


def test_sum_with_nothing_to_multiply(device: torch.device) -> None:
    arguments = norm_inputs(2, 0, 100, torch.float16, device)
    y, total = add_norm_linear(**arguments)
    assert y.shape == (2, 0)
    assert torch.equal(total, arguments["x"] + arguments["update"])


def test_fp32_norm_weight(device: torch.device) -> None:
    arguments = norm_inputs(2, 37, 100, torch.float16, device)
    expected, _ = add_norm_linear(**arguments)
    arguments["norm_weight"] = arguments["norm_weight"].float()
    assert torch.equal(add_norm_linear(**arguments)[0], expected)


def test_rounds_the_sum_and_then_the_norm(device: torch.device) -> None:
    """With 1 as the weight a row of y is one number of the normed x: all its bits can be seen."""
    arguments = norm_inputs(2, 64, 64, torch.float16, device) | {"bias": None}
    arguments["weight"] = torch.eye(64).to(device, torch.float16)
    y, _ = add_norm_linear(**arguments)
    x, update, norm_weight = (arguments[name] for name in ("x", "update", "norm_weight"))
    normed, _ = add_rms_norm(x, update, norm_weight, arguments["eps"])
    # The sums of squares may differ in the last bit of fp32, and few results by a rounding.
    assert (y == normed).float().mean() > 0.98


@pytest.mark.parametrize("num_rows", [1, 4])
def test_programs_that_share_out_the_rows(
    num_rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 43 if device.type == "cpu" else 2403
    arguments = norm_inputs(num_rows, n, 40, torch.float16, device)
    x, weight, bias = (arguments[name] for name in ("x", "weight", "bias"))
    for block_n in (1, 4):
        chosen = Launch(block_n, num_warps=1, programs_per_sm=1)
        monkeypatch.setattr(few_rows, "launch", lambda *_, chosen=chosen: chosen)
        assert_close(few_rows_linear(x, weight, bias), few_rows_linear_ref(x, weight, bias))
        y, total = add_norm_linear(**arguments)
        assert torch.equal(total, x + arguments["update"])
        assert_close(y, add_norm_linear_ref(**arguments)[0])


@pytest.mark.parametrize("num_rows", [2, 8])
@pytest.mark.sampled(n=2)
def test_strides_and_unused_memory(num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    arguments = norm_inputs(num_rows, 37, 100, dtype, device)
    x, weight = arguments["x"], arguments["weight"]
    expected, expected_y, expected_sum = few_rows_linear(x, weight), *add_norm_linear(**arguments)
    for name in ("x", "update", "weight"):
        tensor = arguments[name].cpu()
        wide = torch.full((len(tensor), tensor.shape[1] + 28), torch.nan).to(dtype)
        wide[:, : tensor.shape[1]] = tensor
        arguments[name] = wide.to(device)[:, : tensor.shape[1]]
    # Other strides may be loaded, and then summed, in another order.
    assert_close(few_rows_linear(arguments["x"], arguments["weight"]), expected)
    y, total = add_norm_linear(**arguments)
    assert_close(y, expected_y)
    assert torch.equal(total, expected_sum)


def test_nan_stays_in_its_row(device: torch.device) -> None:
    for num_rows in (2, 8):
        arguments = norm_inputs(num_rows, 37, 100, torch.float16, device)
        expected, _ = add_norm_linear(**arguments)
        arguments["x"][1, 3] = torch.nan
        result, _ = add_norm_linear(**arguments)
        assert result[1].isnan().all()
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[2:], expected[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8])
def test_in_a_graph_each_waits_for_the_one_before(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # no kernel that fills buffers in between
    device = torch.device("cuda")
    arguments = norm_inputs(num_rows, 2048, 2048, torch.bfloat16, device)
    norm = {name: arguments[name] for name in ("norm_weight", "eps")}
    weight = arguments["weight"]

    def layers(finish: Callable[[], None]) -> Tensor:
        x, update = arguments["x"], arguments["update"]
        for _ in range(20):
            update, x = add_norm_linear(x, update, weight, **norm)
            finish()
            update = few_rows_linear(update, weight)
            finish()
        return x

    expected = layers(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers(lambda: None)
    for _ in range(5):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 40)}, "x must be [T, K] with T <= 8"),
        ({"x": torch.zeros(2, 41)}, "x must be [T, K]"),
        ({"weight": torch.zeros(24, 40).half()}, "weight must be torch.float32"),
        ({"weight": torch.zeros(40, 24).mT}, "weight's last stride must be 1"),
        ({"bias": torch.zeros(23)}, "bias must be [24]"),
        ({"norm_weight": torch.zeros(24)}, "norm_weight must be [40]"),
        ({"norm_weight": torch.zeros(80)[::2]}, "norm_weight's last stride must be 1"),
        ({"update": torch.zeros(2, 24)}, "update must be [2, 40] torch.float32"),
        ({"update": torch.zeros(2, 40).half()}, "update must be [2, 40] torch.float32"),
        ({"update": torch.zeros(40, 2).mT}, "update's last stride must be 1"),
    ],
)
def test_refuses(change: dict[str, Tensor], message: str) -> None:
    arguments = norm_inputs(2, 24, 40, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        add_norm_linear(**(arguments | change))
    if change.keys() <= {"x", "weight", "bias"}:
        plain = {name: arguments[name] for name in ("x", "weight", "bias")}
        with pytest.raises(ValueError, match=re.escape(message)):
            few_rows_linear(**(plain | change))


def gated_inputs(
    num_rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Arguments of `gated_linear`."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter rounds to bfloat16 wrongly")
    given: dict[str, Any] = inputs(num_rows, n, k, dtype, device)
    del given["x"]
    generator = torch.Generator().manual_seed(2)
    gate_up = torch.randn(num_rows, 2 * k, generator=generator)
    addend = torch.randn(num_rows, n, generator=generator)
    return given | {"gate_up": gate_up.to(device, dtype), "addend": addend.to(device, dtype)}


@pytest.mark.parametrize("activation", ["silu", Gating("gelu_tanh"), Gating("silu", limit=1.5)])
@pytest.mark.parametrize(("num_rows", "n", "k"), [(1, 7, 100), (2, 20, 2049), (4, 70, 65)])
@pytest.mark.sampled(n=2)
def test_gated(
    num_rows: int,
    n: int,
    k: int,
    activation: str | Gating,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    given = gated_inputs(num_rows, n, k, dtype, device) | {"activation": activation}
    assert_close(gated_linear(**given), gated_linear_ref(**given))
    given |= {"addend": None, "bias": None}
    assert_close(gated_linear(**given), gated_linear_ref(**given))


def test_gated_takes_few_rows_of_few_columns(device: torch.device) -> None:
    given = gated_inputs(4, 8, 4096, torch.float16, device)
    assert takes_gated(given["gate_up"], given["weight"])
    assert not takes_gated(given["gate_up"].repeat(2, 1), given["weight"])
    wide = gated_inputs(1, 8, 4097, torch.float16, device)
    assert not takes_gated(wide["gate_up"], wide["weight"])
    with pytest.raises(ValueError, match="too many"):
        gated_linear(**given | {"gate_up": given["gate_up"].repeat(2, 1), "addend": None})
    with pytest.raises(ValueError, match="gate_up must be"):
        gated_linear(**given | {"gate_up": given["gate_up"][:, 1:]})
    with pytest.raises(ValueError, match="addend must be"):
        gated_linear(**given | {"addend": given["addend"][:1]})
