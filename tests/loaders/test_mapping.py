"""The checkpoint language: rules, the order of stored tensors, what a module says of itself."""

import pytest
import torch
from torch import nn

from moezoo.loaders.mapping import (
    ParameterInfo,
    Rule,
    Skip,
    layout,
    parameter_infos,
    stored_order,
)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("a",), {}, "no sources"),
        (("a.{E}", "b.{E}"), {}, "sources only"),
        (("a.{L}", "b"), {}, "in the target and every source"),
        (("a", "b.{E}", "c"), {}, "in every source"),
        (("a", "b.{X}"), {}, "between dots"),
        (("a", "b{E}"), {}, "between dots"),
        (("a", "b"), {"shard": "row"}, "'row'"),
        (("a", "b"), {"view": "rotate"}, "rotate"),
        (("a", "b"), {"view": ("deinterleave", "transpose")}, "in this order"),
        (("a", "b.{E}"), {"view": "unflatten", "shard": "expert"}, "experts in one tensor"),
    ],
)
def test_malformed_rules(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        Rule(*arguments, **options)


def test_malformed_skips():
    with pytest.raises(ValueError, match="comes last"):
        Skip("a.{*}.b", "reason")
    with pytest.raises(ValueError, match=r"need \{L\}"):
        Skip("a.{*}", "reason", marks=("a.{L}.b",))
    with pytest.raises(ValueError, match=r"need \{L\}"):
        Skip("a.{L}.{*}", "reason", marks=("a.b",))


def test_transpose_and_deinterleave_as_their_definitions():
    i, h = 3, 5
    rows = torch.randn(2 * i, h)  # g0, u0, g1, u1, ...
    parameter = torch.cat((rows[0::2], rows[1::2]))
    assert torch.equal(stored_order(parameter, ("deinterleave",)).reshape(2 * i, h), rows)
    assert torch.equal(stored_order(parameter.T.contiguous(), ("transpose",)), parameter)
    both = stored_order(parameter[None], ("transpose", "deinterleave"))
    assert torch.equal(both.reshape(1, h, 2 * i), rows.T[None])


def test_deinterleave_last_as_its_definition():
    bias = torch.randn(2, 6)  # g0, u0, g1, ..
    parameter = torch.cat((bias[:, 0::2], bias[:, 1::2]), 1)
    assert torch.equal(stored_order(parameter, ("deinterleave_last",)).reshape(2, 6), bias)


def test_a_layout_of_each_expert_where_there_is_one():
    rules = [
        Rule("w", "all", shard="expert"),
        Rule("w", "each.{E}", shard="expert"),
        Rule("gate", "gate"),
    ]
    parameters = {
        "w": ParameterInfo((2, 3, 4), torch.float32),
        "gate": ParameterInfo((2, 4), torch.float32),
    }
    assert [copy.source for copy in layout(rules, parameters)] == ["all", "gate"]
    sources = [copy.source for copy in layout(rules, parameters, per_expert={"w", "gate"})]
    assert sources == ["each.0", "each.1", "gate"]


def test_infos_of_a_module_name_shared_weights_once():
    class Fixed(nn.Module):
        keep_dtype = ("bias",)

        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.empty(2, dtype=torch.float32))
            self.weight = nn.Parameter(torch.empty(2))
            self.register_buffer("steps", torch.empty(3, dtype=torch.int64))
            self.register_buffer("scratch", torch.empty(3), persistent=False)
            self.part_sizes = (1, 1)

    module = nn.ModuleDict({"a": Fixed(), "b": nn.Linear(2, 2, bias=False)})
    module["c"] = module["b"]
    infos = parameter_infos(module, torch.bfloat16)
    assert {name: (info.shape, info.dtype) for name, info in infos.items()} == {
        "a.bias": ((2,), torch.float32),
        "a.weight": ((2,), torch.bfloat16),
        "a.steps": ((3,), torch.int64),
        "b.weight": ((2, 2), torch.bfloat16),
    }
    assert infos["a.weight"].part_sizes == (1, 1) and infos["b.weight"].part_sizes is None
