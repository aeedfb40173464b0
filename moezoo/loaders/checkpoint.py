"""A checkpoint on disk or on the hub: its config, and the name, shape, dtype and place of each
tensor.

Opening one reads the config, the index and the headers of the safetensors files, never a weight.
`Checkpoint.fetch` then downloads the files that hold the tensors asked for. Only safetensors are
read, never pickle.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from moezoo.errors import CheckpointError
from moezoo.loaders.files import (
    CONFIG,
    GENERATION_CONFIG,
    GGUF,
    INDEX,
    WEIGHTS,
    read_json,
    reading,
)
from moezoo.loaders.headers import StoredTensor, read_header
from moezoo.loaders.sources import CONNECTIONS, Files, Folder, Repository

_DECIDE_TEXT = (
    CONFIG,
    GENERATION_CONFIG,
    "*tokenizer*",
    "chat_template*",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
"""Patterns of the files beside the weights that decide what a model writes: configs and
tokenizers."""

_SAMPLE = 4096
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Location(NamedTuple):
    """Place of a tensor's bytes on this machine: from `offset` on in the file `path`."""

    path: Path
    offset: int


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; `name` is the folder or hub id that messages use."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: Files = field(repr=False)

    @property
    def revision(self) -> str | None:
        """Commit of a hub repository, wherever its branch moves; None for a folder."""
        return self.files.revision

    @property
    def config_folder(self) -> Path:
        """A local folder with config.json and, where the checkpoint has one,
        generation_config.json.
        """
        if GENERATION_CONFIG in self.files.listing():
            self.files.download([GENERATION_CONFIG], progress=False)
        path = self.files.local(CONFIG)
        assert path is not None, "config.json was read when the checkpoint was opened"
        return path.parent

    def with_tensors(self) -> "Checkpoint":
        """Return the checkpoint with its headers read; most faults of a checkpoint are found
        here."""
        return replace(self, tensors=_read_tensors(self.files))

    def fetch(self, names: Collection[str], *, progress: bool = False) -> dict[str, Location]:
        """Return the location of each of the named tensors, after downloading the files that are
        missing.

        Raises `CheckpointError` if a download fails or a downloaded file is not what its header
        said on the hub.
        """
        wanted: dict[str, list[str]] = defaultdict(list)
        for name in names:
            wanted[self.tensors[name].file].append(name)
        locations = {}
        for file, path in self.files.download(wanted, progress=progress).items():
            start, stored = read_header(path)
            for name in wanted[file]:
                if stored.get(name) != self.tensors[name]:
                    raise CheckpointError(
                        f"{path}: {name} is {stored.get(name)}, the header read before said "
                        f"{self.tensors[name]}; the file changed, load again"
                    )
                locations[name] = Location(path, start + stored[name].start)
        return locations

    def fingerprint(self) -> str:
        """Hash that tells this checkpoint from others, wherever it lies and whatever it is called.

        The commit of a hub repository. Of a folder, a hash of the configs, the tokenizer's files
        and, for every tensor, its name, dtype, shape and the 4 KiB in its middle: to read all
        weights would take as long as to load them, and training changes every part of a tensor.
        """
        if self.revision is not None:
            return self.revision
        parts: list[object] = []
        for file in sorted(self.files.listing()):
            path = self.files.local(file)
            decides = any(fnmatchcase(file, pattern) for pattern in _DECIDE_TEXT)
            if decides and path is not None and path.is_file():
                with reading(path):
                    parts.append([file, sha256(path.read_bytes()).hexdigest()])
        names = sorted(self.tensors)
        locations = self.fetch(names)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            samples = pool.map(lambda name: _sample(locations[name], self.tensors[name]), names)
            for name, sample in zip(names, samples, strict=True):
                tensor = self.tensors[name]
                parts.append([name, str(tensor.dtype), tensor.shape, sample])
        return sha256(json.dumps(parts).encode()).hexdigest()


def open_checkpoint(
    model_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Open the checkpoint in a local folder or in a hub repository, and read its headers.

    A folder is taken before a hub id of the same name. Raises `CheckpointError` for what cannot be
    found, reached or read, naming the file and the tensor, and `ValueError` for no name at all.
    """
    return open_config(
        model_id,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    ).with_tensors()


def open_config(
    model_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Open the checkpoint without its tensors, for when their headers cannot be read."""
    if not isinstance(model_id, str | os.PathLike) or not os.fspath(model_id):
        raise ValueError(
            f"model_id is {model_id!r}, expected a folder or a hub id such as Qwen/Qwen3-30B-A3B"
        )
    name = os.fspath(model_id)
    files: Files
    if os.path.isdir(name):
        files = Folder(name)
    elif os.path.exists(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name[0] == ".":
        if name.endswith(".gguf"):
            raise CheckpointError(f"{name}: {GGUF}")
        kind = "is a file, not a folder" if os.path.exists(name) else "does not exist"
        raise CheckpointError(
            f"{name} {kind}; expected a folder with {CONFIG} and {WEIGHTS} (or {INDEX} and its "
            "shards), or a hub id such as Qwen/Qwen3-30B-A3B"
        )
    else:
        files = Repository(
            name, revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
    config_path = files.local(CONFIG)
    if config_path is None:
        if any(file.endswith(".gguf") for file in files.listing()):
            raise CheckpointError(f"{name}: {GGUF}")
        raise CheckpointError(f"{name} has no {CONFIG}, so it is not known which model this is")
    return Checkpoint(name, _with_scheme(read_json(config_path)), {}, files)


def _with_scheme(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with the quantization_config that a multimodal one keeps in its text
    model's part."""
    text = config.get("text_config")
    if isinstance(text, dict) and "quantization_config" in text:
        return {"quantization_config": text["quantization_config"]} | config
    return config


def _read_tensors(files: Files) -> dict[str, StoredTensor]:
    listing = files.listing()
    if WEIGHTS in listing:
        return files.tensors(WEIGHTS)
    if INDEX not in listing:
        raise CheckpointError(_no_weights(files.name, listing))
    index_path = files.local(INDEX) or files.download([INDEX], progress=False)[INDEX]
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index_path}: weight_map is {weight_map!r}, expected a table of tensor names to files"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or shard != os.path.basename(shard):
            raise CheckpointError(
                f"{index_path}: weight_map has {name} in {shard!r}, expected the name of a file "
                "beside it"
            )
    shards: dict[str, set[str]] = defaultdict(set)
    for name, shard in weight_map.items():
        shards[shard].add(name)
    absent = [
        f"{shard} ({_some(shards[shard])})" for shard in sorted(shards) if shard not in listing
    ]
    if absent:
        raise CheckpointError(
            f"{files.name} lacks {len(absent)} of the {len(shards)} files that {INDEX} names: "
            f"{'; '.join(absent)}"
        )
    tensors: dict[str, StoredTensor] = {}
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for shard, stored in zip(shards, pool.map(files.tensors, shards), strict=True):
            if stored.keys() != shards[shard]:
                lost, more = shards[shard] - stored.keys(), stored.keys() - shards[shard]
                raise CheckpointError(
                    f"{files.name}: {INDEX} and {shard} disagree"
                    + (f"; the file lacks {_some(lost)}" if lost else "")
                    + (f"; the index lacks {_some(more)}" if more else "")
                )
            tensors.update(stored)
    return tensors


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _no_weights(name: str, listing: Collection[str]) -> str:
    pickles = sorted(file for file in listing if file.endswith(_PICKLES))
    if pickles:
        return (
            f"{name} has only pickled weights ({_some(pickles)}); moezoo reads safetensors alone, "
            "since unpickling runs code. Convert them once with transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
        )
    if any(file.endswith(".gguf") for file in listing):
        return f"{name}: {GGUF}"
    others = sorted(file for file in listing if file.endswith(".safetensors"))
    found = f"; it has {_some(others)}" if others else ""
    return f"{name} has neither {WEIGHTS} nor {INDEX}{found}"


def _sample(location: Location, tensor: StoredTensor) -> str:
    """Return a hash of the bytes in the middle of a tensor, or of all bytes of a small one."""
    size = min(tensor.nbytes, _SAMPLE)
    with reading(location.path), open(location.path, "rb", buffering=0) as file:
        file.seek(location.offset + (tensor.nbytes - size) // 2)
        return sha256(file.read(size)).hexdigest()
