"""Convert a checkpoint, a layer at a time, to one that is quantised or of another dtype.

Of the weights no more is in memory than one layer of the result and some rows that are being
quantised; the new files appear when all are written.
"""

import math
import os
import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from moezoo import registry
from moezoo.device import device_of
from moezoo.errors import naming_file
from moezoo.generation.held_out import HeldOut, Loss
from moezoo.loaders.card import CARD, Measured, Section, formats_held, write_card
from moezoo.loaders.checkpoint import Checkpoint, Location, open_checkpoint
from moezoo.loaders.files import CONFIG, GENERATION_CONFIG
from moezoo.loaders.fill import Squares
from moezoo.loaders.hub_layout import (
    TensorToWrite,
    WritePlan,
    set_quantization_config,
    warn_of_schemes,
)
from moezoo.loaders.load import build, from_checkpoint
from moezoo.loaders.mapping import Copy, ParameterInfo
from moezoo.loaders.plan import Plan
from moezoo.loaders.quantization import Quantization
from moezoo.loaders.quantized_parameters import quantize_on_meta
from moezoo.loaders.save import DRAFT, moved_at_end, shard_bytes, write_tensors
from moezoo.loaders.stream import bar
from moezoo.loaders.weights import (
    Planned,
    plan_weights,
    read_copies,
    report,
    require_device,
    sources_of,
    with_orders,
)

_KEPT = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*")
_LEFT = (CONFIG, GENERATION_CONFIG, "*.index.json", "quant*_config.json")


@torch.inference_mode(False)
def convert(
    checkpoint: Checkpoint,
    folder: str | os.PathLike[str],
    *,
    quantization: object = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    max_shard_size: int | str = "5GB",
    held_out: HeldOut | None = None,
    progress: bool = False,
) -> Section:
    """Write `checkpoint` into `folder` as `save_pretrained` would write the model that
    `from_pretrained` makes of it with these options, without the whole of it in memory.

    Tokenizer, chat template, licence and other such files come along, and a section of the model
    card says what was done: what is returned. The loss on `held_out` is that of `checkpoint` and of
    the result, each loaded whole. A conversion that fails leaves nothing. Raises `ValueError` for a
    folder that is not empty, and what `from_pretrained` and `save_pretrained` raise.
    """
    target = Path(folder)
    _require_target(target, checkpoint)
    shard_bytes(max_shard_size)
    asked = Quantization.of(quantization)
    on = device_of(device)
    # Opened first, since a folder that cannot be written should cost no download.
    with moved_at_end(target) as draft:
        return _convert(
            checkpoint,
            draft,
            quantization=asked,
            dtype=dtype,
            device=on,
            max_shard_size=max_shard_size,
            held_out=held_out,
            progress=progress,
        )


def _require_target(target: Path, checkpoint: Checkpoint) -> None:
    """Raises `ValueError` where `target` cannot become a folder of its own."""
    if target.exists():
        there = [path.name for path in target.iterdir()] if target.is_dir() else [target.name]
        if any(not name.startswith(DRAFT) for name in there):
            raise ValueError(f"{target} is there already; give a folder that is new or empty")
    above = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not above.is_dir():
        raise ValueError(f"{target} cannot be a folder, since {above} is a file; give another")
    source = Path(checkpoint.name)
    if (
        checkpoint.revision is None
        and source.is_dir()
        and target.resolve().is_relative_to(source.resolve())
    ):
        raise ValueError(
            f"{target} is inside {source}, which is converted; give a folder elsewhere"
        )


def _convert(
    checkpoint: Checkpoint,
    draft: Path,
    *,
    quantization: Quantization | None,
    dtype: torch.dtype | str,
    device: torch.device,
    max_shard_size: int | str,
    held_out: HeldOut | None,
    progress: bool,
) -> Section:
    config, generation_config, decoder, rules = build(
        checkpoint, dtype=dtype, quantization=quantization, device=None, progress=progress
    )
    planned = plan_weights(
        decoder, checkpoint, rules, dtype=config.dtype, quantization=quantization
    )
    require_device(decoder, planned.quantized, device)
    locations = checkpoint.fetch(sources_of(planned), progress=progress)
    planned = with_orders(decoder, checkpoint, planned, locations, dtype=config.dtype)
    report(decoder, planned)
    quantize_on_meta(decoder, planned.quantized)
    rules = registry.architecture(config.model_type).CHECKPOINT
    set_quantization_config(config, decoder, rules)
    warn_of_schemes(getattr(config, "quantization_config", None), decoder, rules)
    config.architectures = checkpoint.config.get("architectures")
    blank = {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta")
        for name, info in planned.wanted.items()
    }
    writing = WritePlan(decoder, rules)
    written = writing.tensors(blank)
    others = _other_files(checkpoint)
    before = None
    if held_out is not None:
        # First, since to write may take long; and no more than one of the two is in memory.
        before = _loss(checkpoint, held_out, dtype=config.dtype, device=device)
    layers = _Layers(writing, checkpoint, planned, locations, device)
    with bar("converting", sum(tensor.nbytes for tensor in written), progress) as advance:

        def tensor_of(tensor: TensorToWrite) -> Tensor:
            made = layers.tensor_of(tensor)
            advance(made.nbytes)
            return made

        size = write_tensors(written, draft, max_shard_size=max_shard_size, tensor_of=tensor_of)
    with naming_file(draft / CONFIG):
        config.to_json_file(draft / CONFIG)
    if generation_config is not None:
        with naming_file(draft / GENERATION_CONFIG):
            generation_config.to_json_file(draft / GENERATION_CONFIG)
    for file, path in others.items():
        shutil.copyfile(path, draft / file)
    measured = None
    if held_out is not None and before is not None:
        after = _loss(open_checkpoint(draft), held_out, dtype=config.dtype, device=device)
        measured = Measured(
            held_out.name, before.num_tokens, before.length, before.nats, after.nats
        )
    revision = "" if checkpoint.revision is None else f", commit {checkpoint.revision}"
    done = Section(
        checkpoint.name + revision,
        *formats_held(decoder),
        config.dtype,
        size,
        sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        layers.weight_error(),
        measured,
    )
    write_card(draft, others.get(CARD), done)
    return done


def _loss(
    checkpoint: Checkpoint, held_out: HeldOut, *, dtype: torch.dtype, device: torch.device
) -> Loss:
    model = from_checkpoint(checkpoint, dtype=dtype, device=device, progress=False)
    return held_out.loss(model)


class _Layers:
    """Reads the tensors to write, one layer after another, each layer when its first tensor is
    asked for."""

    def __init__(
        self,
        writing: WritePlan,
        checkpoint: Checkpoint,
        planned: Planned,
        locations: Mapping[str, Location],
        device: torch.device,
    ) -> None:
        self.writing = writing
        self.checkpoint = checkpoint
        self.locations = locations
        self.device = device
        self.layer: str | None = None
        self.tensors: dict[str, TensorToWrite] = {}
        self.parts: dict[str, Planned] = {}
        """The plan of each layer, by its prefix."""
        copies: dict[str, list[Copy]] = {}
        wanted: dict[str, dict[str, ParameterInfo]] = {}
        for copy in planned.plan.copies:
            copies.setdefault(_layer_of(copy.target), []).append(copy)
        for name, info in planned.wanted.items():
            wanted.setdefault(_layer_of(writing.parameter(name)), {})[name] = info
        for layer, infos in wanted.items():
            part = Plan(tuple(copies.get(layer, ())), {})
            self.parts[layer] = planned._replace(wanted=infos, plan=part)
        quantizes = any(
            copy.target in planned.quantized and copy.source not in planned.encoding.weights
            for copy in planned.plan.copies
        )
        self.squares = Squares(device) if quantizes else None

    def tensor_of(self, tensor: TensorToWrite) -> Tensor:
        layer = _layer_of(tensor.target)
        if layer != self.layer:
            self.layer, self.tensors = layer, {}
            state = read_copies(
                self.checkpoint,
                self.parts[layer],
                self.locations,
                device=self.device,
                progress=False,
                squares=self.squares,
            )
            self.tensors = {each.name: each for each in self.writing.tensors(state)}
        return self.tensors[tensor.name].make()

    def weight_error(self) -> float | None:
        if self.squares is None:
            return None
        errors, weights = self.squares.sums.tolist()
        return math.sqrt(errors / weights) if weights else 0.0


def _layer_of(parameter: str) -> str:
    """Return the name of the layer of a parameter, whose tensors are read together; a parameter
    outside all layers is read alone."""
    layer = re.match(r"(.*?\.)?\d+\.", parameter)
    return parameter if layer is None else layer[0]


def _other_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Download what a folder of the model has beside its weights (tokenizer, chat template,
    licence, model card), and return the paths by name."""
    names = [
        file
        for file in checkpoint.files.listing()
        if any(fnmatchcase(file, pattern) for pattern in _KEPT)
        and not any(fnmatchcase(file, pattern) for pattern in _LEFT)
        and "/" not in file
    ]
    return checkpoint.files.download(names, progress=False)
