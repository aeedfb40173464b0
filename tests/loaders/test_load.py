"""Loading: weights in their places, how much is read and held, and what is left after a failure."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import toy_model
from hub_stand_in import Hub, serve
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

import moezoo
from moezoo.errors import (
    CheckpointError,
    MoEOutOfMemoryError,
    QuantizationError,
    UnsupportedArchitectureError,
)
from moezoo.loaders import memory, stream, weights
from moezoo.loaders.checkpoint import Checkpoint, open_checkpoint
from moezoo.loaders.load import build, from_pretrained
from moezoo.loaders.make import from_config
from moezoo.loaders.mapping import Rule, parameter_infos
from moezoo.loaders.weights import load_weights

ASSET = Path(moezoo.__file__).parent / "assets" / "tiny-qwen3-moe"
CPU = torch.device("cpu")
LAYOUTS = ["per expert", "stacked", "exotic"]


def load_toy(folder: Path, toy: nn.Module, **options) -> nn.Module:
    options = {"device": CPU, "dtype": torch.float32} | options
    load_weights(toy, open_checkpoint(folder), toy_model.RULES, **options)
    return toy


def assert_same(a: nn.Module, b: nn.Module) -> None:
    expected = b.state_dict()
    assert a.state_dict().keys() == expected.keys()
    for name, tensor in a.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor.cpu(), expected[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [64, 16 << 20], ids=["cut", "whole"])
def test_every_weight_comes_to_its_place(tmp_path, monkeypatch, layout, batch):
    """With tiny batches, tensors, rows and single rows are cut into pieces."""
    monkeypatch.setattr(stream, "_BATCH", batch)
    toy = toy_model.Toy()
    folder = toy_model.write(tmp_path, toy_model.tensors(toy, layout))
    assert_same(load_toy(folder, toy_model.on_meta()), toy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_casts_but_for_the_dtypes_that_modules_keep(tmp_path, layout):
    toy = toy_model.Toy()
    folder = toy_model.write(tmp_path, toy_model.tensors(toy, layout))
    loaded = load_toy(folder, toy_model.on_meta(), dtype=torch.bfloat16)
    biases = [layer.bias.data.clone() for layer in toy.layers]
    toy.to(torch.bfloat16)
    for layer, bias in zip(toy.layers, biases, strict=True):
        layer.bias.data = bias
    assert_same(loaded, toy)
    assert loaded.layers[0].o.requires_grad and not loaded.layers[0].bias.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [64, 16 << 20], ids=["cut", "whole"])
def test_every_weight_comes_to_its_place_on_a_gpu(tmp_path, monkeypatch, layout, batch, dtype):
    monkeypatch.setattr(stream, "_BATCH", batch)
    folder = toy_model.write(tmp_path, toy_model.tensors(toy_model.Toy(), layout))
    expected = load_toy(folder, toy_model.on_meta(), dtype=dtype)
    loaded = load_toy(folder, toy_model.on_meta(), dtype=dtype, device=torch.device("cuda:0"))
    assert all(tensor.is_cuda for tensor in loaded.state_dict().values())
    assert_same(loaded, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("owned", [[0, 1], [1, 3], [3, 0, 2], []])
def test_a_rank_gets_its_experts_and_reads_no_others(tmp_path, monkeypatch, layout, owned):
    toy = toy_model.Toy()
    stored = toy_model.tensors(toy, layout)
    folder = toy_model.write(tmp_path, stored)
    read = []
    real = os.preadv

    def preadv(file, buffers, offset):
        read.append(real(file, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    loaded = load_toy(folder, toy_model.on_meta(len(owned)), experts=owned)
    for layer, whole in zip(loaded.layers, toy.layers, strict=True):
        assert torch.equal(layer.w13, whole.w13[owned])
        assert torch.equal(layer.w2, whole.w2[owned])
    ours = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    assert sum(read) == ours


def test_downloads_only_the_files_of_a_ranks_experts(tmp_path, monkeypatch):
    stored = toy_model.tensors(toy_model.Toy())
    foreign = {name: stored.pop(name) for name in [*stored] if ".e.3." in name}
    folder = toy_model.write(tmp_path / "served", stored)
    (folder / "model.safetensors").rename(folder / "ours.safetensors")
    save_file(foreign, folder / "foreign.safetensors")
    weight_map = dict.fromkeys(stored, "ours.safetensors")
    weight_map |= dict.fromkeys(foreign, "foreign.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with serve(Hub("a/toy", folder)) as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        checkpoint = open_checkpoint("a/toy", cache_dir=tmp_path / "cache", token=False)
        toy = toy_model.on_meta(2)
        load_weights(
            toy, checkpoint, toy_model.RULES, device=CPU, dtype=torch.float32, experts=[0, 2]
        )
        assert hub.downloads() == {"config.json", index.name, "ours.safetensors"}


def test_shared_weights_are_loaded_once_and_stay_shared(tmp_path):
    with torch.device("meta"):
        toy = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        toy["b"].weight = toy["a"].weight
    folder = toy_model.write(tmp_path, {"w": torch.eye(2)})
    rules = [Rule("a.weight", "w")]
    load_weights(toy, open_checkpoint(folder), rules, device=CPU, dtype=torch.float32)
    assert toy["a"].weight is toy["b"].weight and torch.equal(toy["b"].weight, torch.eye(2))


def test_skipped_tensors_are_said_aloud(tmp_path, caplog):
    folder = toy_model.write(tmp_path, toy_model.tensors(toy_model.Toy()))
    load_toy(folder, toy_model.on_meta())
    assert caplog.messages == ["m.extra.{*}: 1 tensors not loaded: for training"]


def test_loaded_parameters_do_without_their_files(tmp_path):
    weight = torch.randn(1500, 1000)
    folder = toy_model.write(tmp_path, {"w": weight})
    with torch.device("meta"):
        linear = nn.Linear(1000, 1500, bias=False)
    load_weights(
        linear, open_checkpoint(folder), [Rule("weight", "w")], device=CPU, dtype=torch.float32
    )
    shutil.rmtree(folder)
    assert torch.equal(linear.weight, weight)
    linear.weight.data.mul_(2)
    assert torch.equal(linear.weight, 2 * weight)
    linear(torch.ones(1000)).sum().backward()
    assert torch.equal(linear.weight.grad, torch.ones(1500, 1000))


MEMORY = """
import sys, threading, torch
from torch import nn
from moezoo.loaders.checkpoint import Checkpoint, open_checkpoint
from moezoo.loaders.weights import load_weights
from moezoo.loaders.mapping import Rule

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

with torch.device("meta"):
    model = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(12))
rules = [Rule("{L}.weight", "{L}.w", view=sys.argv[3] or None)]
checkpoint = open_checkpoint(sys.argv[1])
torch.ones(512, 512).to(torch.bfloat16).T.contiguous()
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch, daemon=True)
thread.start()
dtype = getattr(torch, sys.argv[2])
load_weights(model, checkpoint, rules, device=torch.device("cpu"), dtype=dtype)
done.set()
thread.join()
peak = max(peak, anonymous())
print(peak - before - sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """0.4 GB in 16 bit, so that a second copy of it could not hide."""
    block = torch.randn(4096, 4096).to(torch.bfloat16)
    stored = {f"{n}.w": block.roll(n) for n in range(12)}
    folder = toy_model.write(tmp_path_factory.mktemp("large"), stored)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "view"), [("float16", ""), ("bfloat16", "transpose")])
def test_memory_beyond_the_weights_is_small(large, dtype, view):
    command = [sys.executable, "-c", MEMORY, str(large), dtype, view]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(output) < 300e6


class Watch:
    """Weak references to every tensor that loading allocates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: list[weakref.ref] = []
        allocate = memory._empty

        def watched(info, device):
            tensor = allocate(info, device)
            self.tensors.append(weakref.ref(tensor))
            return tensor

        monkeypatch.setattr(memory, "_empty", watched)

    def alive(self) -> int:
        gc.collect()
        return sum(tensor() is not None for tensor in self.tensors)


def cut_while_loading(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Take away the end of the file after everything has been checked."""
    real = weights.allocate

    def allocate(wanted, device):
        path = folder / "model.safetensors"
        os.truncate(path, path.stat().st_size - 100)
        return real(wanted, device)

    monkeypatch.setattr(weights, "allocate", allocate)


def test_a_file_cut_while_loading_names_file_and_tensor_and_leaves_nothing(tmp_path, monkeypatch):
    folder = toy_model.write(tmp_path, toy_model.tensors(toy_model.Toy()))
    stored = open_checkpoint(folder).tensors
    last = max(stored.keys() - {"m.extra.x"}, key=lambda name: stored[name].start)
    cut_while_loading(monkeypatch, folder)
    watch = Watch(monkeypatch)
    toy = toy_model.on_meta()
    with pytest.raises(CheckpointError) as caught:
        load_toy(folder, toy)
    assert f"{folder / 'model.safetensors'} ends within {last}" in str(caught.value)
    assert len(watch.tensors) > 10
    assert watch.alive() == 0  # though `caught` holds the traceback
    assert all(tensor.is_meta for tensor in toy.state_dict().values())


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    folder = toy_model.write(tmp_path, toy_model.tensors(toy_model.Toy()))
    watch = Watch(monkeypatch)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "_read", interrupted)
    toy = toy_model.on_meta()
    with pytest.raises(KeyboardInterrupt) as caught:
        load_toy(folder, toy)
    assert caught.tb is not None and watch.tensors and watch.alive() == 0


@pytest.mark.gpu
def test_a_failed_load_leaves_no_device_memory(tmp_path, monkeypatch):
    folder = toy_model.write(tmp_path, toy_model.tensors(toy_model.Toy()))
    cut_while_loading(monkeypatch, folder)
    gc.collect()
    before = torch.cuda.memory_allocated()
    with pytest.raises(CheckpointError) as caught:
        load_toy(folder, toy_model.on_meta(), device=torch.device("cuda:0"))
    gc.collect()
    assert caught.tb is not None and torch.cuda.memory_allocated() == before


def test_a_short_read_is_finished(tmp_path, monkeypatch):
    toy = toy_model.Toy()
    folder = toy_model.write(tmp_path, toy_model.tensors(toy))
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, buffers, offset: real(file, [buffers[0][:7]], offset)
    )
    assert_same(load_toy(folder, toy_model.on_meta()), toy)


def test_refuses_before_a_byte_is_read(tmp_path, monkeypatch):
    stored = toy_model.tensors(toy_model.Toy())
    del stored["m.1.e.2.up"]
    folder = toy_model.write(tmp_path, stored)
    watch = Watch(monkeypatch)
    with pytest.raises(CheckpointError, match=r"expert 2 of layer 1: m\.1\.e\.2\.up"):
        load_toy(folder, toy_model.on_meta())
    assert watch.tensors == []


@pytest.mark.parametrize(
    "free, advice",
    [
        (4000, r"take 0\.00 GiB, cpu has 0\.00 GiB free; with dtype=torch\.bfloat16"),
        (1000, r"in 16 bit they fit a device with"),
    ],
)
def test_too_little_memory_is_found_before_anything_is_allocated(
    tmp_path, monkeypatch, free, advice
):
    folder = toy_model.write(tmp_path, toy_model.tensors(toy_model.Toy()))
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    watch = Watch(monkeypatch)
    with pytest.raises(MoEOutOfMemoryError, match=advice) as caught:
        load_toy(folder, toy_model.on_meta())
    assert str(folder) in str(caught.value) and watch.tensors == []


@pytest.mark.parametrize(
    ("free", "device", "advice"),
    [
        (9_300_000, "cpu", "with quantization='fp8_w8a8' they take 0.01 GiB and fit"),
        (9_400_000, "cuda:0", "with quantization='int8_w8a16' they take 0.01 GiB and fit"),
        (7_000_000, "cpu", "with quantization='int4_w4a16' they take 0.01 GiB and fit"),
        (1_000_000, "cpu", "in 16 bit they fit a device with"),
    ],
)
def test_too_little_memory_names_the_quantisation_that_fits(monkeypatch, free, device, advice):
    checkpoint = open_checkpoint(ASSET)
    decoder = build(
        checkpoint, dtype="bfloat16", quantization=None, device=None, progress=False
    ).decoder
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    monkeypatch.setattr(memory, "multiplies_fp8", lambda device: device.type == "cpu")
    wanted = parameter_infos(decoder, torch.bfloat16)
    with pytest.raises(MoEOutOfMemoryError) as caught:
        memory.check_memory(wanted, torch.device(device), "it", decoder)
    assert advice in str(caught.value)
    if "quantization" in advice:
        quantization = advice.split("'")[1]
        model = from_pretrained(
            ASSET, dtype="bfloat16", quantization=quantization, device="cpu", progress=False
        )
        assert sum(tensor.nbytes for tensor in model.state_dict().values()) <= free


@pytest.mark.gpu
def test_too_little_memory_on_a_gpu_offers_the_cpu(tmp_path, monkeypatch):
    folder = toy_model.write(tmp_path, toy_model.tensors(toy_model.Toy()))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    with pytest.raises(MoEOutOfMemoryError, match=r"cuda:0 has 0\.00 GiB free; device='cpu' has"):
        load_toy(folder, toy_model.on_meta(), device=torch.device("cuda:0"))


def test_an_allocation_that_fails_is_an_out_of_memory_error(tmp_path, monkeypatch):
    folder = toy_model.write(tmp_path, toy_model.tensors(toy_model.Toy()))
    allocate = memory._empty
    calls = []

    def failing(info, device):
        calls.append(info)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(info, device)

    monkeypatch.setattr(memory, "_empty", failing)
    watch = Watch(monkeypatch)
    with pytest.raises(MoEOutOfMemoryError, match="CUDA out of memory"):
        load_toy(folder, toy_model.on_meta())
    assert len(watch.tensors) == 4 and watch.alive() == 0


def test_free_memory_of_the_host_is_known():
    free = memory.free_memory(CPU)
    assert free is None or 1 << 20 < free < 1 << 50


def test_the_trained_model_is_read_as_transformers_reads_it():
    ids = torch.arange(40)[None]
    model = from_pretrained(ASSET, dtype=torch.float32, device="cpu", progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert not model.training
    assert model.generation_config.temperature == theirs.generation_config.temperature == 0.8
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.name_or_path == str(ASSET)


@pytest.mark.parametrize(
    "dtype, expected",
    [
        ("auto", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_dtype(dtype, expected):
    model = from_pretrained(str(ASSET), dtype=dtype, device="cpu", progress=False)
    assert model.dtype == model.config.dtype == expected


def copy_asset(folder: Path, remove: tuple[str, ...] = (), **fields) -> Path:
    shutil.copytree(ASSET, folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if name not in remove}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("declared", [True, False])
def test_a_checkpoint_in_float64_loads_as_float32_and_inspect_says_so(tmp_path, declared):
    """No layer computes in float64."""
    fields = {"dtype": "float64"} if declared else {}
    folder = copy_asset(tmp_path / "m", remove=("torch_dtype",), **fields)
    change_weights(folder, lambda t: t.update({name: w.double() for name, w in t.items()}))
    model = from_pretrained(folder, device="cpu", progress=False)
    assert model.dtype == model.config.dtype == torch.float32
    assert_same(model, from_pretrained(ASSET, dtype="float32", device="cpu", progress=False))
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=1).shape == (1, 3)
    report = moezoo.inspect(folder)
    assert report.supported and report.dtype == "float32"
    assert from_config(small_config(dtype="float64")).dtype == torch.float32


def test_a_dtype_in_the_config_that_no_model_has_is_named_unless_one_is_given(tmp_path):
    folder = copy_asset(tmp_path / "m", remove=("torch_dtype",), dtype="int8")
    with pytest.raises(UnsupportedArchitectureError) as caught:
        from_pretrained(folder, device="cpu", progress=False)
    assert str(caught.value) == (
        f"{folder}: config.dtype is torch.int8, expected bfloat16, float16, float32 or float64; "
        "choose one with dtype"
    )
    assert moezoo.inspect(folder).reason == str(caught.value)
    assert from_pretrained(folder, dtype="float16", progress=False).dtype == torch.float16
    with pytest.raises(
        UnsupportedArchitectureError, match=r"qwen3_moe: config\.dtype is torch\.int8"
    ):
        from_config(small_config(dtype="int8"))


def test_auto_dtype_without_one_in_the_config_is_the_tensors(tmp_path):
    folder = copy_asset(tmp_path / "m", remove=("torch_dtype",))
    assert from_pretrained(folder, progress=False).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dtype": "bf17"}, ValueError, "dtype is 'bf17', expected 'auto' or one of bfloat16"),
        ({"dtype": torch.int8}, ValueError, "dtype is torch.int8"),
        (
            {"dtype": "float64"},
            ValueError,
            "dtype is 'float64', expected 'auto' or one of bfloat16, float16, float32",
        ),
        ({"dtype": None}, ValueError, "dtype is None"),
        ({"device": "gpu"}, ValueError, "device is 'gpu', expected 'cuda', 'cuda:1' or 'cpu'"),
        ({"device": "meta"}, ValueError, "device is 'meta'"),
        ({"device": 3.5}, ValueError, "device is 3.5"),
        ({"parallel": 8}, ValueError, "parallel is 8, expected a moezoo.Parallel or None"),
        ({"eplb": {}}, ValueError, "eplb={} is for experts that are divided over ranks"),
        ({"quantization": "int3_w3a16"}, ValueError, "quantization type is 'int3_w3a16'"),
    ],
)
def test_bad_arguments(options, error, message):
    for call in (
        lambda: from_pretrained(ASSET, **options),
        lambda: from_config(AutoConfig.from_pretrained(ASSET), **options),
    ):
        with pytest.raises(error) as caught:
            call()
        assert message in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda():
    with pytest.raises(ValueError, match="device is 'cuda', but torch sees no CUDA device"):
        from_pretrained(ASSET, device="cuda")


def test_cuda_device_that_is_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device is 'cuda:7', but there are 2 CUDA devices"):
        from_pretrained(ASSET, device="cuda:7")


def test_the_default_device_is_the_gpu_if_there_is_one():
    model = from_pretrained(ASSET, progress=False)
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_default_device_of_the_caller_does_not_matter():
    with torch.device("meta"):
        model = from_pretrained(ASSET, dtype="float32", device="cpu", progress=False)
    assert model.device == CPU


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"model_type": "llama"}, UnsupportedArchitectureError, 'experts_implementation="moezoo"'),
        ({"hidden_act": "mish"}, UnsupportedArchitectureError, 'experts_implementation="moezoo"'),
        ({"model_type": "no_such"}, UnsupportedArchitectureError, "qwen3_moe"),
        ({"model_type": None}, CheckpointError, "names no model_type"),
        ({"hidden_size": "wide"}, CheckpointError, "config.json is not valid"),
        ({"torch_dtype": "float99"}, CheckpointError, "config.json is not valid: module 'torch'"),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 0,
                }
            },
            CheckpointError,
            "config.json is not valid: division by zero",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": "big"}},
            UnsupportedArchitectureError,
            "config.rope_parameters is {",
        ),
        ({"vocab_size": -1}, UnsupportedArchitectureError, "config.vocab_size is -1"),
        ({"quantization_config": {"quant_method": "quark"}}, QuantizationError, "'quark'"),
        ({"num_experts": 17}, CheckpointError, "expert 16 of layer 0"),
        ({"num_hidden_layers": 7}, CheckpointError, "model.layers.6.input_layernorm.weight"),
        (
            {"hidden_size": 128},
            CheckpointError,
            "is [4096, 256] in model.safetensors, embed.weight takes [4096, 128]",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path, fields, error, message):
    folder = copy_asset(tmp_path / "m", **fields)
    with pytest.raises(error) as caught:
        from_pretrained(folder, progress=False)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_remote_code_of_a_supported_architecture_is_not_needed(tmp_path):
    folder = copy_asset(tmp_path / "m", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert from_pretrained(folder, progress=False).config.model_type == "qwen3_moe"


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    stored = load_file(path)
    change(stored)
    save_file(stored, path, metadata={"format": "pt"})


def reference_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(ids).logits


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "change, tied",
    [
        (lambda t: t.update({HEAD: t[EMBEDDING].clone()}), True),
        (lambda t: t.update({HEAD: t.pop(EMBEDDING)}), True),
        (lambda t: t.update({HEAD: t[EMBEDDING].flip(0)}), False),
    ],
    ids=["equal head", "head alone", "another head"],
)
def test_tied_configs_load_as_in_transformers(tmp_path, caplog, change, tied):
    folder = copy_asset(tmp_path / "m")
    change_weights(folder, change)
    model = from_pretrained(folder, dtype="float32", device="cpu", progress=False)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, reference_logits(folder, ids), rtol=1e-4, atol=1e-4
        )
    assert model.config.tie_word_embeddings is tied
    assert any("differ; they stay apart" in message for message in caplog.messages) is not tied


@pytest.mark.parametrize(
    "head, free",
    [(lambda t: t.clone(), None), (lambda t: t.flip(0), None), (lambda t: t.clone(), 1000)],
    ids=["equal head", "another head", "too little memory"],
)
def test_a_tied_checkpoint_that_does_not_fit_is_refused_before_a_byte_is_read(
    tmp_path, monkeypatch, head, free
):
    """Whether the head equals the embedding is in their bytes, but all else is asked first."""
    folder = copy_asset(tmp_path / "m")
    lost = "model.layers.2.mlp.experts.7.up_proj.weight"
    change_weights(folder, lambda t: t.update({HEAD: head(t[EMBEDDING])}))
    if free is None:
        change_weights(folder, lambda t: t.pop(lost))
    else:
        monkeypatch.setattr(memory, "free_memory", lambda device: free)

    def fetch(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(Checkpoint, "fetch", fetch)
    error, message = (CheckpointError, lost) if free is None else (MoEOutOfMemoryError, str(folder))
    with pytest.raises(error) as caught:
        from_pretrained(folder, device="cpu", progress=False)
    assert message in str(caught.value)


def test_a_head_of_another_shape_than_the_tied_embedding_is_refused_by_both(tmp_path):
    folder = copy_asset(tmp_path / "m")
    change_weights(folder, lambda t: t.update({HEAD: t[EMBEDDING][:4000].clone()}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[4000, 256\]") as caught:
        from_pretrained(folder, device="cpu", progress=False)
    assert moezoo.inspect(folder).reason == str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"max_new_tokens": "many"}', '"\xff'])
def test_a_malformed_generation_config_is_found_before_weights_are_read(
    tmp_path, monkeypatch, text
):
    folder = copy_asset(tmp_path / "m")
    (folder / "generation_config.json").write_text(text, encoding="latin-1")
    watch = Watch(monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder, device="cpu", progress=False)
    assert f"{folder}: generation_config.json is not valid: " in str(caught.value)
    assert watch.tensors == []


def small_config(**fields) -> Qwen3MoeConfig:
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 500, "initializer_range": 0.1}
    return Qwen3MoeConfig(**sizes, **fields)


def test_random_weights_repeat_with_the_seed_and_follow_the_config():
    config = small_config()
    torch.manual_seed(1)
    first = from_config(config, device="cpu")
    again = from_config(config, device="cpu")
    torch.manual_seed(1)
    second = from_config(config, device="cpu")
    assert_same(first, second)
    assert not torch.equal(first.decoder.embed.weight, again.decoder.embed.weight)
    assert first.decoder.embed.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert first.decoder.layers[0].mlp.w13.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.all(first.decoder.layers[0].attn_norm.weight == 1)
    assert not first.training and first(torch.arange(5)[None]).logits.isfinite().all()


def test_from_config_where_tensors_are_made_on_meta():
    torch.manual_seed(1)
    expected = from_config(small_config(), device="cpu")
    torch.manual_seed(1)
    with torch.device("meta"):
        found = from_config(small_config(), device="cpu")
    assert_same(found, expected)


def test_from_config_leaves_the_config_alone():
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    before = config.to_dict()
    model = from_config(config, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16 and config.to_dict() == before


def test_biases_start_at_zero():
    model = from_config(small_config(attention_bias=True), device="cpu")
    assert torch.all(model.decoder.layers[0].attn.qkv.bias == 0)


@pytest.mark.parametrize("config", [{"model_type": "qwen3_moe"}, "qwen3_moe", None])
def test_from_config_wants_a_config(config):
    with pytest.raises(ValueError, match="expected a transformers config"):
        from_config(config)


def test_from_config_checks_the_memory_first(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(MoEOutOfMemoryError, match="the weights of this qwen3_moe take"):
        from_config(small_config(), device="cpu")


def test_loads_inside_inference_mode():
    with torch.inference_mode():
        model = from_pretrained(ASSET, dtype="float32", device="cpu", progress=False)
    assert not any(parameter.is_inference() for parameter in model.parameters())


class Terminal:
    """A stderr that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        self.terminal = terminal
        self.text = ""

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    "terminal, progress, shown", [(True, True, True), (True, False, False), (False, True, False)]
)
def test_progress_shows_on_a_terminal_only(monkeypatch, terminal, progress, shown):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    stderr = Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    from_pretrained(ASSET, device="cpu", progress=progress)
    assert ("loading" in stderr.text and "14.0/14.0 MB" in stderr.text) is shown
    if not shown:
        assert stderr.text == ""
