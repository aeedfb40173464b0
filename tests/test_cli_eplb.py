"""`moezoo routing` and `moezoo eplb`, from prompts to a placement and a simulation."""

import json
import os
import stat

import pytest
import torch

from moezoo import cli
from moezoo.assets import tiny_model
from moezoo.parallel.eplb import POLICIES
from moezoo.parallel.placement import Placement
from moezoo.tools.routing import RoutingTrace


def run(capsys, *arguments):
    """Exit code, stdout, stderr of `moezoo ...`."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "in.jsonl"
    texts = ["The dog", "Once upon a time", "A cat sat on the roof and looked at the moon"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def test_from_prompts_to_a_placement(capsys, tmp_path, prompts):
    file, placement = tmp_path / "trace.safetensors", tmp_path / "placement.json"
    options = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", 6, "--choices")
    command = ("routing", "--input", prompts, "--output", file, *options)
    code, out, err = run(capsys, *command, "--plot", tmp_path / "trace.png")
    assert code == 0
    assert "over mean" in out
    assert f"3 prompts, 0 failed; written: {file}, {tmp_path / 'trace.png'}" in err
    assert (tmp_path / "trace.png").stat().st_size > 1000
    trace = RoutingTrace.load(file)
    assert len(trace.topk_ids) == 6
    assert trace.expert_load.sum(1).eq(4 * len(trace.topk_ids[0])).all()
    assert torch.equal(trace.load_history.sum(0), trace.expert_load)

    command = ("eplb", "plan", "--trace", file, "--gpus", 4, "--redundant", 8)
    code, _, err = run(capsys, *command, "--output", placement)
    assert code == 0
    assert f"{placement}: balancedness 0." in err
    assert "linear and without copies 0." in err
    Placement.load(placement).check_model(16, trace.layers, 4)

    command = ("eplb", "simulate", "--trace", file, "--gpus", 4, 5, "--redundant", 0, 8)
    options = ("--interval", 2, "--window", 2)
    code, out, err = run(capsys, *command, *options, "--plot", tmp_path / "eplb.svg")
    assert code == 0
    assert "Balancedness" in out
    assert err.count("left out: 16 experts and") == 2
    record = json.loads(run(capsys, *command, *options, "--json")[1])
    assert record["loads"]["experts_per_token"] == 4
    assert len(record["simulations"]) == 2 * 3
    assert (tmp_path / "eplb.svg").exists()


def test_a_page_and_json(capsys, tmp_path, prompts):
    page = tmp_path / "report.html"
    options = ("--device", "cpu", "--dtype", "float32", "--html", page, "--json", "--quiet")
    code, out, err = run(capsys, "routing", "--input", prompts, *options)
    assert (code, err) == (0, "")
    layers = json.loads(out)["layers"]
    assert len(layers) == 6 and len({layer["tokens"] for layer in layers}) == 1
    assert f"{layers[0]['tokens']:,}" in page.read_text()


def test_made_up_loads(capsys):
    loads = ("--zipf", 1.0, "--experts", 32, "--layers", 2, "--steps", 40, "--half-life", 1000)
    code, out, _ = run(capsys, "eplb", "simulate", *loads, "--gpus", 4, "--redundant", 8)
    assert code == 0
    assert "least_movement" in out


def test_without_a_rebalance_the_table_says_so(capsys):
    command = ("eplb", "simulate", "--zipf", 1, "--steps", 40, "--layers", 1, "--gpus", 4)
    code, out, err = run(capsys, *command, "--interval", 10000)
    assert code == 0
    assert "--interval 10000: no rebalance within the 40 steps" in err
    assert "(mean rank load over highest), without a rebalance" in out
    assert "from the first" not in out
    code, out, err = run(capsys, *command, "--interval", 10000, 20)
    assert "from the first rebalance on" in out and "none" in out
    assert "--interval 20" not in err


def test_files_follow_the_umask(capsys, tmp_path, prompts):
    paths = {
        f"--{name}": tmp_path / f"written.{ending}"
        for name, ending in (("output", "safetensors"), ("html", "html"), ("plot", "png"))
    }
    placement, completions = tmp_path / "placement.json", tmp_path / "out.jsonl"
    options = [word for pair in paths.items() for word in pair]
    on_cpu = ("--input", prompts, "--device", "cpu")
    before = os.umask(0o027)
    try:
        plan = ("eplb", "plan", "--trace", paths["--output"], "--gpus", 2, "--output", placement)
        assert run(capsys, "routing", *on_cpu, *options)[0] == 0
        assert run(capsys, *plan)[0] == 0
        generate = ("generate", *on_cpu, "--output", completions, "--max-new-tokens", 2)
        assert run(capsys, *generate)[0] == 0
        convert = ("convert", tiny_model(), tmp_path / "a" / "to", "--device", "cpu")
        assert run(capsys, *convert)[0] == 0
    finally:
        os.umask(before)
    folder = tmp_path / "a" / "to"
    written = [*paths.values(), placement, completions, *folder.iterdir()]
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in written} == {"0o640"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_policies_are_those_that_there_are():
    assert cli.eplb.POLICIES == POLICIES


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("plan", "--gpus", 2, "--output", "out.json"), 2, "--trace"),
        (("plan", "--trace", "none", "--gpus", 2, "--output", "o"), 2, "--trace cannot be read: "),
        (("plan", "--trace", ".", "--gpus", 2, "--output", "o"), 2, "--trace cannot be read: "),
        (("plan", "--trace", "no", "--gpus", 2, "--output", "."), 2, "--output must be a file"),
        (("simulate", "--trace", "none", "--gpus", 2), 2, "--trace cannot be read: "),
        (("simulate", "--zipf", 1, "--gpus", 2, "--plot", "."), 2, "--plot must be a file, and ."),
        (("simulate", "--zipf", 1, "--gpus", 2, "--plot", "a.txt"), 2, "expected .png, .svg or"),
        (("plan", "--trace", "no", "--gpus", 2, "--output", "out.json"), 2, "no safetensors"),
        (("plan", "--trace", "no", "--gpus", 2, "--output", "a/b.json"), 2, "there is no folder a"),
        (("simulate", "--gpus", 2), 2, "--trace --zipf"),
        (("simulate", "--gpus", 7, "--zipf", 1), 2, "nothing to simulate: 256 experts and 0"),
        (("simulate", "--gpus", 0, "--zipf", 1), 2, "must be at least 1"),
    ],
)
def test_bad_input(capsys, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no").write_text("no")
    found, _, err = run(capsys, "eplb", *arguments)
    assert found == code
    assert message in err


def test_a_trace_of_one_pass_is_no_history(capsys, tmp_path, prompts):
    file = tmp_path / "trace.safetensors"
    command = ("routing", "--input", prompts, "--output", file, "--device", "cpu", "--quiet")
    code, out, err = run(capsys, *command)
    assert (code, out) == (0, "")
    code, _, err = run(capsys, "eplb", "simulate", "--trace", file, "--gpus", 2)
    assert code == 2
    assert "has 1 forward passes; record more prompts, or let them go on" in err


def test_prompts_that_fail_are_named(capsys, tmp_path):
    lines, file = tmp_path / "in.jsonl", tmp_path / "trace.safetensors"
    lines.write_text('{"prompt": "The dog"}\n' + json.dumps({"prompt": "word " * 600}) + "\nno\n")
    command = ("routing", "--input", lines, "--output", file, "--device", "cpu")
    code, _, err = run(capsys, *command)
    assert code == 3
    assert "prompt 2 failed: the prompt has 602 tokens" in err
    assert ":3: not JSON" in err
