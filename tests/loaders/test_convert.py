"""Checkpoints written anew a layer at a time: the same files as loaded whole and saved."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from hub_writers import gptq
from safetensors.torch import load_file
from small_models import ASSET, assert_same, change, load, moe_layers, plain, set_config
from test_hub_formats import gptq_config, write

from moezoo import cli
from moezoo.errors import QuantizationError
from moezoo.layers.quant import Int4
from moezoo.loaders import weights
from moezoo.loaders.checkpoint import open_checkpoint
from moezoo.loaders.convert import convert


@pytest.mark.parametrize(
    "asked",
    [
        "fp8_w8a8",
        {"type": "fp8_w8a8", "granularity": "channel"},
        "int8_w8a16",
        {"type": "int4_w4a16", "group_size": 64, "symmetric": False},
        "mxfp4",
        None,
    ],
    ids=str,
)
def test_the_files_are_those_of_save_pretrained(tmp_path, asked):
    options = {"dtype": "float16", "quantization": asked}
    done = convert(open_checkpoint(ASSET), tmp_path / "a", device="cpu", **options)
    load(ASSET, **options).save_pretrained(tmp_path / "b")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        found, expected = ((tmp_path / name / file).read_bytes() for name in "ab")
        assert found == expected, file
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert done.bytes_after == sum(tensor.nbytes for tensor in stored.values())
    tokenizer = (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert tokenizer == (ASSET / "tokenizer.json").read_bytes()
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith((ASSET / "README.md").read_text().rstrip())
    assert f"{done.bytes_before:,}" in card and f"{done.bytes_after:,}" in card
    assert ("not quantised" if asked is None else done.kinds[0]) in card


def test_several_files_and_a_tied_head(tmp_path):
    plain("qwen3_moe").save_pretrained(tmp_path / "from")
    convert(
        open_checkpoint(tmp_path / "from"),
        tmp_path / "to",
        quantization="int8_w8a16",
        device="cpu",
        max_shard_size="300KB",
    )
    assert len(list((tmp_path / "to").glob("model-*.safetensors"))) > 2
    assert_same(load(tmp_path / "to"), load(tmp_path / "from", quantization="int8_w8a16"))


def test_quantised_checkpoints_in_another_layout(tmp_path):
    how = {"desc_act": True, "sym": False}
    hub, _ = write(tmp_path, lambda w: gptq(w, **how), gptq_config(**how))
    convert(open_checkpoint(hub), tmp_path / "to", device="cpu")
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    model = load(tmp_path / "to")
    assert_same(model, load(hub))
    assert isinstance(moe_layers(model)[0].w13(), Int4)


def test_no_more_than_a_layer_is_in_memory(tmp_path, monkeypatch):
    real = weights.allocate
    alive: list[weakref.ref] = []
    sizes: list[int] = []

    def allocate(wanted, device):
        gc.collect()
        assert not any(tensor() is not None for tensor in alive)
        tensors = real(wanted, device)
        alive[:] = [weakref.ref(tensor) for tensor in tensors.values()]
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        return tensors

    monkeypatch.setattr(weights, "allocate", allocate)
    done = convert(open_checkpoint(ASSET), tmp_path / "to", quantization="mxfp4", device="cpu")
    embedding = 4096 * 256 * 2
    assert len(sizes) == 6 + 2
    assert max(sizes) == embedding
    assert sum(sizes) == done.bytes_after


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    plain("mixtral").save_pretrained(tmp_path / "from")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    change(tmp_path / "from", lambda stored: stored[name][0].fill_(torch.nan))
    with pytest.raises(QuantizationError, match=name):
        convert(
            open_checkpoint(tmp_path / "from"),
            tmp_path / "a" / "to",
            quantization="mxfp4",
            device="cpu",
        )
    assert not (tmp_path / "a" / "to").exists()


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_command_line(tmp_path, capsys):
    asked = '{"type": "int4_w4a16", "group_size": 32}'
    command = ("convert", ASSET, tmp_path / "to", "--quantization", asked, "--device", "cpu")
    assert run(*command) == 0
    assert "experts in int4_w4a16 in groups of 32; 13,950,976 bytes" in capsys.readouterr().err
    assert_same(load(tmp_path / "to"), load(ASSET, quantization=json.loads(asked)))
    assert run(*command) == 2
    assert "is there already; give a folder that is new" in capsys.readouterr().err
    for wrong, message in (
        ("int5", "quantization type is 'int5', expected one of 'fp8_w8a8'"),
        ('{"type": "mxfp4", "group_size": 3}', "group_size=3 is not for mxfp4"),
        ('{"type"', "Expecting"),
    ):
        with pytest.raises(SystemExit) as caught:
            run("convert", ASSET, tmp_path / "other", "--quantization", wrong)
        assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_card_of_a_model_that_has_none(tmp_path):
    plain("mixtral").save_pretrained(tmp_path / "from")
    set_config(tmp_path / "from", architectures=["MixtralForCausalLM"])
    to: Path = tmp_path / "to"
    convert(open_checkpoint(tmp_path / "from"), to, quantization="int8_w8a16", device="cpu")
    assert (to / "README.md").read_text().startswith("## Quantisation\n")
    assert json.loads((to / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
