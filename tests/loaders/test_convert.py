"""Checkpoints written anew a layer at a time: the same files as loaded whole and saved."""

import gc
import json
import signal
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hub_writers import gptq
from safetensors.torch import load_file
from small_models import ASSET, assert_same, change, load, moe_layers, plain, set_config
from test_hub_formats import gptq_config, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import moezoo
from moezoo import cli
from moezoo.errors import QuantizationError
from moezoo.layers.quant import Int4
from moezoo.loaders import hub_layout, weights
from moezoo.loaders.checkpoint import open_checkpoint
from moezoo.loaders.convert import convert

START = "<!-- moezoo: quantisation -->\n"


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
    model = load(ASSET, **options)
    model.save_pretrained(tmp_path / "b")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        found, expected = ((tmp_path / name / file).read_bytes() for name in "ab")
        assert found == expected, file
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert done.bytes_after == sum(tensor.nbytes for tensor in stored.values())
    tokenizer = (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert tokenizer == (ASSET / "tokenizer.json").read_bytes()
    card = (tmp_path / "a" / "README.md").read_text()
    before = (ASSET / "README.md").read_text()
    if asked is None:
        assert done.weight_error is None and card == before
        return
    assert card.startswith(before.rstrip())
    assert f"{done.bytes_before:,}" in card and f"{done.bytes_after:,}" in card
    assert done.experts[0] in card
    assert "was not measured" in card and "| loss before" not in card
    errors = weights = 0.0
    for ours, plain_layer in zip(moe_layers(model), moe_layers(load(ASSET)), strict=True):
        for name in ("w13", "w2"):
            w = getattr(plain_layer, name).detach().double()
            found = getattr(ours, name)().dequantize().double().view(w.shape)
            errors += (found - w).square().sum().item()
            weights += w.square().sum().item()
    assert done.weight_error == pytest.approx((errors / weights) ** 0.5, rel=1e-3)
    assert f"{done.weight_error:.2%}" in card


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


def test_quantised_checkpoints_in_another_layout(tmp_path, caplog):
    how = {"desc_act": True, "sym": False}
    hub, _ = write(tmp_path, lambda w: gptq(w, **how), gptq_config(**how))
    convert(open_checkpoint(hub), tmp_path / "to", device="cpu")
    both = "have zero points and have their columns in an order of their own: moezoo loads it, but"
    assert caplog.text.count(both) == 1
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


def test_layers_are_planned_together_and_written_under_one_bar(tmp_path, monkeypatch):
    plans, bars, shown = [], [], []
    real = hub_layout.WritePlan
    monkeypatch.setattr(
        "moezoo.loaders.convert.WritePlan", lambda *args: plans.append(None) or real(*args)
    )

    @contextmanager
    def bar(*how):
        bars.append(how)
        yield shown.append

    monkeypatch.setattr("moezoo.loaders.convert.bar", bar)
    done = convert(open_checkpoint(ASSET), tmp_path / "to", quantization="mxfp4", device="cpu")
    assert bars == [("converting", done.bytes_after, False)] and sum(shown) == done.bytes_after
    assert len(plans) == 1


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
    said = capsys.readouterr().err
    assert "experts in int4_w4a16 in groups of 32 (relative error " in said
    assert "; 13,950,976 bytes of weights" in said
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
    for asked, folder, message in (
        (
            '{"type": "int4_w4a16", "group_size": 128}',
            ASSET,
            "group_size=128, and groups of 128 do",
        ),
        ("mxfp4", tmp_path / "to", "has its experts in int4_w4a16 already"),
    ):
        assert run("convert", folder, tmp_path / "other", "--quantization", asked) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_card_of_a_model_that_has_none(tmp_path):
    plain("mixtral").save_pretrained(tmp_path / "from")
    assert not (tmp_path / "from" / "README.md").exists()
    set_config(tmp_path / "from", architectures=["MixtralForCausalLM"])
    to: Path = tmp_path / "to"
    convert(open_checkpoint(tmp_path / "from"), to, quantization="int8_w8a16", device="cpu")
    assert (to / "README.md").read_text().startswith(f"{START}## Quantisation\n")
    assert json.loads((to / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]


@pytest.mark.parametrize("before", [b"# A\r\n\r\nB\r\n", b"# A\r\n\nB\n"])
def test_a_card_keeps_its_line_ends(tmp_path, before):
    plain("mixtral").save_pretrained(tmp_path / "from")
    (tmp_path / "from" / "README.md").write_bytes(before)
    once, twice = tmp_path / "once", tmp_path / "twice"
    convert(open_checkpoint(tmp_path / "from"), once, quantization="int8_w8a16", device="cpu")
    lines = b"\r\n" if before.endswith(b"\r\n") else b"\n"
    card = (once / "README.md").read_bytes()
    assert card.startswith(before + lines + START.strip().encode() + lines)
    (once / "README.md").write_bytes(card.replace(b"\n", b"\r\n", 1).replace(b"\r\r", b"\r"))
    convert(open_checkpoint(once), twice, device="cpu")
    assert (twice / "README.md").read_bytes().count(START.strip().encode()) == 1


def test_a_card_has_one_section(tmp_path):
    plain("mixtral").save_pretrained(tmp_path / "from")
    before = b"# Mixtral \xe9\n"
    (tmp_path / "from" / "README.md").write_bytes(before)
    once, twice = tmp_path / "once", tmp_path / "twice"
    convert(open_checkpoint(tmp_path / "from"), once, quantization="int8_w8a16", device="cpu")
    convert(open_checkpoint(once), twice, device="cpu")
    for folder in (once, twice):
        card = (folder / "README.md").read_bytes()
        assert card.startswith(before + b"\n" + START.encode()) and card.count(b"## Quant") == 1
    assert str(once).encode() in card


@pytest.mark.parametrize(
    ("asked", "described"),
    [
        ({"group_size": 64}, ("int4_w4a16 in groups of 64",)),
        ({}, ("int4_w4a16 in groups of 128", "int4_w4a16 in groups of 64")),
        ({"per_channel": True}, ("int4_w4a16 with a scale a row",)),
    ],
    ids=str,
)
def test_groups_as_wide_as_a_row_are_called_as_they_were_asked_for(tmp_path, asked, described):
    """The experts' down projections have 64 columns."""
    to, again = tmp_path / "to", tmp_path / "again"
    asked = {"type": "int4_w4a16"} | asked
    done = convert(open_checkpoint(ASSET), to, quantization=asked, device="cpu")
    assert done.experts == described
    load(to).save_pretrained(again)
    for folder in (to, again):
        assert f"| experts | in {' and '.join(described)} |" in (folder / "README.md").read_text()
        assert moezoo.inspect(folder).stored_as.startswith(f"{' and '.join(described)}: the exp")


@pytest.mark.parametrize(
    ("asked", "described"),
    [
        (
            {"type": "int4_w4a16", "block_shape": [8, 64]},
            "int4_w4a16 in blocks of 8 x 64",
        ),
        ({"type": "fp8_w8a8", "granularity": "tensor"}, "fp8_w8a8 with a scale a matrix"),
    ],
    ids=str,
)
def test_scales_of_several_rows_are_called_as_they_were_asked_for(tmp_path, asked, described):
    to, again = tmp_path / "to", tmp_path / "again"
    done = convert(open_checkpoint(ASSET), to, quantization=asked, device="cpu")
    assert done.experts == (described,)
    load(ASSET, quantization=asked).save_pretrained(again)
    for folder in (to, again):
        assert f"| experts | in {described} |" in (folder / "README.md").read_text()


def test_a_save_tells_of_its_quantisation_in_the_card_that_is_there(tmp_path):
    model = load(ASSET, quantization="int8_w8a16")
    model.save_pretrained(tmp_path)
    section = (tmp_path / "README.md").read_text()
    assert "| experts | in int8_w8a16 with a scale a row |" in section
    assert str(ASSET) in section
    stored = load_file(tmp_path / "model.safetensors")
    assert f"| {sum(tensor.nbytes for tensor in stored.values()):,} |" in section
    assert "was not measured" in section and "error" not in section
    mine, after = "---\nlicense: mit\n---\n# My model\n\n", "\n## My results\n"
    (tmp_path / "README.md").write_text(f"{mine}{section}{after}")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == f"{mine}{section}{after}"
    load(ASSET).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().split() == f"{mine}{after}".split()


def held_out(tmp_path):
    """The same text whole and in pieces, and its loss by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    text = Path(__file__).parents[2].joinpath("benchmarks/data/heldout.txt").read_text()[:3000]
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n\n")
    ids = tokenizer(text)["input_ids"]
    windows = [torch.tensor([ids[i : i + 512]]) for i in range(0, len(ids), 512)]
    return {len(window[0]) - 1: window for window in windows}


def test_the_loss_before_and_after(tmp_path, capsys):
    windows = held_out(tmp_path)
    counted = sum(windows)

    def loss(model):
        with torch.inference_mode():
            losses = (n * model(ids, labels=ids).loss.item() for n, ids in windows.items())
            return sum(losses) / counted

    options = ("--dtype", "float32", "--device", "cpu", "--quantization", "int8_w8a16")
    to = tmp_path / "to"
    assert run("convert", ASSET, to, *options, "--measure", tmp_path / "text.jsonl") == 0
    theirs = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32)
    before, after = loss(theirs), loss(load(to, dtype="float32"))
    assert before != after
    card = (to / "README.md").read_text()
    assert f"| loss before, nats a token | {before:.4f} |" in card
    assert f"| loss, nats a token | {after:.4f} ({after - before:+.4f}) |" in card
    assert f"The loss is of {counted:,} tokens of text.jsonl, in windows of 512" in card
    assert f"{before:.4f} nats a token became {after:.4f}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.txt", None, "no.txt cannot be read as text"),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "b"}', 'a.jsonl:2: expected an object with "text"'),
        ("a.jsonl", "text", "a.jsonl:1: not JSON"),
        ("a.txt", "", "a.txt has no two tokens in a row"),
    ],
)
def test_a_text_that_nothing_is_measured_on(tmp_path, capsys, monkeypatch, name, text, message):
    monkeypatch.setattr("moezoo.loaders.convert.write_tensors", None)  # nothing is written before
    if text is not None:
        (tmp_path / name).write_text(text)
    to = tmp_path / "to"
    arguments = ("convert", ASSET, to, "--device", "cpu", "--measure", tmp_path / name)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not to.exists()


def test_interrupted(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("moezoo.loaders.convert.write_tensors", interrupted)
    command = (
        "convert",
        ASSET,
        tmp_path / "a" / "to",
        "--quantization",
        "mxfp4",
        "--device",
        "cpu",
    )
    assert run(*command) == 130
    assert capsys.readouterr().err.endswith("moezoo: interrupted\n")
    assert not list(tmp_path.iterdir())


ENDED = """
import os, signal, sys
from moezoo.cli import main
from moezoo.loaders import convert, save

write, remove = convert.write_tensors, save.shutil.rmtree

def ended(tensors, draft, **options):
    write(tensors, draft, **options)
    assert list(draft.iterdir())
    os.kill(os.getpid(), number)

def removed(draft):
    os.kill(os.getpid(), number)  # once more
    remove(draft)

convert.write_tensors, save.shutil.rmtree = ended, removed
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
for number in (signal.SIGTERM, signal.SIGHUP):
    try:
        main(sys.argv[1:])
    except SystemExit as stop:
        print(stop.code)
    assert signal.getsignal(number) == signal.SIG_DFL
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
print(main([*sys.argv[1:], "--quiet"]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no signals")
def test_ended_by_a_signal(tmp_path):
    command = ("convert", str(ASSET), str(tmp_path / "a" / "to"), "--device", "cpu")
    ended = subprocess.run(
        [sys.executable, "-c", ENDED, *command], capture_output=True, text=True, timeout=100
    )
    assert ended.stdout.split() == ["143", "129", "0"], ended.stderr
    assert not ended.stderr
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["to"]


@pytest.mark.parametrize("existed", [False, True], ids=["new", "empty"])
def test_what_a_killed_conversion_leaves_does_not_stop_the_next(tmp_path, caplog, existed):
    plain("mixtral").save_pretrained(tmp_path / "from")
    to = tmp_path / "to"
    leftover = to / ".saving-12345678" if existed else tmp_path / ".saving-to-12345678"
    leftover.mkdir(parents=True)
    convert(open_checkpoint(tmp_path / "from"), to, quantization="int8_w8a16", device="cpu")
    assert f"{leftover} is of a save that was stopped" in caplog.text
    assert load(to).config.quantization_config["format"] == "pack-quantized"
    assert to.stat().st_mode & 0o777 == (tmp_path / "from").stat().st_mode & 0o777


def test_places_that_cannot_be_written_are_refused_first(tmp_path, capsys, monkeypatch):
    def download(*arguments, **options):
        raise AssertionError("too late")

    monkeypatch.setattr("moezoo.loaders.checkpoint.Checkpoint.fetch", download)
    plain("mixtral").save_pretrained(tmp_path / "from")
    (tmp_path / "file").touch()
    for arguments, message in (
        ((tmp_path / "file" / "to",), f"since {tmp_path / 'file'} is a file; give another"),
        ((tmp_path / "from" / "to",), f"is inside {tmp_path / 'from'}, which is converted"),
        ((tmp_path / "to", "--max-shard-size", "5XB"), "max_shard_size is '5XB', expected"),
    ):
        assert run("convert", tmp_path / "from", *arguments, "--device", "cpu") == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        run("convert", tmp_path / "from", "")
    assert caught.value.code == 2 and "expected the name of a folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"from", "file"}


def test_its_help_is_not_that_of_generate(capsys):
    with pytest.raises(SystemExit):
        run("convert", "--help")
    assert "prompt" not in capsys.readouterr().out
