import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from moezoo.layers.kernels import few_rows
from moezoo.layers.kernels.few_rows import FEW_ROWS, Launch, few_rows_linear, few_rows_linear_ref


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def inputs(
    num_rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    if dtype == torch.bfloat16 and device.type == "cpu" and num_rows > few_rows.REGISTER_ROWS:
        pytest.skip("the interpreter multiplies bfloat16 matrices wrongly")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(num_rows, k, generator=generator),
        "weight": torch.randn(n, k, generator=generator) * k**-0.5,
        "bias": torch.randn(n, generator=generator),
        "norm_weight": torch.rand(k, generator=generator) + 0.5,
        "residual": torch.randn(num_rows, n, generator=generator),
    }
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (7, 100), (300, 65), (40, 2049), (576, 2048), (33, 10944), (33, 20000)]
)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 8])
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
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8])
def test_norm_and_residual(num_rows: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    arguments = inputs(num_rows, 37, k, dtype, device)
    result = few_rows_linear(**arguments, eps=1e-5)
    assert_close(result, few_rows_linear_ref(**arguments, eps=1e-5))
    norm = Qwen3MoeRMSNorm(k, eps=1e-5).to(device, dtype)
    norm.weight.data.copy_(arguments["norm_weight"])
    y = F.linear(norm(arguments["x"]), arguments["weight"], arguments["bias"])
    assert_close(result, arguments["residual"] + y.detach())


@pytest.mark.parametrize("num_rows", [1, 8])
def test_rounds_the_result_and_then_the_sum(num_rows: int, device: torch.device) -> None:
    # The product 1 + 2**-11 rounds to 1. Unrounded, it would lift the sum to 2 + 2**-9.
    x = torch.ones(num_rows, 2).to(device, torch.float16)
    weight = torch.tensor([[1.0, 2**-11]]).to(device, torch.float16)
    residual = torch.full((num_rows, 1), 1 + 2**-10).to(device, torch.float16)
    result = few_rows_linear(x, weight, residual=residual)
    assert torch.equal(result, residual + F.linear(x, weight))


@pytest.mark.parametrize("num_rows", [1, 4])
def test_programs_that_share_out_the_rows(
    num_rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 43 if device.type == "cpu" else 2403
    arguments = inputs(num_rows, n, 40, torch.float16, device)
    expected = few_rows_linear_ref(**arguments)
    for block_n in (1, 4):
        chosen = Launch(block_n, num_warps=1, programs_per_sm=1)
        monkeypatch.setattr(few_rows, "launch", lambda *_, chosen=chosen: chosen)
        assert_close(few_rows_linear(**arguments), expected)


@pytest.mark.parametrize("num_rows", [2, 8])
def test_strides_and_unused_memory(num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    arguments = inputs(num_rows, 37, 100, dtype, device)
    expected = few_rows_linear(**arguments)
    for name in ("x", "weight", "residual"):
        tensor = arguments[name].cpu()
        wide = torch.full((len(tensor), tensor.shape[1] + 28), torch.nan).to(dtype)
        wide[:, : tensor.shape[1]] = tensor
        arguments[name] = wide.to(device)[:, : tensor.shape[1]]
    assert torch.equal(few_rows_linear(**arguments), expected)


def test_nan_stays_in_its_row(device: torch.device) -> None:
    for num_rows in (2, 8):
        arguments = inputs(num_rows, 37, 100, torch.float16, device)
        expected = few_rows_linear(**arguments)
        arguments["x"][1, 3] = torch.nan
        result = few_rows_linear(**arguments)
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
    arguments = inputs(num_rows, 2048, 2048, torch.bfloat16, device)
    x, norm, weight = (arguments[name] for name in ("x", "norm_weight", "weight"))

    def layers(finish: Callable[[], None]) -> Tensor:
        y = x
        for _ in range(20):
            normed = few_rows_linear(y, weight, norm_weight=norm)
            finish()
            y = few_rows_linear(normed, weight, residual=y)
            finish()
        return y

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
        ({"residual": torch.zeros(2, 40)}, "residual must be [2, 24] torch.float32"),
        ({"residual": torch.zeros(2, 24).half()}, "residual must be [2, 24] torch.float32"),
    ],
)
def test_refuses(change: dict[str, Tensor], message: str) -> None:
    arguments = inputs(2, 24, 40, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        few_rows_linear(**(arguments | change))
