"""The command line on a hub id, against a local stand-in for the hub."""

import json
import os
import subprocess
import sys

import pytest
from hub_stand_in import Hub, serve

from moezoo.assets import tiny_model


@pytest.mark.slow
def test_inspect_reads_headers_and_generate_downloads_what_it_needs(tmp_path):
    with serve(Hub("some/story-teller", tiny_model())) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }

        def moezoo(*arguments):
            command = [sys.executable, "-m", "moezoo", *arguments]
            return subprocess.run(command, env=environment, capture_output=True, text=True)

        inspected = moezoo("inspect", "some/story-teller", "--json")
        assert inspected.returncode == 0, inspected.stderr
        assert json.loads(inspected.stdout)["parameters"] == 6_975_488
        assert "model.safetensors" not in hub.downloads()

        hub.at_branch.clear()
        prompt = ("--prompt", "Once upon a time", "--greedy", "--max-new-tokens", "8")
        generated = moezoo("generate", "some/story-teller", *prompt)
        assert generated.returncode == 0, generated.stderr
        assert generated.stdout.startswith("Once upon a time")
        assert "loaded some/story-teller" in generated.stderr
        assert {"model.safetensors", "tokenizer.json"} <= hub.downloads()
        assert "storybook_credits.tsv" not in hub.downloads()
        # Model and tokenizer are of one commit, even if the branch moves meanwhile.
        assert set(hub.at_branch) == {"/some/story-teller/resolve/main/config.json"}

    # the stand-in is gone now
    cached = moezoo("generate", "some/story-teller", "--local-files-only", *prompt)
    assert cached.stdout == generated.stdout


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
