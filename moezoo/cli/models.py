"""Open the models and prompts that a command's options name."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from moezoo.cli.output import reading, say

if TYPE_CHECKING:
    from moezoo.generation.texts import Prompt
    from moezoo.loaders.checkpoint import Checkpoint
    from moezoo.tools.job import Job

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")


def read(arguments: argparse.Namespace) -> tuple[list[Prompt], list[str]]:
    from moezoo.generation.prompt_files import read_prompts
    from moezoo.generation.texts import Prompt

    if arguments.prompt is not None:
        return [Prompt(id, text) for id, text in enumerate(arguments.prompt, start=1)], []
    if arguments.input == "-":
        return read_prompts(sys.stdin.buffer, "stdin")
    with reading("--input"), open(arguments.input, "rb") as lines:
        return read_prompts(lines, arguments.input)


def check_placement(placement: str | None) -> None:
    """Raise ValueError if --placement is neither the name of a strategy nor a file."""
    from moezoo.parallel.placement import STRATEGIES

    if placement is None or placement in STRATEGIES:
        return
    if not os.path.exists(placement) or os.path.isdir(placement):
        raise ValueError(
            f"--placement is {placement!r}, expected linear, round_robin or a file of moezoo eplb "
            "plan, and there is no such file"
        )


def check_revision(arguments: argparse.Namespace, model: str | None) -> None:
    """Raise ValueError for a --revision of a model that is not on the hub."""
    if arguments.revision is None:
        return
    if model is None:
        raise ValueError("--revision is of hub models, and the one in the package has none")
    if os.path.isdir(model):
        raise ValueError(f"--revision is of hub models, and {model} is a folder")


def opened(arguments: argparse.Namespace) -> Checkpoint:
    from moezoo.loaders.checkpoint import open_checkpoint

    check_revision(arguments, arguments.model)
    quieten(arguments)
    return open_checkpoint(
        model_id(arguments),
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
    )


def model_id(arguments: argparse.Namespace) -> str:
    if arguments.model is None:
        from moezoo.assets import tiny_model

        if not arguments.quiet:
            say("no model given, using the small one inside the package")
        return str(tiny_model())
    return str(arguments.model)


def quieten(arguments: argparse.Namespace) -> None:
    """Keep huggingface_hub from writing each of its attempts to stderr; our error says it once."""
    from huggingface_hub.utils import logging

    if not (arguments.debug or arguments.verbose):
        logging.set_verbosity_error()


def loaded(
    checkpoint: Checkpoint, arguments: argparse.Namespace, job: Job | None = None
) -> tuple[Any, Any]:
    """Load the model, or this rank's part of it, and its tokenizer."""
    from transformers.utils import logging

    from moezoo.loaders.hub_layout import experts_and_linears
    from moezoo.loaders.load import from_checkpoint

    if not (arguments.debug or arguments.verbose):
        logging.set_verbosity_error()
    mesh = None if job is None else job.mesh
    with nullcontext() if mesh is None else mesh.together("loading the model"):
        tokenizer = tokenizer_of(checkpoint, local_files_only=arguments.local_files_only)
        if arguments.chat and tokenizer.chat_template is None:
            raise ValueError(f"{checkpoint.name} has no chat template: leave --chat out")
        started = time.perf_counter()
        model = from_checkpoint(
            checkpoint,
            dtype=arguments.dtype,
            device=arguments.device if mesh is None else mesh.device,
            quantization=arguments.quantization,
            mesh=mesh,
            progress=not arguments.quiet and sys.stderr.isatty(),
        )
    if not arguments.quiet:
        dtype = str(model.dtype).removeprefix("torch.")
        experts, linears = experts_and_linears(model)
        for what, held in (("experts", experts), (f"{len(linears)} of its linear layers", linears)):
            if held:
                formats = sorted({weights.kind.format.name for weights in held})
                dtype += f", {what} in {' and '.join(formats)}"
        if experts or linears:
            dtype += ","
        seconds = time.perf_counter() - started
        place = str(model.device)
        if mesh is not None and mesh.world_size > 1:
            place = f"{mesh.world_size} ranks ({mesh.device.type})"
        say(f"loaded {checkpoint.name} as {dtype} on {place} in {seconds:.1f} s")
    return model, tokenizer


def tokenizer_of(checkpoint: Checkpoint, *, local_files_only: bool) -> Any:
    from transformers import AutoTokenizer

    from moezoo.errors import CheckpointError

    # Without a vocabulary transformers makes an empty tokenizer, or asks for another package.
    if not any(
        file in VOCABULARIES or file.endswith((".model", ".tiktoken"))
        for file in checkpoint.files.listing()
    ):
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer: none of its files is {', '.join(VOCABULARIES)}, "
            "*.model or *.tiktoken; add the tokenizer's files of the model that it was made of, "
            "as AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes them"
        )
    try:
        # By default transformers asks on the terminal whether to run a checkpoint's code.
        return AutoTokenizer.from_pretrained(
            checkpoint.name,
            revision=checkpoint.revision,
            local_files_only=local_files_only,
            trust_remote_code=False,
        )
    except Exception as error:  # what the tokenizers library raises has no class of its own
        raise CheckpointError(
            f"{checkpoint.name}: its tokenizer cannot be loaded: {error}"
        ) from error
