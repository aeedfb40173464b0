"""The command line as a script sees it: stdout, stderr, files and exit codes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper

import pytest
import torch
from configurations import CONFIGURATIONS, reference
from transformers import AutoTokenizer, TextStreamer

import moezoo
from moezoo import cli
from moezoo.assets import tiny_model
from moezoo.generation import offline
from moezoo.layers.decoder import Decoder
from moezoo.layers.quant import Int8
from moezoo.tools import progress
from moezoo.tools.layer_weights import Layer

GREEDY = ("--greedy", "--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu")


def run(capsys, *arguments):
    """Exit code, stdout, stderr of `moezoo ...`."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write_lines(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def prompts_file(path, *texts):
    return write_lines(path, *(json.dumps({"prompt": text}) for text in texts))


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def test_one_prompt_is_printed_as_text(capsys):
    code, out, err = run(capsys, "generate", tiny_model(), "--prompt", "Once upon a time", *GREEDY)
    assert code == 0
    assert out.startswith("Once upon a time")
    assert len(out) > len("Once upon a time\n")
    assert err.startswith("moezoo: loaded ")
    assert "as float32 on cpu" in err


def test_several_prompts_are_printed_as_records(capsys):
    code, out, _ = run(capsys, "generate", "--prompt", "The dog", "--prompt", "A cat", *GREEDY)
    assert code == 0
    first, second = records(out)
    assert (first["id"], first["prompt"]) == (1, "The dog")
    assert (second["id"], second["prompt"]) == (2, "A cat")
    assert first["num_tokens"] == 6
    assert first["finish_reason"] == "length"


def test_without_a_model_the_one_in_the_package_runs_and_quiet_says_nothing(capsys):
    _, named, _ = run(capsys, "generate", tiny_model(), "--prompt", "The dog", *GREEDY)
    _, default, err = run(capsys, "generate", "--prompt", "The dog", *GREEDY)
    assert default == named
    assert "no model given" in err
    _, _, err = run(capsys, "generate", "--prompt", "The dog", "--quiet", *GREEDY)
    assert err == ""


@pytest.mark.gpu
def test_a_gpu_is_used_where_there_is_one(capsys):
    code, out, err = run(capsys, "generate", "--prompt", "Once upon a time", "--seed", 0)
    assert code == 0
    assert out.startswith("Once upon a time")
    assert "on cuda:0" in err


def test_input_from_stdin(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b'{"id": "a", "prompt": "The dog"}')))
    code, out, _ = run(capsys, "generate", "--input", "-", *GREEDY)
    assert code == 0
    assert [record["id"] for record in records(out)] == ["a"]


def test_bad_lines_are_named_and_skipped(capsys, tmp_path):
    lines = write_lines(
        tmp_path / "in.jsonl",
        '{"id": "a", "prompt": "The dog"}',
        "",
        "not json",
        '{"id": "a", "prompt": "again"}',
        '{"prompt": "A cat"}',
        '{"id": "b"}',
    )
    output = tmp_path / "out.jsonl"
    code, out, err = run(capsys, "generate", "--input", lines, "--output", output, *GREEDY)
    assert code == 3
    assert out == ""
    assert [record["id"] for record in records(output.read_text())] == ["a", 5]
    assert f"skipped {lines}:3: not JSON" in err
    assert f"skipped {lines}:4: id 'a' is taken by line 1" in err
    assert f'skipped {lines}:6: one of "prompt" and "messages" is needed' in err


def test_strict_stops_before_generating(capsys, tmp_path):
    lines = write_lines(tmp_path / "in.jsonl", '{"prompt": "The dog"}', "{")
    output = tmp_path / "out.jsonl"
    code, out, err = run(
        capsys, "generate", "--input", lines, "--output", output, "--strict", *GREEDY
    )
    assert code == 2
    assert out == ""
    assert not output.exists()
    assert f"{lines}:2: not JSON" in err
    assert "1 bad input lines and --strict: nothing was generated" in err


def test_a_failing_prompt_does_not_stop_the_others(capsys, tmp_path):
    lines = prompts_file(tmp_path / "in.jsonl", "The dog", "word " * 600, "A cat", "\ud800")
    output = tmp_path / "out.jsonl"
    code, _, err = run(capsys, "generate", "--input", lines, "--output", output, *GREEDY)
    assert code == 3
    assert "prompt 2 failed: the prompt has 602 tokens" in err
    written = records(output.read_text())
    reasons = {record["id"]: record["finish_reason"] for record in written}
    assert reasons == {1: "length", 2: "error", 3: "length", 4: "error"}
    assert len(written) == 4
    # a finished failure is kept like a finished completion, and told again
    again = run(capsys, "generate", "--input", lines, "--output", output, *GREEDY)
    assert again[0] == 3
    assert "4 completions, 2 of them failed, 4 were there before" in again[2]


def test_quantised_linear_layers_are_counted(capsys, tmp_path):
    model = moezoo.from_pretrained(tiny_model(), quantization="int8_w8a16")
    qkv = model.decoder.layers[0].attn.qkv
    qkv.quantize_(Int8.quantize(qkv.weight.detach()))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(tmp_path)
    command = ("generate", tmp_path, "--prompt", "The dog", "--max-new-tokens", "1")
    code, _, err = run(capsys, *command)
    said = "experts in int8_w8a16, 1 of its linear layers in int8_w8a16, on"
    assert code == 0 and said in err


def test_quantised_experts(capsys, tmp_path):
    """In the fingerprint too: completions of one file are of one model."""
    lines, out = prompts_file(tmp_path / "in.jsonl", "The dog", "A cat"), tmp_path / "out.jsonl"
    command = ("generate", "--input", lines, "--output", out, *GREEDY)
    assert run(capsys, *command, "--quantization", "fp8_w8a8")[0] == 0
    quantised = records(out.read_text())
    code, _, err = run(capsys, *command)
    assert code == 2 and str(out) in err
    assert records(out.read_text()) == quantised
    code, _, err = run(capsys, *command, "--quantization", "fp8_w8a8")
    assert code == 0 and "2 were there before" in err
    code, _, err = run(capsys, *command, "--overwrite", "--quantization", "fp8_w8a8")
    assert "as float32, experts in fp8_w8a8, on cpu" in err
    again = records(out.read_text())
    assert [record["text"] for record in again] == [record["text"] for record in quantised]


def test_checkpoints_in_fp8_are_inspected_and_run(capsys, tmp_path):
    moezoo.from_pretrained(
        tiny_model(), quantization="fp8_w8a8", device="cpu", progress=False
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(tmp_path)
    code, out, _ = run(capsys, "inspect", tmp_path)
    table = " ".join(out.replace("│", "").split())
    assert code == 0 and "the experts of 6 of 6 MoE layers" in table
    assert "parameters 6,975,488, 3,436,544 active per token (before quantisation)" in table
    code, out, err = run(capsys, "generate", tmp_path, "--prompt", "The dog", *GREEDY)
    assert code == 0 and "as float32, experts in fp8_w8a8, on cpu" in err
    stored = run(capsys, "generate", "--prompt", "The dog", "--quantization", "fp8_w8a8", *GREEDY)
    assert out == stored[1]


def test_resuming_after_a_kill_loses_and_repeats_nothing(capsys, tmp_path):
    texts = [f"The {animal} number {n}" for n in range(12) for animal in ("dog", "cat")]
    lines = prompts_file(tmp_path / "in.jsonl", *texts)
    sampling = ("--seed", "3", "--max-new-tokens", "12", "--dtype", "float32")
    options = (*sampling, "--batch-size", "4", "--device", "cpu")
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert run(capsys, "generate", "--input", lines, "--output", whole, *options)[0] == 0

    command = ["generate", "--input", str(lines), "--output", str(killed), *options]
    with subprocess.Popen(
        [sys.executable, "-m", "moezoo", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    ) as process:
        while not (killed.exists() and killed.read_bytes().count(b"\n") >= 5):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    written = killed.read_bytes()
    num_whole = written.count(b"\n") - 1
    assert 4 <= num_whole < len(texts)
    # whether or not the kill tore a line, tear one
    killed.write_bytes(written[: written.rindex(b"\n") - 7])

    # what only decides how fast it runs may change
    command[command.index("--batch-size") + 1] = "3"
    command += ["--batch-tokens", "5", "--cache-gib", "0.5"]
    code, _, err = run(capsys, *command)
    assert code == 0
    assert f"{num_whole} were there before" in err
    assert sorted(killed.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    # once more there is nothing to do, and no model is loaded for it
    code, _, err = run(capsys, *command)
    assert code == 0
    assert "loaded" not in err


@pytest.fixture
def interruptible():
    """Workers of xdist ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_says_so_and_resumes(capsys, tmp_path, monkeypatch):
    lines = prompts_file(tmp_path / "in.jsonl", "The dog", "A cat", "One day")
    output = tmp_path / "out.jsonl"
    command = ("generate", "--input", lines, "--output", output, "--batch-size", 1, *GREEDY)
    generate = offline.generate

    def interrupted(*args, **kwargs):
        completions = generate(*args, **kwargs)
        yield next(completions)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(offline, "generate", interrupted)
    code, _, err = run(capsys, *command)
    assert code == 130
    assert "moezoo: interrupted; the same command goes on" in err
    assert len(records(output.read_text())) == 1
    # with --overwrite the same command would throw away what there is
    code, _, err = run(capsys, *command, "--overwrite")
    assert code == 130
    assert "moezoo: interrupted; leave out --overwrite to go on" in err
    assert "the same command" not in err
    monkeypatch.undo()
    code, _, err = run(capsys, *command)
    assert code == 0
    assert "1 were there before" in err
    assert [record["id"] for record in records(output.read_text())] == [1, 2, 3]


def test_a_run_that_a_signal_ends_says_so_too(capsys, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    generate = offline.generate

    def ended(*args, **kwargs):
        yield next(generate(*args, **kwargs))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(offline, "generate", ended)
    command = ("generate", "--prompt", "The dog", "--prompt", "A cat", *GREEDY)
    code, _, err = run(capsys, *command, "--output", output)
    assert code == 143
    assert "moezoo: interrupted; the same command goes on where it stopped" in err
    assert len(records(output.read_text())) == 1
    code, _, err = run(capsys, *command)
    assert code == 143
    assert "interrupted" not in err


def test_output_of_another_run_is_left_alone_unless_overwritten(capsys, tmp_path):
    lines = prompts_file(tmp_path / "in.jsonl", "The dog")
    output = tmp_path / "out.jsonl"
    command = ("generate", "--input", lines, "--output", output)
    assert run(capsys, *command, *GREEDY)[0] == 0
    before = output.read_text()

    code, _, err = run(capsys, *command, *GREEDY, "--stop", ".")
    assert code == 2
    assert f"{output}:1: written by a run with another model or other settings" in err
    prompts_file(lines, "Another prompt on line 1")
    code, _, err = run(capsys, *command, *GREEDY)
    assert code == 2
    assert "id 1 is not this prompt's" in err
    assert output.read_text() == before

    code, _, _ = run(capsys, *command, *GREEDY, "--overwrite")
    assert code == 0
    assert [record["prompt"] for record in records(output.read_text())] == [
        "Another prompt on line 1"
    ]
    output.write_text("my notes\n")
    code, _, err = run(capsys, *command, *GREEDY)
    assert code == 2
    assert f"{output}:1: not a completion of moezoo" in err
    assert output.read_text() == "my notes\n"


def test_of_two_runs_at_once_on_one_output_the_second_is_refused(capsys, tmp_path, monkeypatch):
    lines = prompts_file(tmp_path / "in.jsonl", "The dog", "A cat")
    output = tmp_path / "out.jsonl"
    command = ("generate", "--input", lines, "--output", output, "--batch-size", 1, *GREEDY)
    generate = offline.generate
    seconds = []

    def while_the_first_runs(*args, **kwargs):
        seconds.append(run(capsys, *command))
        for completion in generate(*args, **kwargs):
            yield completion
            seconds.append(run(capsys, *command, "--overwrite"))

    monkeypatch.setattr(offline, "generate", while_the_first_runs)
    assert run(capsys, *command)[0] == 0
    assert [record["id"] for record in records(output.read_text())] == [1, 2]
    assert len(seconds) == 3
    for code, _, err in seconds:
        assert code == 2
        assert f"error: another run is writing {output}" in err


def test_a_run_goes_on_with_the_same_model_only_wherever_that_lies(capsys, tmp_path):
    lines = prompts_file(tmp_path / "in.jsonl", "The dog", "A cat")
    output = tmp_path / "out.jsonl"
    folder = copy_model(tmp_path / "m")

    def generate(folder):
        return run(capsys, "generate", folder, "--input", lines, "--output", output, *GREEDY)

    assert generate(folder)[0] == 0
    whole = output.read_text()
    half = "".join(whole.splitlines(keepends=True)[:1])
    output.write_text(half)
    moved = folder.rename(tmp_path / "moved")
    code, _, err = generate(moved)
    assert code == 0
    assert "1 were there before" in err
    assert output.read_text() == whole

    output.write_text(half)
    model = moezoo.from_pretrained(moved, device="cpu")
    with torch.no_grad():
        model.decoder.embed.weight.mul_(1.5)
    model.save_pretrained(moved)
    code, _, err = generate(moved)
    assert code == 2
    assert f"{output}:1: written by a run with another model or other settings" in err
    assert output.read_text() == half


def test_overwrite_keeps_the_old_file_until_there_is_something_new(capsys, tmp_path):
    lines = prompts_file(tmp_path / "in.jsonl", "The dog")
    output = tmp_path / "out.jsonl"
    output.write_text("old\n")
    command = ("generate", tmp_path, "--input", lines, "--output", output, "--overwrite")
    code, _, err = run(capsys, *command)
    assert code == 1
    assert "no config.json" in err
    assert output.read_text() == "old\n"


def test_a_run_that_fails_before_its_first_completion_leaves_no_file(capsys, tmp_path):
    output = tmp_path / "out.jsonl"
    code, _, err = run(capsys, "generate", tmp_path, "--prompt", "a", "--output", output)
    assert code == 1
    assert "no config.json" in err
    assert not output.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_cannot_be_written_is_found_before_loading(capsys, tmp_path):
    (tmp_path / "sealed").mkdir(mode=0o500)
    output = tmp_path / "sealed" / "out.jsonl"
    code, _, err = run(capsys, "generate", "--prompt", "a", "--output", output)
    assert code == 2
    assert f"--output {output}: there is no permission to write it" in err
    assert "loaded" not in err


def test_chat(capsys, tmp_path):
    folder = tmp_path / "chatty"
    folder.mkdir()
    for file in tiny_model().iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    tokenizer.save_pretrained(folder)

    _, plain, _ = run(capsys, "generate", folder, "--prompt", "user: hello\n", *GREEDY)
    code, chat, _ = run(capsys, "generate", folder, "--prompt", "hello", "--chat", *GREEDY)
    assert code == 0
    assert plain == f"user: hello\n{chat}"
    hello = [{"role": "user", "content": "hello"}]
    lines = write_lines(tmp_path / "in.jsonl", json.dumps({"messages": hello}))
    _, out, _ = run(capsys, "generate", folder, "--input", lines, "--chat", *GREEDY)
    (record,) = records(out)
    assert record["messages"] == hello
    assert record["text"] + "\n" == chat

    code, _, err = run(capsys, "generate", "--prompt", "hello", "--chat", *GREEDY)
    assert code == 2
    assert "has no chat template: leave --chat out" in err


def test_seed_and_sampling_options_reach_generation(capsys):
    def sampled(*options):
        code, out, _ = run(capsys, "generate", "--prompt", "The dog", "--quiet", *options)
        assert code == 0
        return out

    options = ("--max-new-tokens", "12", "--dtype", "float32")
    assert sampled("--seed", 1, *options) == sampled("--seed", 1, *options)
    assert len({sampled("--seed", seed, *options) for seed in range(4)}) > 1
    greedy = sampled("--greedy", *options)
    assert sampled("--temperature", 0, *options) == greedy
    assert sampled("--top-k", 1, *options) == greedy
    assert sampled("--greedy", "--repetition-penalty", 9, *options) != greedy
    stop = greedy[20:24]
    assert sampled("--greedy", "--stop", stop, *options) == greedy[: greedy.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "one of the arguments --prompt --input is required"),
        (("--prompt", "a", "--input", "b"), 2, "not allowed with argument"),
        (("--prompt", "a", "--max-new-tokens", "0"), 2, "must be at least 1, got 0"),
        (("--prompt", "a", "--batch-tokens", "0"), 2, "must be at least 1, got 0"),
        (("--prompt", "a", "--cache-gib", "0"), 2, "must be between 0.001 and 1000000.0, got 0"),
        (("--prompt", "a", "--cache-gib", "inf"), 2, "must be between 0.001 and 1000000.0, got"),
        (("--prompt", "a", "--top-p", "3"), 2, "must be between 0 and 1, got 3"),
        (("--prompt", "a", "--greedy", "--top-p", "0.5"), 2, "does not use top_p"),
        (("--prompt", "a", "--dtype", "int8"), 2, "invalid choice: 'int8'"),
        (("--prompt", "a", "--quantization", "int3"), 2, "quantization type is 'int3', expected"),
        (
            ("--prompt", "a", "--quantization", "{type:int4}"),
            2,
            "'{type:int4}' is not JSON (Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1)): expected one of fp8_w8a8, int8_w8a16, int4_w4a16, mxfp4, or JSON",
        ),
        (
            ("--prompt", "a", "--quantization", '{"type": "int4_w4a16", "group_size": 128}'),
            2,
            "experts.0.down_proj.weight in model.safetensors (for layers.0.mlp.w2): quantization "
            "asks for group_size=128, and groups of 128 do not divide its 64 columns; groups of 64",
        ),
        (("--prompt", "a", "--device", "tpu"), 2, "'tpu'"),
        (("--prompt", "a", "--overwrite"), 2, "--overwrite needs --output"),
        (("--input", "nowhere.jsonl"), 2, "--input cannot be read: [Errno 2]"),
        (("--input", "a.jsonl", "--output", "./a.jsonl"), 2, "are the same file, a.jsonl"),
        (("--prompt", "a", "--output", "none/a"), 2, "--output none/a: there is no folder none"),
        (("--prompt", "a", "--output", "."), 2, "--output must be a file"),
        (("--prompt", "a", "--revision", "main"), 2, "--revision is of hub models, and the one in"),
        (("--prompt", "a", ".", "--revision", "main"), 2, "--revision is of hub models, and . is"),
        (
            ("--prompt", "a", "--expert-parallel", "1", "--placement", "nowhere.json"),
            2,
            "--placement is 'nowhere.json', expected linear",
        ),
        (("--prompt", "a", "--output", "/dev/full"), 2, "/dev/full is a device or a pipe"),
        (("--prompt", "a", "--repetition-penalty", "0"), 2, "repetition_penalty must be above 0"),
        (("--prompt", "a", "--repetition-penalty", "inf"), 2, "repetition_penalty must be above"),
        (("--prompt", "a", "--stop", ""), 2, "stop_strings must be texts that are not empty"),
        (("", "--prompt", "a"), 2, "model_id is '', expected a folder or a hub id"),
        (("./nowhere", "--prompt", "a"), 1, "./nowhere does not exist"),
        (("not/cached", "--prompt", "a", "--local-files-only"), 1, "local_files_only is set"),
    ],
)
def test_errors_are_one_line_and_a_code(capsys, tmp_path, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, "generate", *options)
    assert got == code
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert "loaded" not in err


def copy_model(folder):
    """A copy of the package's checkpoint to change."""
    return shutil.copytree(tiny_model(), folder)


def test_code_of_a_checkpoint_is_neither_run_nor_offered(capsys, tmp_path, monkeypatch):
    """transformers would ask on the terminal, and for a model type that it does not know it does
    so for the tokenizer too."""
    configuration = CONFIGURATIONS["kimi_k2"]["one-group"]
    folder = copy_model(tmp_path / "kimi")
    (folder / "model.safetensors").unlink()
    reference("kimi_k2", configuration | {"vocab_size": 4096}).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "conf.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "conf.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr(sys, "stdin", StringIO("y\n" * 9))
    code, out, err = run(capsys, "generate", folder, "--prompt", "The dog", *GREEDY)
    assert code == 0, err
    assert out.startswith("The dog")
    assert "custom code" not in out + err
    assert sys.stdin.tell() == 0


def test_a_malformed_tokenizer_is_named(capsys, tmp_path):
    folder = copy_model(tmp_path / "m")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    code, _, err = run(capsys, "generate", folder, "--prompt", "a")
    assert code == 1
    assert f"error: {folder}: its tokenizer cannot be loaded: " in err


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json", "special_tokens_map.json")])
def test_a_folder_without_a_tokenizer_says_so(capsys, tmp_path, left):
    """transformers would make an empty tokenizer of it, or ask for sentencepiece."""
    folder = copy_model(tmp_path / "m")
    for file in {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} - {*left}:
        (folder / file).unlink()
    code, out, err = run(capsys, "generate", folder, "--prompt", "a")
    assert (code, out) == (1, "")
    assert f"error: {folder} has no tokenizer: none of its files is tokenizer.json, " in err
    assert "AutoTokenizer.from_pretrained(...).save_pretrained(folder)" in err
    assert "sentencepiece" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_full_stdout_is_named(capsys, monkeypatch):
    named = "error: [Errno 28] No space left on device: 'stdout'\n"
    with open("/dev/full", "w") as stdout:
        arguments = [sys.executable, "-m", "moezoo", "inspect", tiny_model()]
        ran = subprocess.run(arguments, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 1
    assert ran.stderr.endswith(named)
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", TextIOWrapper(full, write_through=True))
        code, _, err = run(capsys, "generate", "--prompt", "a", *GREEDY)
    assert code == 1
    assert err.endswith(named)


def test_a_full_disk_is_named(capsys, tmp_path):
    """A limit on the size of files stands for a full disk, whose error names no file either."""
    output = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        code, _, err = run(capsys, "generate", "--prompt", "a", "--output", output, *GREEDY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert err.endswith(f"error: [Errno 27] File too large: '{output}'\n")


def test_debug_shows_the_traceback(capsys):
    code, _, err = run(capsys, "generate", "./nowhere", "--prompt", "a", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "CheckpointError" in err


def test_running_out_of_memory_is_a_message(capsys, monkeypatch):
    """More than any machine has, asked of torch's allocator."""
    monkeypatch.setattr(Decoder, "logits", lambda *_: torch.empty(1 << 50))
    prompts = ("--prompt", "a", "--prompt", "b")
    code, _, err = run(capsys, "generate", *prompts, "--batch-size", 16, *GREEDY)
    assert code == 1
    assert "error: Out of memory during MoE: " in err
    assert "one prompt alone is too much for cpu" in err


def test_a_terminal_gets_the_text_as_it_comes(capsys, monkeypatch):
    _, plain, _ = run(capsys, "generate", "--prompt", "The dog", *GREEDY)
    pieces = []
    put = TextStreamer.on_finalized_text
    monkeypatch.setattr(
        TextStreamer,
        "on_finalized_text",
        lambda self, text, **end: (pieces.append(text), put(self, text, **end)),
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, streamed, _ = run(capsys, "generate", "--prompt", "The dog", *GREEDY)
    assert code == 0
    assert streamed == plain
    assert len([piece for piece in pieces if piece]) > 3


def test_a_terminal_does_not_get_the_stop_string(capsys, tmp_path, monkeypatch):
    _, plain, _ = run(capsys, "generate", "--prompt", "The dog", *GREEDY)
    stop = plain.split()[3]
    expected = plain[: plain.index(stop)] + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, given, _ = run(capsys, "generate", "--prompt", "The dog", "--stop", stop, *GREEDY)
    assert given == expected
    folder = copy_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"stop_strings": [stop]}))
    _, configured, _ = run(capsys, "generate", folder, "--prompt", "The dog", *GREEDY)
    assert configured == expected


def test_a_terminal_gets_a_bar(capsys, tmp_path, monkeypatch):
    lines = prompts_file(tmp_path / "in.jsonl", "The dog", "A cat")
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, _, err = run(capsys, "generate", "--input", lines, "--output", output, *GREEDY)
    assert code == 0
    assert "2/2" in err
    assert "tokens/s" in err
    assert "left" in err


def test_elsewhere_progress_is_a_line_now_and_then(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    lines = prompts_file(tmp_path / "in.jsonl", "The dog", "A cat")
    output = tmp_path / "out.jsonl"
    command = ("generate", "--input", lines, "--output", output, "--batch-size", 1)
    _, _, err = run(capsys, *command, *GREEDY)
    assert "moezoo: 1/2 prompts, " in err
    assert "moezoo: 2/2 prompts, " in err
    assert "tokens/s, 0:00:00 left" in err


def test_version_names_what_a_bug_report_needs(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert f"moezoo {moezoo.__version__}\ntorch {torch.__version__}\n" in out
    assert "transformers 5." in out
    assert "GPU" in out


def test_inspect_prints_a_table_or_json(capsys):
    code, table, _ = run(capsys, "inspect", tiny_model())
    assert code == 0
    assert "4 of 16" in table
    code, out, _ = run(capsys, "inspect", tiny_model(), "--json")
    assert code == 0
    report = json.loads(out)
    assert report["supported"] is True
    assert report["experts"]["num_experts"] == 16
    assert report["weight_bytes"]["bf16"]["1"] == report["checkpoint_bytes"]


def test_inspect_of_what_moezoo_cannot_run_reports_and_exits_with_3(capsys, tmp_path):
    for file in tiny_model().iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    code, out, err = run(capsys, "inspect", tmp_path, "--json")
    assert code == 3
    assert err == ""
    assert "'gpt2' is not supported" in json.loads(out)["reason"]
    code, _, err = run(capsys, "inspect", tmp_path / "nowhere")
    assert code == 1
    assert "does not exist" in err


def test_tune_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(capsys, "tune", "8,2,64,32")
    assert code == 2
    assert "tune needs a CUDA device" in err


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "device is 'cuda', but torch sees no CUDA device; use 'cpu'"),
        ("foo", "device is 'foo', expected 'cuda', 'cuda:1' or 'cpu'"),
        ("mps", "device is 'mps', expected 'cuda', 'cuda:1' or 'cpu'"),
    ],
)
@pytest.mark.parametrize(
    "command", [("bench", "layer"), ("generate", "--prompt", "a")], ids=["bench", "generate"]
)
def test_a_device_that_is_not_there_is_a_message(capsys, monkeypatch, command, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run(capsys, *command, "--device", device)
    assert (code, out) == (2, "")
    assert err.endswith(f"moezoo: error: {message}\n")


def test_what_tune_takes_for_a_layer():
    def layer(text):
        return cli.tune._layer(cli.parser().parse_args(["tune", text]))

    assert layer("128,8,2048,768") == (Layer(128, 8, 2048, 768), None)
    assert layer(str(tiny_model())) == (Layer(16, 4, 256, 64), None)
    for wrong in ("128,8,2048", "8,9,64,32", "8,0,64,32", "8,2,0,64", "8,2,64,0"):
        with pytest.raises(ValueError, match="experts,chosen,hidden,intermediate"):
            layer(wrong)


def test_tune_asks_which_format_where_a_model_has_two(monkeypatch):
    report = moezoo.inspect(tiny_model())
    both = replace(report.experts, formats=("fp8_w8a8", "int4_w4a16"))
    stored = replace(report, experts=both)
    monkeypatch.setattr("moezoo.tools.inspect.inspect", lambda *_, **__: stored)
    asked = ["tune", "a/model"]
    with pytest.raises(ValueError, match="fp8_w8a8 and int4_w4a16: say with --quantization"):
        cli.tune._layer(cli.parser().parse_args(asked))
    layer, _ = cli.tune._layer(cli.parser().parse_args([*asked, "--quantization", "int4_w4a16"]))
    assert layer == Layer(16, 4, 256, 64)
