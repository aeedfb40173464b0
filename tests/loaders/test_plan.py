"""What a plan copies, and everything that it refuses."""

import time
from math import prod

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from moezoo.errors import CheckpointError
from moezoo.loaders.headers import StoredTensor
from moezoo.loaders.mapping import (
    Copy,
    ParameterInfo,
    Rule,
    Skip,
    TensorInfo,
    layout,
    stored_order,
    stored_shape,
)
from moezoo.loaders.plan import Plan, plan

EXPERTS = (
    Rule("layers.{L}.w13", "m.{L}.experts.{E}.gate", "m.{L}.experts.{E}.up", shard="expert"),
    Rule("layers.{L}.w13", "m.{L}.experts.gate_up", shard="expert"),
    Rule("layers.{L}.w2", "m.{L}.experts.{E}.down", shard="expert"),
    Rule("layers.{L}.w2", "m.{L}.experts.down", shard="expert"),
)
RULES = (
    Rule("embed", "m.embed"),
    Rule("layers.{L}.qkv", "m.{L}.q", "m.{L}.k", "m.{L}.v"),
    *EXPERTS,
    Skip("m.{L}.rotary.{*}", "computed from the config"),
    Skip("m.{L}.{*}", "multi-token prediction", marks=("m.{L}.eh_proj", "m.{L}.enorm")),
)


def parameters(layers: int, experts: int) -> dict[str, ParameterInfo]:
    """embed [10, 4]; a layer: qkv [4 + 2 + 2, 4], w13 [E, 2 * 3, 4], w2 [E, 4, 3]."""
    infos = {"embed": ParameterInfo((10, 4), torch.float32)}
    for n in range(layers):
        infos[f"layers.{n}.qkv"] = ParameterInfo((8, 4), torch.float32, (4, 2, 2))
        infos[f"layers.{n}.w13"] = ParameterInfo((experts, 6, 4), torch.float32)
        infos[f"layers.{n}.w2"] = ParameterInfo((experts, 4, 3), torch.float32)
    return infos


def per_expert(layers: int, experts: int) -> dict[str, TensorInfo]:
    shapes: dict[str, tuple[int, ...]] = {"m.embed": (10, 4)}
    for n in range(layers):
        shapes |= {f"m.{n}.q": (4, 4), f"m.{n}.k": (2, 4), f"m.{n}.v": (2, 4)}
        for e in range(experts):
            shapes[f"m.{n}.experts.{e}.gate"] = shapes[f"m.{n}.experts.{e}.up"] = (3, 4)
            shapes[f"m.{n}.experts.{e}.down"] = (4, 3)
    return {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}


def stacked(layers: int, experts: int) -> dict[str, TensorInfo]:
    infos = per_expert(layers, 0)
    for n in range(layers):
        infos[f"m.{n}.experts.gate_up"] = TensorInfo((experts, 6, 4), torch.bfloat16)
        infos[f"m.{n}.experts.down"] = TensorInfo((experts, 4, 3), torch.bfloat16)
    return infos


def refusal(
    checkpoint: dict[str, TensorInfo],
    infos: dict[str, ParameterInfo] | None = None,
    experts: list[int] | None = None,
) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan(RULES, checkpoint, infos or parameters(2, 4), experts=experts)
    return str(caught.value)


def copies_of(chosen: Plan, target: str) -> list[Copy]:
    return [copy for copy in chosen.copies if copy.target == target]


def test_parts_follow_each_other_and_experts_stack():
    chosen = plan(RULES, per_expert(1, 2), parameters(1, 2))
    assert copies_of(chosen, "layers.0.qkv") == [
        Copy("layers.0.qkv", (slice(0, 4),), "m.0.q", None, ()),
        Copy("layers.0.qkv", (slice(4, 6),), "m.0.k", None, ()),
        Copy("layers.0.qkv", (slice(6, 8),), "m.0.v", None, ()),
    ]
    assert copies_of(chosen, "layers.0.w13") == [
        Copy("layers.0.w13", (0, slice(0, 3)), "m.0.experts.0.gate", None, ()),
        Copy("layers.0.w13", (1, slice(0, 3)), "m.0.experts.1.gate", None, ()),
        Copy("layers.0.w13", (0, slice(3, 6)), "m.0.experts.0.up", None, ()),
        Copy("layers.0.w13", (1, slice(3, 6)), "m.0.experts.1.up", None, ()),
    ]


def test_each_parameter_takes_the_layout_that_is_there():
    checkpoint = per_expert(2, 4)
    chosen = plan(RULES, stacked(2, 4), parameters(2, 4))
    assert [copy.source for copy in copies_of(chosen, "layers.1.w13")] == ["m.1.experts.gate_up"]
    mixed = {k: v for k, v in checkpoint.items() if not k.startswith("m.1.experts")}
    mixed |= {k: v for k, v in stacked(2, 4).items() if k.startswith("m.1.experts")}
    chosen = plan(RULES, mixed, parameters(2, 4))
    assert len(copies_of(chosen, "layers.0.w13")) == 8
    assert len(copies_of(chosen, "layers.1.w13")) == 1


def test_numbers_in_a_template_are_themselves():
    rules = (Rule("a", "m.0.x"), Rule("layers.{L}.b", "m.1.{L}.x"))
    infos = {n: ParameterInfo((2,), torch.float32) for n in ("a", "layers.7.b")}
    checkpoint = {n: TensorInfo((2,), torch.float32) for n in ("m.0.x", "m.1.7.x")}
    assert [copy.source for copy in plan(rules, checkpoint, infos).copies] == ["m.0.x", "m.1.7.x"]


def test_a_rank_reads_only_its_experts_of_the_per_expert_layout():
    infos = parameters(1, 2)
    chosen = plan(RULES, per_expert(1, 6), infos, experts=[1, 4])
    w2 = copies_of(chosen, "layers.0.w2")
    assert [(copy.source, copy.target_index) for copy in w2] == [
        ("m.0.experts.1.down", (0,)),
        ("m.0.experts.4.down", (1,)),
    ]


@pytest.mark.parametrize(
    "owned, runs",
    [
        ([2, 3], [(slice(0, 2), slice(2, 4))]),
        ([0, 2, 4], [(slice(n, n + 1), slice(e, e + 1)) for n, e in enumerate((0, 2, 4))]),
        ([5, 0, 1], [(slice(0, 1), slice(5, 6)), (slice(1, 3), slice(0, 2))]),
        ([], []),
    ],
)
def test_a_rank_reads_only_its_rows_of_the_stacked_layout(owned, runs):
    chosen = plan(RULES, stacked(1, 6), parameters(1, len(owned)), experts=owned)
    w2 = copies_of(chosen, "layers.0.w2")
    assert [(copy.target_index[0], copy.rows) for copy in w2] == runs


def test_layers_beyond_the_model_are_skipped_and_counted():
    extra = {"m.0.rotary.inv_freq": TensorInfo((2,), torch.float32)}
    extra["m.2.eh_proj"] = TensorInfo((4, 8), torch.bfloat16)
    chosen = plan(RULES, per_expert(3, 4) | extra, parameters(2, 4))
    counts = {skip.reason: len(names) for skip, names in chosen.skipped.items()}
    assert counts == {"multi-token prediction": 1 + 3 + 4 * 3, "computed from the config": 1}


def test_layers_beyond_the_model_without_a_mark_are_unknown():
    """A config that says one layer too few would else give a model that lacks it."""
    message = refusal(per_expert(3, 0) | {"m.3.enorm": TensorInfo((4,), torch.bfloat16)})
    assert "m.2.q (the model has no layers.2.qkv)" in message
    assert "m.3" not in message


def test_a_mark_does_not_make_a_layer_of_the_model_one_to_skip():
    checkpoint = per_expert(2, 4) | {"m.1.eh_proj": TensorInfo((4, 8), torch.bfloat16)}
    assert "1 tensor unknown:\n  m.1.eh_proj" in refusal(checkpoint)


def test_refuses_unknown_tensors_by_name():
    checkpoint = per_expert(2, 4) | {"m.1.bias": TensorInfo((4,), torch.float32)}
    assert "1 tensor unknown:\n  m.1.bias" in refusal(checkpoint)


def test_refuses_an_expert_too_many_with_the_parameter():
    message = refusal(per_expert(2, 5))
    assert "6 tensors unknown" in message
    assert "m.0.experts.4.gate (layers.0.w13 is [4, 6, 4])" in message


def test_says_which_parameter_the_model_lacks():
    infos = parameters(2, 4)
    del infos["layers.1.qkv"]
    assert "m.1.q (the model has no layers.1.qkv)" in refusal(per_expert(2, 4), infos)


def test_names_the_first_unknown_tensors_and_the_count():
    checkpoint = per_expert(2, 4) | {f"x.{n}": TensorInfo((1,), torch.float32) for n in range(25)}
    message = refusal(checkpoint)
    assert "25 tensors unknown" in message and "x.9" in message
    assert "x.10" not in message and "and 15 more" in message


def test_refuses_a_missing_tensor():
    checkpoint = per_expert(2, 4)
    del checkpoint["m.1.k"]
    assert "1 tensor missing:\n  m.1.k (for layers.1.qkv)" in refusal(checkpoint)


@pytest.mark.parametrize("owned", [None, [0, 1, 2, 3]])
def test_names_the_missing_expert_and_its_layer(owned):
    checkpoint = per_expert(2, 4)
    del checkpoint["m.1.experts.3.up"]
    message = refusal(checkpoint, experts=owned)
    assert "expert 3 of layer 1: m.1.experts.3.up (for layers.1.w13)" in message


def test_a_missing_expert_of_another_rank_is_not_this_ranks_matter():
    checkpoint = per_expert(1, 4)
    del checkpoint["m.0.experts.3.up"]
    plan(RULES, checkpoint, parameters(1, 2), experts=[0, 1])


def test_names_an_owned_expert_that_a_stacked_tensor_lacks():
    message = refusal(stacked(1, 4), parameters(1, 2), experts=[3, 4])
    assert "expert 4 of layer 0: m.0.experts.gate_up holds 4 experts" in message


def test_refuses_a_parameter_that_no_layout_gives():
    checkpoint = {k: v for k, v in per_expert(2, 4).items() if not k.endswith(".down")}
    message = refusal(checkpoint)
    assert "2 tensors missing" in message
    assert "m.0.experts.{E}.down or m.0.experts.down (for layers.0.w2)" in message


def test_refuses_two_layouts_of_one_parameter():
    checkpoint = per_expert(2, 4) | {"m.0.experts.down": TensorInfo((4, 4, 3), torch.bfloat16)}
    message = refusal(checkpoint)
    assert "layers.0.w2 is given by m.0.experts.0.down and by m.0.experts.down" in message
    assert "unknown" not in message


def test_refuses_a_tensor_that_two_rules_want():
    rules = (Rule("a", "x"), Rule("b", "x"))
    infos = {name: ParameterInfo((2,), torch.float32) for name in "ab"}
    with pytest.raises(CheckpointError, match="x is wanted by a and by b"):
        plan(rules, {"x": TensorInfo((2,), torch.float32)}, infos)


def test_refuses_a_tensor_that_is_wanted_and_skipped():
    rules = (Rule("a", "x"), Skip("x", "not needed"))
    infos = {"a": ParameterInfo((2,), torch.float32)}
    with pytest.raises(CheckpointError, match="x is wanted by a and skipped by x"):
        plan(rules, {"x": TensorInfo((2,), torch.float32)}, infos)


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("m.0.q", (5, 4), "m.0.q is [5, 4], layers.0.qkv takes [4, 4] of it"),
        ("m.0.k", (4, 4), "m.0.k is [4, 4], layers.0.qkv takes [2, 4] of it"),
        ("m.1.experts.2.up", (3, 5), "m.1.experts.2.up is [3, 5], layers.1.w13 takes [3, 4]"),
        ("m.embed", (40,), "m.embed is [40], embed takes [10, 4]"),
    ],
)
def test_refuses_wrong_shapes_with_both_sides(name, shape, expected):
    message = refusal(per_expert(2, 4) | {name: TensorInfo(shape, torch.bfloat16)})
    assert "1 tensor of the wrong shape" in message and expected in message


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 4), (4, 3), ()])
def test_refuses_wrong_shapes_of_owned_rows(shape):
    checkpoint = stacked(1, 6) | {"m.0.experts.down": TensorInfo(shape, torch.bfloat16)}
    message = refusal(checkpoint, parameters(1, 2), experts=[0, 1])
    assert f"m.0.experts.down is {list(shape)}, layers.0.w2 takes [1, 4, 3] of it" in message


def test_refuses_parts_that_are_not_equal_where_the_module_says_nothing():
    infos = parameters(2, 4) | {"layers.0.qkv": ParameterInfo((8, 4), torch.float32)}
    assert "layers.0.qkv [8, 4] is not equal parts of m.{L}.q" in refusal(per_expert(2, 4), infos)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_refuses_quantised_weights_by_dtype(dtype):
    message = refusal(per_expert(2, 4) | {"m.0.q": TensorInfo((4, 4), dtype)})
    name = str(dtype).removeprefix("torch.")
    assert f"It looks quantised (stored as {name})" in message
    assert message.endswith("take the 16-bit checkpoint of the model")
    assert f"m.0.q is {name}, layers.0.qkv is float32" in message


@pytest.mark.parametrize(
    "suffix, method",
    [
        ("weight_scale_inv", "fp8"),
        ("qweight", "gptq or awq"),
        ("weight_packed", "compressed-tensors"),
    ],
)
def test_refuses_quantised_weights_by_the_names_of_the_method(suffix, method):
    checkpoint = per_expert(2, 4) | {f"m.0.q.{suffix}": TensorInfo((4, 4), torch.int32)}
    assert f"looks quantised (quant_method {method})" in refusal(checkpoint)


def test_integers_load_as_they_are():
    rules = (Rule("ids", "x"),)
    infos = {"ids": ParameterInfo((2,), torch.int64)}
    assert plan(rules, {"x": TensorInfo((2,), torch.int64)}, infos).copies
    with pytest.raises(CheckpointError, match="x is int32, ids is int64"):
        plan(rules, {"x": TensorInfo((2,), torch.int32)}, infos)


def test_a_wrong_tensor_comes_with_its_file_and_all_with_the_name_and_what_to_do():
    def stored(name, shape, dtype=torch.bfloat16):
        return {name: StoredTensor(shape, dtype, "model-00007-of-00009.safetensors", 0)}

    for wrong in (
        stored("m.0.q", (5, 4)) | stored("m.1.bias", (4,)),
        stored("m.0.q", (4, 4), torch.int8) | stored("m.1.experts.9.up", (3, 4)),
    ):
        with pytest.raises(CheckpointError) as caught:
            plan(RULES, per_expert(2, 4) | wrong, parameters(2, 4), name="folder/m")
        message = str(caught.value)
        assert message.startswith("folder/m does not fit the model of its config.json: ")
        assert message.count(" in model-00007-of-00009.safetensors") == 2
    message = refusal(stacked(1, 6) | stored("m.0.experts.down", (6, 5, 3)), parameters(1, 2), [0])
    assert "m.0.experts.down is [6, 5, 3] in model-00007-of-00009.safetensors, " in message
    advice = "\nGet the checkpoint again, or the config.json that belongs to these weights"
    assert message.endswith(advice)


def test_every_problem_is_in_one_message():
    checkpoint = per_expert(2, 4) | {"m.embed": TensorInfo((9, 4), torch.bfloat16)}
    del checkpoint["m.0.q"]
    checkpoint["m.1.new"] = TensorInfo((1,), torch.float32)
    message = refusal(checkpoint)
    assert "missing" in message and "wrong shape" in message and "unknown" in message


def test_a_parameter_without_a_rule_is_the_tables_fault():
    with pytest.raises(ValueError, match=r"no rule names the parameter layers\.0\.new"):
        plan(RULES, {}, {"layers.0.new": ParameterInfo((1,), torch.float32)})
    with pytest.raises(ValueError, match=r"no rule names the parameter layers\.0\.new"):
        layout(RULES, {"layers.0.new": ParameterInfo((1,), torch.float32)})


def read(chosen: Plan, checkpoint: dict[str, torch.Tensor], infos: dict[str, ParameterInfo]):
    """The parameters that a plan makes, the slow way."""
    made = {name: torch.full(info.shape, torch.nan) for name, info in infos.items()}
    for copy in chosen.copies:
        stored = checkpoint[copy.source]
        target = stored_order(made[copy.target][copy.target_index], copy.view)
        rows = stored if copy.rows is None else stored[copy.rows]
        target.copy_(rows.reshape(target.shape))
    return made


VIEWS = [
    (),
    ("transpose",),
    ("deinterleave",),
    ("unflatten",),
    ("transpose", "deinterleave"),
    ("unflatten", "transpose"),
    ("unflatten", "transpose", "deinterleave"),
]


@st.composite
def expert_layouts(draw):
    """A rule for stacked experts and the shape [E, R, C] of its parameter."""
    view = draw(st.sampled_from(VIEWS))
    sources = draw(st.integers(1, 3))
    one_each = "unflatten" not in view and draw(st.booleans())
    pattern = "s{}.{{L}}.{{E}}.w" if one_each else "s{}.{{L}}.w"
    names = [pattern.format(n) for n in range(sources)]
    rows = 2 * draw(st.integers(1, 3)) * sources
    shape = (draw(st.integers(1, 5)), rows, draw(st.integers(1, 4)))
    return Rule("layers.{L}.w", *names, shard="expert", view=view), shape


@given(expert_layouts(), st.data())
def test_what_is_laid_out_is_read_back(case, data):
    rule, shape = case
    weights = torch.randn(shape)
    infos = {"layers.3.w": ParameterInfo(shape, torch.float32)}
    checkpoint = {}
    for copy in layout([rule], infos):
        part = weights[copy.target_index]
        assert copy.rows is None
        checkpoint[copy.source] = stored_order(part, copy.view).reshape(
            stored_shape(part.shape, copy.view)
        )
    headers = {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in checkpoint.items()
    }
    assert sum(prod(info.shape) for info in headers.values()) == weights.numel()
    made = read(plan([rule], headers, infos), checkpoint, infos)
    assert torch.equal(made["layers.3.w"], weights)

    owned = data.draw(st.lists(st.integers(0, shape[0] - 1), unique=True))
    mine = {"layers.3.w": ParameterInfo((len(owned), *shape[1:]), torch.float32)}
    made = read(plan([rule], headers, mine, experts=owned), checkpoint, mine)
    assert torch.equal(made["layers.3.w"], weights[owned])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
def test_uneven_parts_are_laid_out_and_read_back(sizes, transposed):
    view = "transpose" if transposed else None
    rule = Rule("w", *(f"s{n}" for n in range(len(sizes))), view=view)
    infos = {"w": ParameterInfo((sum(sizes), 3), torch.float32, tuple(sizes))}
    weights = torch.randn(sum(sizes), 3)
    checkpoint = {
        copy.source: stored_order(weights[copy.target_index], copy.view)
        for copy in layout([rule], infos)
    }
    assert [prod(tensor.shape) for tensor in checkpoint.values()] == [3 * size for size in sizes]
    headers = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in checkpoint.items()}
    assert torch.equal(read(plan([rule], headers, infos), checkpoint, infos)["w"], weights)


def test_the_first_rule_of_a_target_is_the_one_that_is_written():
    names = {copy.source for copy in layout(RULES, parameters(1, 2))}
    assert names == per_expert(1, 2).keys()


def test_is_quick_on_the_names_of_a_large_model():
    checkpoint, infos = per_expert(62, 256), parameters(61, 256)
    checkpoint["m.61.eh_proj"] = TensorInfo((4, 8), torch.bfloat16)
    assert len(checkpoint) > 47_000
    start = time.perf_counter()
    chosen = plan(RULES, checkpoint, infos)
    seconds = time.perf_counter() - start
    assert len(chosen.copies) == 61 * (3 + 3 * 256) + 1
    assert seconds < 5  # about 0.6 on one quiet core
