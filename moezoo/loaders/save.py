"""Save a model as a checkpoint in the layout of the hub: the inverse of each target's first rule.

Tensors are written one at a time, so a save takes the memory of the largest one. Files are written
in a folder of their own, which is moved into place when all are whole.
"""

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedConfig

from moezoo import registry
from moezoo.errors import naming_file
from moezoo.layers.decoder import Decoder
from moezoo.loaders.card import CARD, Section, formats_held, write_card
from moezoo.loaders.files import CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS
from moezoo.loaders.headers import DTYPES
from moezoo.loaders.hub_layout import (
    TensorToWrite,
    WritePlan,
    plain_infos,
    set_quantization_config,
    warn_of_schemes,
)
from moezoo.parallel.gather import check_formats, gathered, whole_on_meta
from moezoo.parallel.mesh import Mesh

_log = logging.getLogger(__name__)

DRAFT = ".saving-"
"""Prefix of the names of folders whose files are not all written yet."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_EXPERTS = re.compile(r"layers\.(\d+)\.mlp\.(?:w13|w2|bias13|bias2)")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class _Model(Protocol):
    """The parts of a `MoECausalLM` that are saved."""

    decoder: Decoder
    config: PreTrainedConfig
    generation_config: GenerationConfig | None


def save_pretrained(
    model: _Model,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    mesh: Mesh | None = None,
) -> None:
    """Write config, generation config and weights of `model` into `folder`.

    moezoo reads them back bit for bit, and transformers to the same logits. Quantised experts are
    written as they are, in the hub's layout for their format, and all else as not quantised. The
    config names the dtype that the weights have. Of quantised weights a section of the model card
    tells, which joins the card that is in the folder or is one. Other files in the folder stay;
    shards of an earlier save that are not overwritten go. A save that fails or is interrupted while
    files are written leaves the folder as it was; one that stops in the moment when they are moved
    keeps the new ones and says where. Where experts are divided over the ranks of a mesh, each
    calls this, and the first writes what one process would. Raises `ValueError` for a malformed
    `max_shard_size`, for a model that does not fit its config,
    `QuantizationError` for weights that no layout of the hub has, and `OSError`
    that names the file where the disk is full; `RankError` where another rank fails, and
    `ValueError` where experts are quantised and a rank has none in a layer.
    """
    shard_bytes(max_shard_size)
    rules = registry.architecture(model.config.model_type).CHECKPOINT
    if mesh is not None:
        check_formats(model.decoder, mesh)
    with nullcontext() if mesh is None else whole_on_meta(model.decoder):
        writing = WritePlan(model.decoder, rules)
        _require_fit(model)
        written = writing.tensors(model.decoder.state_dict())
        config = deepcopy(model.config)
        set_quantization_config(config, model.decoder, rules)
        if mesh is None or mesh.rank == 0:
            described = getattr(config, "quantization_config", None)
            warn_of_schemes(described, model.decoder, rules)
    tensor_of = _made
    if mesh is not None:
        divided = _Divided(model.decoder, mesh, writing)
        if mesh.rank:
            for tensor in sorted(written, key=_name):
                divided.gather(tensor)
            return
        tensor_of = divided.tensor_of
    config.dtype = next(
        (p.dtype for p in model.decoder.parameters() if p.is_floating_point()), config.dtype
    )
    config.architectures = config.architectures or [type(model).__name__]
    card = Path(folder) / CARD
    with moved_at_end(Path(folder)) as draft:
        size = write_tensors(written, draft, max_shard_size=max_shard_size, tensor_of=tensor_of)
        section = Section(
            model.config.name_or_path or f"a new {config.model_type}",
            *formats_held(model.decoder),
            config.dtype,
            bytes_after=size,
        )
        write_card(draft, card if card.is_file() else None, section)
        with naming_file(draft / CONFIG):
            config.to_json_file(draft / CONFIG)
        if model.generation_config is not None:
            with naming_file(draft / GENERATION_CONFIG):
                model.generation_config.to_json_file(draft / GENERATION_CONFIG)


def _require_fit(model: _Model) -> None:
    """Raise ValueError for the first parameter that differs from what the config builds."""
    with torch.device("meta"):
        built = plain_infos(registry.build(model.config))
    held = plain_infos(model.decoder)
    for name in [*held, *built]:
        has, wants = (
            f"of shape {list(infos[name].shape)}" if name in infos else "absent"
            for infos in (held, built)
        )
        if has != wants:
            raise ValueError(
                f"{name} is {has} in the model and {wants} in what its config builds, so that what "
                "is saved would not load: change model.config to fit the model"
            )


class _Divided:
    """Tensors of a model whose experts are divided; the first rank asks for them in the order in
    which the others send them."""

    def __init__(self, decoder: Decoder, mesh: Mesh, writing: WritePlan) -> None:
        self._decoder, self._mesh, self._writing = decoder, mesh, writing
        self._layer: str | None = None
        self._experts: dict[str, TensorToWrite] = {}
        """The experts' tensors of `_layer` by name; filled on the first rank alone."""

    def tensor_of(self, tensor: TensorToWrite) -> torch.Tensor:
        self.gather(tensor)
        if _EXPERTS.fullmatch(tensor.target):
            return self._experts[tensor.name].make()
        return tensor.make()

    def gather(self, tensor: TensorToWrite) -> None:
        """Gather all experts of the tensor's layer, if it is the first of them."""
        found = _EXPERTS.fullmatch(tensor.target)
        if found is not None and found[1] != self._layer:
            self._layer = found[1]
            self._experts = {}  # there is room for one layer
            state = gathered(self._decoder, self._mesh, int(found[1]))
            self._experts = {each.name: each for each in self._writing.tensors(state)}


def _made(tensor: TensorToWrite) -> torch.Tensor:
    return tensor.make()


def _name(tensor: TensorToWrite) -> str:
    return tensor.name


def write_tensors(
    written: Sequence[TensorToWrite],
    folder: Path,
    *,
    max_shard_size: int | str,
    tensor_of: Callable[[TensorToWrite], torch.Tensor],
) -> int:
    """Write these tensors, calling `tensor_of` in the order of their names, and return the bytes of
    all."""
    limit = shard_bytes(max_shard_size)
    shards: list[list[TensorToWrite]] = [[]]
    size = 0
    for tensor in sorted(written, key=_name):
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        _write(folder / WEIGHTS, shards[0], tensor_of)
        return size
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write(folder / file, tensors, tensor_of)
        weight_map.update((tensor.name, file) for tensor in tensors)
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with naming_file(folder / INDEX):
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _write(
    path: Path, tensors: Sequence[TensorToWrite], tensor_of: Callable[[TensorToWrite], torch.Tensor]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with naming_file(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            written = file.write(_raw(tensor_of(tensor)))
            assert written == tensor.nbytes, tensor.name


def _raw(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, on the host."""
    data: memoryview = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
    return data


@contextmanager
def moved_at_end(folder: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `folder` if the block succeeds; if that exists already, the
    files move into it."""
    existed = folder.exists()
    place = folder if existed else folder.parent
    parents = [path for path in (place, *place.parents) if not path.exists()]
    place.mkdir(parents=True, exist_ok=True)
    start = DRAFT if existed else f"{DRAFT}{folder.name}-"
    for leftover in place.glob(f"{start}*"):
        _log.warning(
            "%s is of a save that was stopped or still runs: remove it if none does", leftover
        )
    # Not `tempfile.mkdtemp`, whose folders only their owner can read.
    draft = place / f"{start}{secrets.token_hex(4)}"
    try:
        with _named_as_asked(draft, folder):
            draft.mkdir()
            yield draft
    except BaseException:
        if draft.exists():
            shutil.rmtree(draft)
        for path in parents:
            path.rmdir()
        raise
    try:
        if existed:
            _move(draft, folder)
        else:
            draft.rename(folder)
    except BaseException:
        # From here on the old files go, so the new ones are all that there is. A note to the error
        # would be lost: nobody shows those of signals.
        _log.warning(
            "%s holds only a part of what was saved; the rest is in %s: move its files into %s, %s "
            "last",
            *(folder, draft, folder, INDEX),
        )
        raise
    if existed:
        shutil.rmtree(draft)


@contextmanager
def _named_as_asked(draft: Path, folder: Path) -> Iterator[None]:
    """Let an `OSError` of the block that names a file in the temporary `draft` name the one it was
    to become in `folder`."""
    try:
        yield
    except OSError as error:
        for which in ("filename", "filename2"):
            file = getattr(error, which)
            if isinstance(file, str | os.PathLike) and Path(file).is_relative_to(draft):
                setattr(error, which, os.fspath(folder / Path(file).relative_to(draft)))
        raise


def _move(draft: Path, folder: Path) -> None:
    new = {path.name for path in draft.iterdir()}
    # Without an index or weights the folder is no checkpoint, so nobody reads half of a move.
    for stale in (INDEX, WEIGHTS):
        (folder / stale).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name) and path.name not in new:
            path.unlink()
    for name in sorted(new, key=lambda name: name in (INDEX, WEIGHTS)):
        (draft / name).replace(folder / name)


def shard_bytes(size: int | str) -> int:
    """Parse a size such as "5GB" as 5_000_000_000; decimals are allowed, as in huggingface_hub.

    Raises `ValueError` for what is neither such a string nor a positive number.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]I?B)\s*", size.upper())
        if match and (count := int(float(match[1]) * _UNITS[match[2]])) > 0:
            return count
    elif isinstance(size, int) and size > 0:
        return size
    raise ValueError(
        f"max_shard_size is {size!r}, expected a positive number of bytes or a string such as '5GB'"
    )
