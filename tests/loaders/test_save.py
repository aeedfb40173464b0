"""Saving: the hub's layout, read back bit for bit, and folders that are never half written."""

import json
import os
import resource
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import toy_model
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2MoeConfig
from written_module import write_weights

import moezoo
from moezoo.loaders import save
from moezoo.loaders.checkpoint import open_checkpoint
from moezoo.loaders.files import INDEX
from moezoo.loaders.load import from_pretrained
from moezoo.loaders.make import from_config
from moezoo.loaders.mapping import Rule
from moezoo.loaders.save import save_pretrained
from moezoo.loaders.weights import load_weights

ASSET = Path(moezoo.__file__).parent / "assets" / "tiny-qwen3-moe"
CPU = torch.device("cpu")


def read_back(folder: Path, module: nn.Module, rules, dtype=torch.float32) -> nn.Module:
    (folder / "config.json").write_text("{}")
    load_weights(module, open_checkpoint(folder), rules, device=CPU, dtype=dtype)
    return module


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def test_writes_the_layout_of_the_first_rules(tmp_path):
    toy = toy_model.Toy()
    write_weights(toy, toy_model.RULES, tmp_path)
    expected = toy_model.tensors(toy, "per expert")
    del expected["m.extra.x"]
    written = stored(tmp_path)
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("exotic", [False, True])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, exotic):
    """`exotic` writes the views by making their rules the first."""
    toy = toy_model.Toy()
    toy.layers[0].w2.data[0, 0, 0] = torch.nan
    rules = toy_model.RULES[::-1] if exotic else toy_model.RULES
    write_weights(toy, rules, tmp_path)
    assert exotic == ("m.0.e.mixed" in stored(tmp_path))
    loaded = read_back(tmp_path, toy_model.on_meta(), rules)
    for name, tensor in toy.state_dict().items():
        read = loaded.state_dict()[name]
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8)), name


@given(st.integers(1, 3000), st.integers(1, 6), st.integers(1, 9))
def test_shards_hold_everything_once(tmp_path_factory, limit, experts, rows):
    folder = tmp_path_factory.mktemp("shards")
    module = nn.ModuleDict({"w": nn.Linear(7, rows), "e": nn.Module()})
    module["e"].stack = nn.Parameter(torch.randn(experts, 4, 5))
    rules = [
        Rule("w.weight", "weight"),
        Rule("w.bias", "bias"),
        Rule("e.stack", "gate.{E}", "up.{E}", shard="expert"),
    ]
    write_weights(module, rules, folder, max_shard_size=limit)
    sizes = [
        sum(tensor.nbytes for tensor in load_file(path).values())
        for path in folder.glob("*.safetensors")
    ]
    largest = max(tensor.nbytes for tensor in stored(folder).values())
    assert max(sizes) <= max(limit, largest)
    assert sum(sizes) == sum(parameter.nbytes for parameter in module.parameters())
    if len(sizes) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(sizes)
        assert index["weight_map"].keys() == stored(folder).keys()
    on_meta = nn.ModuleDict({"w": nn.Linear(7, rows), "e": nn.Module()})
    on_meta["e"].stack = nn.Parameter(torch.empty(experts, 4, 5))
    read_back(folder, on_meta.to("meta"), rules)
    for name, tensor in module.state_dict().items():
        assert torch.equal(on_meta.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "size, expected",
    [
        (7, 7),
        ("5GB", 5 * 10**9),
        ("200 MB", 2 * 10**8),
        ("3KiB", 3072),
        ("1gib", 2**30),
        ("1.5GB", 1_500_000_000),
        (" .5 mb ", 500_000),
    ],
)
def test_shard_sizes(size, expected):
    assert save.shard_bytes(size) == expected


@pytest.mark.parametrize(
    "size", ["5", "GB", "5 bytes", "-1GB", "0MB", "1.5.2GB", ".GB", 0, -3, None]
)
def test_malformed_shard_sizes(tmp_path, size):
    model = from_pretrained(ASSET, device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"max_shard_size is .* expected a positive number"):
        model.save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", ["5GB", "1MB"])
def test_transformers_reads_it_to_the_same_logits(tmp_path, size):
    model = from_pretrained(ASSET, dtype="float32", device="cpu", progress=False)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / INDEX).exists() == (size == "1MB")
    assert stored(tmp_path).keys() == stored(ASSET).keys()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    original = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, original(ids).logits)
    assert type(theirs).__name__ == "Qwen3MoeForCausalLM"
    assert theirs.generation_config.top_p == 0.95


def test_moezoo_reads_it_back_bit_for_bit(tmp_path):
    model = from_pretrained(ASSET, device="cpu", progress=False)
    model.save_pretrained(str(tmp_path))
    again = from_pretrained(tmp_path, device="cpu", progress=False)
    assert again.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["dtype"] == "bfloat16"
    written = stored(tmp_path)
    assert "lm_head.weight" not in written
    assert all(torch.equal(tensor, written[name]) for name, tensor in stored(ASSET).items())


def test_a_random_model_names_the_class_that_reads_it(tmp_path):
    config = Qwen2MoeConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_experts=3,
        num_experts_per_tok=2,
    )
    model = from_config(config, device="cpu")
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert type(theirs).__name__ == "Qwen2MoeForCausalLM"


def test_a_generation_config_that_transformers_would_not_write_is_kept(tmp_path):
    model = from_pretrained(ASSET, device="cpu", progress=False)
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.3


class Saved:
    """Just what save_pretrained needs of a model."""

    def __init__(self) -> None:
        model = from_pretrained(ASSET, device="cpu", progress=False)
        self.decoder, self.config = model.decoder, model.config
        self.generation_config = model.generation_config


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    write = save._write

    def interrupted(path, *tensors):
        write(path, *tensors)
        if path.name.startswith("model-00003"):
            raise KeyboardInterrupt

    monkeypatch.setattr(save, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(Saved(), tmp_path / "a" / "new", max_shard_size="1MB")
    assert not (tmp_path / "a" / "new").exists()


def test_a_write_that_fails_names_the_file(tmp_path):
    """A limit on the size of files stands for a full disk, whose error names no file either."""
    saved = Saved()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: ") as caught:
            save_pretrained(saved, tmp_path / "new", max_shard_size="2MB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(caught.value.filename) == tmp_path / "new" / "model-00001-of-00007.safetensors"
    assert ".saving" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("existed", [False, True])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, existed):
    saved, make = Saved(), Path.mkdir
    folder = tmp_path / "a" / "new"
    if existed:
        folder.mkdir(parents=True)

    def refused(path, *how, **more):
        if ".saving" in path.name:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        make(path, *how, **more)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(PermissionError) as caught:
        save_pretrained(saved, folder)
    assert str(caught.value) == f"[Errno 13] Permission denied: '{folder}'"
    assert (tmp_path / "a").exists() == existed


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    save_pretrained(Saved(), tmp_path, max_shard_size="2MB")
    (tmp_path / "tokenizer.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, *tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(Saved(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt, SystemExit(143), OSError(5, "Input/output error")], ids=repr
)
def test_a_save_that_stops_while_moving_is_no_checkpoint_and_loses_nothing(
    tmp_path, monkeypatch, caplog, stop
):
    """Old and new shards together would load as one model that never was."""
    folder = tmp_path / "m"
    save_pretrained(Saved(), folder, max_shard_size="2MB")
    model = Saved()
    model.decoder.norm.weight.data.fill_(3)
    move = Path.replace
    moves = []

    def stopped(path, target):
        moves.append(target)
        if len(moves) == 4:
            raise stop
        return move(path, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises((KeyboardInterrupt, SystemExit, OSError)):
        save_pretrained(model, folder, max_shard_size="2MB")
    monkeypatch.undo()
    with pytest.raises(moezoo.errors.CheckpointError, match="has neither"):
        open_checkpoint(folder)
    # as it says
    (draft,) = folder.glob(".saving-*")
    assert f"the rest is in {draft}" in caplog.text
    for path in sorted(draft.iterdir(), key=lambda path: path.name == INDEX):
        path.replace(folder / path.name)
    again = from_pretrained(folder, device="cpu", progress=False)
    for name, tensor in model.decoder.state_dict().items():
        assert torch.equal(again.decoder.state_dict()[name], tensor), name


def test_the_config_names_the_dtype_of_the_weights(tmp_path):
    model = from_pretrained(ASSET, dtype="float32", device="cpu", progress=False).to(torch.float16)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    again = from_pretrained(tmp_path, device="cpu", progress=False)
    assert theirs.dtype == again.dtype == torch.float16
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert model.config.dtype == torch.float32  # the model's own is left alone


@pytest.mark.parametrize("first, second", [("1MB", "5GB"), ("5GB", "1MB"), ("1MB", "3MB")])
def test_stale_weights_go_and_other_files_stay(tmp_path, first, second):
    save_pretrained(Saved(), tmp_path, max_shard_size=first)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "other.safetensors").write_bytes(b"mine")
    save_pretrained(Saved(), tmp_path, max_shard_size=second)
    (tmp_path / "other.safetensors").unlink()
    assert (tmp_path / "tokenizer.json").exists()
    checkpoint = open_checkpoint(tmp_path)
    assert {info.file for info in checkpoint.tensors.values()} == {
        path.name for path in tmp_path.glob("*.safetensors")
    }
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_saves_over_the_checkpoint_that_it_was_loaded_from(tmp_path):
    save_pretrained(Saved(), tmp_path)
    model = from_pretrained(tmp_path, device="cpu", progress=False)
    model.decoder.norm.weight.data.fill_(3)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, device="cpu", progress=False)
    assert torch.all(again.decoder.norm.weight == 3)
    assert torch.equal(again.decoder.embed.weight, model.decoder.embed.weight)
