"""The command line on a hub id, against a local stand-in for the hub."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
from hub_stand_in import Hub, serve

from moezoo.assets import tiny_model

COMMANDS = """
import shlex, sys
from moezoo.cli import main
for line in sys.stdin:
    print("exit code", main(shlex.split(line)), end="\\0", flush=True)
"""
"""One process for all: to import torch and transformers takes seconds."""


@pytest.mark.slow
def test_inspect_reads_headers_and_generate_downloads_what_it_needs(tmp_path):
    with ExitStack() as stack:
        with serve(Hub("some/story-teller", tiny_model())) as hub:
            environment = {
                **os.environ,
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(tmp_path),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "OMP_NUM_THREADS": "1",
            }
            said = tmp_path / "stderr"
            with said.open("w") as stderr:
                process = stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, "-c", COMMANDS],
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        text=True,
                    )
                )

            def moezoo(command):
                """What it writes to stdout."""
                process.stdin.write(f"{command}\n")
                process.stdin.flush()
                written = "".join(iter(lambda: process.stdout.read(1) or "\0", "\0"))
                assert written.endswith("exit code 0"), said.read_text()
                return written.removesuffix("exit code 0")

            inspected = moezoo("inspect some/story-teller --json")
            assert json.loads(inspected)["parameters"] == 6_975_488
            assert "model.safetensors" not in hub.downloads()

            hub.at_branch.clear()
            prompt = "--prompt 'Once upon a time' --greedy --max-new-tokens 8"
            generated = moezoo(f"generate some/story-teller {prompt}")
            assert generated.startswith("Once upon a time")
            assert "loaded some/story-teller" in said.read_text()
            assert {"model.safetensors", "tokenizer.json"} <= hub.downloads()
            assert "storybook_credits.tsv" not in hub.downloads()
            # Model and tokenizer are of one commit, even if the branch moves meanwhile.
            assert set(hub.at_branch) == {"/some/story-teller/resolve/main/config.json"}

        # the stand-in is gone now
        assert moezoo(f"generate some/story-teller --local-files-only {prompt}") == generated
        process.communicate(timeout=60)


def test_a_hub_that_cannot_be_reached_is_one_message(tmp_path):
    patient = "import time; time.sleep = lambda s: print(s, 's'); from moezoo.cli import main; "
    codes = "print(main(['inspect', name]), main(['generate', name, '--prompt', 'a']))"
    ran = subprocess.run(
        [sys.executable, "-c", f"{patient}name = 'nosuch/model'; {codes}"],
        env={
            **os.environ,
            "HF_ENDPOINT": "http://127.0.0.1:9",  # the port that discards, where nobody listens
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        },
        capture_output=True,
        text=True,
    )
    assert ran.stdout.splitlines()[-1] == "1 1", ran.stderr
    assert ran.stderr == 2 * (
        "moezoo: error: nosuch/model is not a folder here, its config.json is not in the hub's "
        "cache here, and the hub cannot be reached\n"
    )
    assert ran.stdout.count(" s\n") == 10  # one series of attempts each
