"""experts_implementation="moezoo" against "eager": every decorated class, and whole models."""

import importlib
import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tolerances import RELATIVE, relative_difference
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from moezoo.layers.kernels.activations import Gating
from moezoo.layers.moe import experts_dense
from moezoo.layers.moe.in_transformers import _recognise

TOLERANCE = 2e-5
"""Relative difference of fp32 logits, ||ours - theirs|| / ||theirs||."""

MODELS = Path(transformers.__file__).parent / "models"
DECORATED = {
    name: (path.parent.name, options)
    for path in sorted(MODELS.glob("*/modeling_*.py"))
    for options, name in re.findall(
        r"^@use_experts_implementation(.*)\nclass (\w+)", path.read_text(), re.MULTILINE
    )
}
SOFTCAPPED = {"Inkling2Experts"}
"""What moezoo has no kernel for, and transformers runs."""

SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 24),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 20),
}
CONFIG = SIZES | {
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "mlp_hidden_act": "relu2",
    "moe_latent_size": None,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 0.5,
    "mlp_gate_softcap": 2.0,
    "mlp_up_softcap": 2.0,
    "post_norm_eps": 1e-6,
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def make(name: str, device: torch.device, **fields: Any) -> nn.Module:
    """A decorated module of transformers with random weights in fp32."""
    folder, _ = DECORATED[name]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = SimpleNamespace(**CONFIG | fields, _experts_implementation="moezoo")
    made = getattr(module, name)(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator).requires_grad_(False)
    return made


def inputs(num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(num_tokens)
    x = torch.randn(num_tokens, 24, generator=generator, device=device)
    weights, ids = torch.rand(num_tokens, 6, generator=generator, device=device).topk(3)
    return x, ids, weights


def run(module: nn.Module, implementation: str, *args: Tensor) -> Tensor:
    module.config._experts_implementation = implementation
    return module(*args)


@pytest.mark.parametrize("name", DECORATED)
def test_every_decorated_class(name: str, device: torch.device) -> None:
    module = make(name, device)
    for num_tokens in (1, 9):
        args = inputs(num_tokens, device)
        expected = run(module, "eager", *args)
        assert expected.abs().max() > 0.1
        if name in SOFTCAPPED:
            with warnings.catch_warnings(action="ignore"):
                result = run(module, "moezoo", *args)
        else:
            result = run(module, "moezoo", *args)
            assert module._moezoo_gating is not None
        assert relative_difference(result, expected) < RELATIVE[torch.float32]


VARIANTS = {
    "concatenated": "Qwen3MoeExperts",
    "alternating, transposed, biases, bounded": "GptOssExperts",
    "transposed": "AriaExperts",
    "transposed, biases": "OpenAIPrivacyFilterExperts",
    "no gate": "NemotronHExperts",
    "norm behind": "MuseSparkExperts",
}
variants = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=label)
        for label, name in VARIANTS.items()
        if name in DECORATED  # transformers 5.17 decorates fewer
    ],
)


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit(name: str, dtype: torch.dtype, device: torch.device) -> None:
    module = make(name, device).to(dtype)
    x, ids, weights = inputs(40, device)
    result = run(module, "moezoo", x.to(dtype), ids, weights.to(dtype))
    assert result.dtype == dtype
    module.float()
    expected = run(module, "eager", x.to(dtype).float(), ids, weights.to(dtype).float())
    assert relative_difference(result, expected) < RELATIVE[dtype]


@variants
def test_no_weight_is_copied(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the products read is the parameters' own memory."""
    module = make(name, device)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen = set()

    def spy(original: Any, position: int) -> Any:
        def product(*args: Any, **settings: Any) -> Tensor:
            seen.add(args[position].untyped_storage().data_ptr())
            return original(*args, **settings)

        return product

    if device.type == "cuda":
        from moezoo.layers.kernels import down, gated_up

        monkeypatch.setattr(gated_up, "gated_up", spy(gated_up.gated_up, 1))
        monkeypatch.setattr(down, "down", spy(down.down, 1))
    else:
        grouped_linear = experts_dense._grouped_linear
        monkeypatch.setattr(experts_dense, "_grouped_linear", spy(grouped_linear, 2))
    run(module, "moezoo", *inputs(9, device))
    assert len(seen) == 2
    assert seen <= own


@variants
def test_gradients(name: str) -> None:
    device = torch.device("cpu")
    module = make(name, device).requires_grad_()
    x, ids, weights = inputs(9, device)
    leaves = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
    ours = torch.autograd.grad(run(module, "moezoo", x, ids, weights).square().sum(), leaves)
    theirs = torch.autograd.grad(run(module, "eager", x, ids, weights).square().sum(), leaves)
    for actual, expected in zip(ours, theirs, strict=True):
        assert relative_difference(actual, expected) < TOLERANCE


@variants
def test_compiles_into_one_graph(name: str, device: torch.device) -> None:
    module, args = make(name, device), inputs(9, device)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = run(module, "eager", *args)
    module.config._experts_implementation = "moezoo"
    if torch.__version__ < "2.13":
        module(*args)  # torch 2.11 cannot compile what has never run
    assert relative_difference(compiled(*args), expected) < RELATIVE[torch.float32]


@variants
def test_experts_of_other_ranks_contribute_nothing(name: str, device: torch.device) -> None:
    module = make(name, device)
    x, ids, weights = inputs(9, device)
    module._is_expert_parallel = True
    ids[::2, 1] = 6
    ids[3] = 6
    expected = run(module, "moezoo", x, ids.where(ids < 6, 0), weights.where(ids < 6, 0.0))
    result = run(module, "moezoo", x, ids, weights.where(ids < 6, torch.nan))
    if name != "MuseSparkExperts":  # there, as in transformers, weights of 0 do it
        assert relative_difference(result, expected) < RELATIVE[torch.float32]
    result = run(module, "moezoo", x, ids, weights.where(ids < 6, 0.0))
    assert relative_difference(result, expected) < RELATIVE[torch.float32]


def test_under_autocast_inputs_are_fp32(device: torch.device) -> None:
    module = make("Qwen3MoeExperts", device).bfloat16()
    x, ids, weights = inputs(9, device)
    result = run(module, "moezoo", x, ids, weights)
    assert result.dtype == torch.float32
    expected = run(module.float(), "eager", x, ids, weights)
    assert relative_difference(result, expected) < RELATIVE[torch.bfloat16]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hidden_act": "silu"}, Gating("silu")),
        ({"hidden_act": "swish"}, Gating("silu")),
        ({"hidden_act": "gelu"}, Gating("gelu")),
        ({"hidden_act": "gelu_new"}, Gating("gelu_tanh")),
        ({"hidden_act": "gelu_fast"}, Gating("gelu_tanh")),
        ({"hidden_act": "quick_gelu"}, Gating("quick_gelu")),
        ({"hidden_act": "relu"}, Gating("relu")),
        ({"hidden_act": "relu2"}, Gating("relu2")),
        ({"hidden_act": "relu6"}, None),
        ({"hidden_act": "tanh"}, None),
        ({"hidden_act": "gelu_10"}, None),
        ({"hidden_act": "mish"}, None),
    ],
    ids=lambda value: value["hidden_act"] if isinstance(value, dict) else "",
)
def test_recognises_activations(fields: dict[str, Any], expected: Gating | None) -> None:
    assert _recognise(make("Qwen3MoeExperts", torch.device("cpu"), **fields)) == expected


@pytest.mark.parametrize(
    ("alpha", "limit", "expected"),
    [
        (1.702, 7.0, Gating("quick_gelu", 7.0, 1.0)),
        (1.702, 7, Gating("quick_gelu", 7.0, 1.0)),
        (1.702, 200.0, Gating("quick_gelu", 200.0, 1.0)),
        (1.0, 7.0, Gating("silu", 7.0, 1.0)),
        (1.7, 7.0, None),
    ],
)
def test_recognises_bounded_gates(alpha: float, limit: float, expected: Gating | None) -> None:
    module = make("GptOssExperts", torch.device("cpu"), swiglu_alpha=alpha, swiglu_limit=limit)
    # gpt-oss takes these two from no config.
    module.alpha, module.limit = alpha, limit
    assert _recognise(module) == expected


def test_recognises_whatever_the_default_dtype_is() -> None:
    module = make("Qwen3MoeExperts", torch.device("cpu"), hidden_act="gelu_new")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert _recognise(module) == Gating("gelu_tanh")
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_limit_that_the_module_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make("Qwen3MoeExperts", torch.device("cpu"))

    def gate(gate_up: Tensor) -> Tensor:
        return Gating(limit=50.0)(*gate_up.chunk(2, -1))

    monkeypatch.setattr(module, "_apply_gate", gate)
    assert _recognise(module) is None


def test_warns_once_of_what_it_leaves_to_transformers(device: torch.device) -> None:
    module = make("Qwen3MoeExperts", device, hidden_act="mish")
    args = inputs(9, device)
    with pytest.warns(UserWarning, match="no kernel for .* Qwen3MoeExperts .*Mish.* 'grouped_mm'"):
        result = run(module, "moezoo", *args)
    assert relative_difference(result, run(module, "eager", *args)) < TOLERANCE
    with warnings.catch_warnings(action="error"):
        run(module, "moezoo", *args)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [("Qwen3MoeExperts", "act_fn", nn.GELU()), ("GptOssExperts", "limit", 0.25)],
)
def test_a_gate_that_is_replaced(name: str, field: str, value: Any, device: torch.device) -> None:
    module, args = make(name, device), inputs(9, device)
    before = run(module, "moezoo", *args)
    setattr(module, field, value)
    result = run(module, "moezoo", *args)
    assert relative_difference(result, before) > 1e-2
    assert relative_difference(result, run(module, "eager", *args)) < TOLERANCE
    assert len(module.state_dict()) == len(make(name, device).state_dict())


def test_code_that_does_not_take_fp32_is_left_to_transformers(device: torch.device) -> None:
    sizes = {"moe_intermediate_size": 32, "intermediate_size": 32}
    module = make("Qwen3MoeExperts", device, hidden_act="prelu", **sizes).bfloat16()
    x, ids, weights = inputs(9, device)
    with pytest.warns(UserWarning, match="no kernel for .* 'grouped_mm'"):
        result = run(module, "moezoo", x.bfloat16(), ids, weights)
    assert result.equal(run(module, "grouped_mm", x.bfloat16(), ids, weights))


@pytest.mark.parametrize("number", [math.inf, math.nan, 10**400])
def test_numbers_that_are_no_limits(number: float) -> None:
    module = make("Qwen3MoeExperts", torch.device("cpu"))
    module.limit = number
    assert _recognise(module) == Gating("silu")


def test_arguments_by_name(device: torch.device) -> None:
    module, (x, ids, weights) = make("Qwen3MoeExperts", device), inputs(9, device)
    module.config._experts_implementation = "moezoo"
    expected = module(x, ids, weights)
    assert module(x, ids, top_k_weights=weights).equal(expected)


def test_weights_of_another_kind_are_refused(device: torch.device) -> None:
    module = make("Qwen3MoeExperts", device)
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"w13 must be \[6, 40, 24\] torch.float32"):
        run(module, "moezoo", *inputs(9, device))


# Fields for every model, and those of its own.
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **MLA,
    },
    "glm4_moe": {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "granitemoe": {"num_local_experts": 8},
    "phimoe": {"num_local_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "sliding_window": 8},
    "nemotron_h": {
        "n_routed_experts": 8,
        "layers_block_type": ["attention", "moe"],
        "n_group": 1,
        "topk_group": 1,
        "moe_shared_expert_intermediate_size": 24,
    },
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "openai_privacy_filter": {"num_local_experts": 8},
    "gemma4_text": {
        "num_experts": 8,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["full_attention"] * 2,
    },
    "deepseek_v4": {"n_routed_experts": 8},
    "minimax_m3_vl_text": {"num_local_experts": 8},
}


def known(model_type: str) -> bool:
    """Whether this transformers has the model and decorates its experts."""
    folder = model_type.removesuffix("_text")
    return any(folder == decorated for decorated, _ in DECORATED.values())


def load(model_type: str, folder: Path, device: torch.device) -> tuple[PreTrainedModel, ...]:
    """A random model that transformers wrote, with "eager" and with "moezoo"."""
    config = AutoConfig.for_model(model_type, **COMMON | CONFIGS[model_type])
    kind: Any = AutoModelForCausalLM
    if model_type == "openai_privacy_filter":
        kind = AutoModelForTokenClassification
    torch.manual_seed(0)
    model = kind.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return tuple(
        kind.from_pretrained(folder, dtype=torch.float32, experts_implementation=name)
        .to(device)
        .eval()
        for name in ("eager", "moezoo")
    )


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if known(name)])
def test_models(model_type: str, device: torch.device, tmp_path: Path) -> None:
    theirs, ours = load(model_type, tmp_path, device)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(3, 61, (2, 11), generator=generator).to(device)
    mask = torch.ones_like(token_ids)
    with torch.no_grad():
        expected = theirs(token_ids, attention_mask=mask).logits
        result = ours(token_ids, attention_mask=mask).logits
    assert any(hasattr(module, "_moezoo_gating") for module in ours.modules())
    assert not any(hasattr(module, "_moezoo_gating") for module in theirs.modules())
    assert (result - expected).norm() < TOLERANCE * expected.norm()
    if not ours.can_generate():
        return
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(token_ids, **settings), theirs.generate(token_ids, **settings))


def test_switches_at_run_time(tmp_path: Path) -> None:
    theirs, ours = load("gpt_oss", tmp_path, torch.device("cpu"))
    token_ids = torch.arange(3, 12).unsqueeze(0)
    with torch.no_grad():
        expected = theirs(token_ids).logits
        theirs.set_experts_implementation("moezoo")
        assert torch.equal(theirs(token_ids).logits, ours(token_ids).logits)
        ours.set_experts_implementation("eager")
        assert torch.equal(ours(token_ids).logits, expected)
