"""A checkpoint on disk or on the hub: its config, and the name, shape, dtype and place of each
tensor.

Opening one reads the config, the index and the headers of the safetensors files, never a weight; of
a hub repository the headers come over the network in range requests. `Checkpoint.fetch` then
downloads the files that hold the tensors asked for. Only safetensors are read, never pickle.
"""

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import HfApi, errors, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from moezoo.errors import CheckpointError
from moezoo.loaders.mapping import TensorInfo

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of the safetensors format by its own names."""

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
"""The files beside the weights that decide what a model writes: configs and tokenizers."""

_log = logging.getLogger(__name__)
_SAMPLE = 4096
_MAX_HEADER = 100_000_000
_GGUF = (
    "GGUF, llama.cpp's format, is not supported: moezoo reads safetensors alone. Take the model "
    "that the file was made of; quantization='int4_w4a16' makes it about as small while it loads"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONNECTIONS = 16


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor of a checkpoint: shape, dtype, its file's name and its first byte in the file's
    data.
    """

    file: str
    start: int

    @property
    def where(self) -> str:
        return f" in {self.file}"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Location(NamedTuple):
    """Where on this machine the bytes of a tensor are: from `offset` on in `path`."""

    path: Path
    offset: int


class _Files(Protocol):
    """A local folder or a hub repository."""

    @property
    def name(self) -> str:
        """How messages call it."""

    @property
    def revision(self) -> str | None:
        """The commit that all files are of; None for a folder."""

    def listing(self) -> Collection[str]: ...

    def local(self, file: str) -> Path | None:
        """The file's path if it is on this machine."""

    def tensors(self, file: str) -> dict[str, StoredTensor]:
        """The header of a safetensors file."""

    def download(self, files: Iterable[str], *, progress: bool) -> dict[str, Path]: ...


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; `name` is the folder or hub id that messages use."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: _Files = field(repr=False)

    @property
    def revision(self) -> str | None:
        """The commit of a hub repository, wherever its branch moves; None for a folder."""
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
        """The same with its headers read, which is where most of what can be wrong is found."""
        return replace(self, tensors=_read_tensors(self.files))

    def fetch(self, names: Collection[str], *, progress: bool = False) -> dict[str, Location]:
        """Where each of the named tensors is on this machine, after downloading the files that are
        not.

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
        """What tells this checkpoint from others, wherever it lies and whatever it is called.

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
                with _naming(path):
                    parts.append([file, sha256(path.read_bytes()).hexdigest()])
        names = sorted(self.tensors)
        locations = self.fetch(names)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
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
    """The checkpoint in a local folder or in a hub repository, its headers read.

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
    """The checkpoint without its tensors: what there is to know where they cannot be read."""
    if not isinstance(model_id, str | os.PathLike) or not os.fspath(model_id):
        raise ValueError(
            f"model_id is {model_id!r}, expected a folder or a hub id such as Qwen/Qwen3-30B-A3B"
        )
    name = os.fspath(model_id)
    files: _Files
    if os.path.isdir(name):
        files = _Folder(name)
    elif os.path.exists(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name[0] == ".":
        if name.endswith(".gguf"):
            raise CheckpointError(f"{name}: {_GGUF}")
        kind = "is a file, not a folder" if os.path.exists(name) else "does not exist"
        raise CheckpointError(
            f"{name} {kind}; expected a folder with {CONFIG} and {WEIGHTS} (or {INDEX} and its "
            "shards), or a hub id such as Qwen/Qwen3-30B-A3B"
        )
    else:
        files = _Repository(
            name, revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
    config_path = files.local(CONFIG)
    if config_path is None:
        if any(file.endswith(".gguf") for file in files.listing()):
            raise CheckpointError(f"{name}: {_GGUF}")
        raise CheckpointError(f"{name} has no {CONFIG}, so it is not known which model this is")
    return Checkpoint(name, _with_scheme(_read_json(config_path)), {}, files)


def _with_scheme(config: dict[str, Any]) -> dict[str, Any]:
    """A multimodal config.json may say in its text model's part how weights are stored."""
    text = config.get("text_config")
    if isinstance(text, dict) and "quantization_config" in text:
        return {"quantization_config": text["quantization_config"]} | config
    return config


def read_header(path: Path) -> tuple[int, dict[str, StoredTensor]]:
    """The offset of the data in a safetensors file, and its tensors.

    Raises `CheckpointError` if the header is malformed or the file is shorter than it says.
    """
    with _naming(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            what = _disguise(first + file.read(100)) or (
                "is truncated or not in the safetensors format: get it again"
            )
            raise CheckpointError(f"{path} ({size} bytes) {what}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: the header is not JSON ({error})") from error
    start = 8 + length
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = _parse(header, path, path.name)
    end = _check_cover(tensors, path)
    if start + end != size:
        what = "the file is truncated" if start + end > size else "the file has bytes of no tensor"
        cut = [name for name, t in tensors.items() if start + t.start + t.nbytes > size]
        which = f", {len(cut)} tensors are not whole, such as {cut[0]}" if cut else ""
        raise CheckpointError(f"{path}: {what}: {size} bytes, expected {start + end}{which}")
    return start, tensors


def _sample(location: Location, tensor: StoredTensor) -> str:
    """A hash of the bytes in the middle of a tensor; of all where they are few."""
    size = min(tensor.nbytes, _SAMPLE)
    with _naming(location.path), open(location.path, "rb", buffering=0) as file:
        file.seek(location.offset + (tensor.nbytes - size) // 2)
        return sha256(file.read(size)).hexdigest()


def _parse(header: Mapping[str, Any], path: Path | str, file: str) -> dict[str, StoredTensor]:
    tensors = {}
    for name, entry in header.items():
        try:
            shape = tuple(entry["shape"])
            start, end = entry["data_offsets"]
            dtype = DTYPES.get(entry["dtype"])
            whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path}: the header's entry of {name} is malformed: {entry}")
        if dtype is None:
            raise CheckpointError(
                f"{path}: {name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}"
            )
        tensor = StoredTensor(shape, dtype, file, start)
        if end - start != tensor.nbytes:
            raise CheckpointError(
                f"{path}: {name} {list(shape)} of {entry['dtype']} takes {tensor.nbytes} bytes, "
                f"its offsets {start}:{end} are {end - start}"
            )
        tensors[name] = tensor
    return tensors


def _check_cover(tensors: Mapping[str, StoredTensor], path: Path) -> int:
    """The end of the data; raises where two tensors overlap or leave a hole."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before"
            raise CheckpointError(f"{path}: {name} at {tensor.start} {what}, which ends at {end}")
        end += tensor.nbytes
    return end


def _disguise(start: bytes) -> str | None:
    """What a file that begins so is in place of the one that was meant, and what to do."""
    again = "get the file itself with `hf download` or `git lfs pull`"
    if start.startswith(b"version https://git-lfs"):
        return f"is a git-LFS pointer: {again}"
    if start.lstrip().startswith(b"<"):
        return f"is a web page: {again}"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    with _naming(path):
        raw = path.read_bytes()
        try:
            content = json.loads(raw)
        except ValueError as error:
            what = _disguise(raw[:100]) or f"is not JSON: {error}"
            raise CheckpointError(f"{path} {what}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_tensors(files: _Files) -> dict[str, StoredTensor]:
    listing = files.listing()
    if WEIGHTS in listing:
        return files.tensors(WEIGHTS)
    if INDEX not in listing:
        raise CheckpointError(_no_weights(files.name, listing))
    index_path = files.local(INDEX) or files.download([INDEX], progress=False)[INDEX]
    weight_map = _read_json(index_path).get("weight_map")
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
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
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
        return f"{name}: {_GGUF}"
    others = sorted(file for file in listing if file.endswith(".safetensors"))
    found = f"; it has {_some(others)}" if others else ""
    return f"{name} has neither {WEIGHTS} nor {INDEX}{found}"


class _Folder:
    """A folder on this machine."""

    revision = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(name)

    def listing(self) -> Collection[str]:
        with _naming(self.path):
            return os.listdir(self.path)

    def local(self, file: str) -> Path | None:
        path = self.path / file
        return path if path.exists() else None

    def tensors(self, file: str) -> dict[str, StoredTensor]:
        return read_header(self.path / file)[1]

    def download(self, files: Iterable[str], *, progress: bool) -> dict[str, Path]:
        return {file: self.path / file for file in files}


class _Silent(tqdm):
    """A progress bar that shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


class _Repository:
    """A repository of the hub at one commit, so that all files come from the same one."""

    def __init__(
        self,
        repo_id: str,
        revision: str | None,
        *,
        cache_dir: str | Path | None,
        token: str | bool | None,
        local_files_only: bool,
    ) -> None:
        self.repo_id = repo_id
        self.cache_dir = cache_dir
        self.token = token
        self.offline = local_files_only
        # By the name of the branch first: so the cache learns at which commit the branch is.
        self.revision = revision
        self.snapshot = self._download(CONFIG).parent
        self.revision = self.snapshot.name
        self._listing = self._list()

    @property
    def name(self) -> str:
        return f"{self.repo_id} as cached on this machine" if self.offline else self.repo_id

    def listing(self) -> Collection[str]:
        return self._listing

    def _list(self) -> Collection[str]:
        if not self.offline:
            try:
                return HfApi(token=self.token).list_repo_files(self.repo_id, revision=self.revision)
            except (ConnectionError, HTTPError) as error:
                _log.warning("%s: the hub cannot be asked (%s), the cache is", self.repo_id, error)
                self.offline = True
        return os.listdir(self.snapshot)

    def local(self, file: str) -> Path | None:
        path = try_to_load_from_cache(self.repo_id, file, self.cache_dir, self.revision)
        return Path(path) if isinstance(path, str) else None

    def tensors(self, file: str) -> dict[str, StoredTensor]:
        path = self.local(file)
        if path is not None:
            return read_header(path)[1]
        with self._explained(file):
            header = HfApi(token=self.token).parse_safetensors_file_metadata(
                self.repo_id, file, revision=self.revision
            )
        entries = {
            name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
            for name, t in header.tensors.items()
        }
        return _parse(entries, f"{self.repo_id}/{file}", file)

    def download(self, files: Iterable[str], *, progress: bool) -> dict[str, Path]:
        files = list(files)
        with ThreadPoolExecutor(min(_CONNECTIONS // 2, len(files) or 1)) as pool:
            paths = pool.map(lambda file: self._download(file, progress=progress), files)
            return dict(zip(files, paths, strict=True))

    def _download(self, file: str, *, progress: bool = False) -> Path:
        with self._explained(file):
            path = hf_hub_download(
                self.repo_id,
                file,
                revision=self.revision,
                cache_dir=self.cache_dir,
                token=self.token,
                local_files_only=self.offline,
                tqdm_class=None if progress else _Silent,
            )
        return Path(path)

    @contextmanager
    def _explained(self, file: str) -> Iterator[None]:
        try:
            yield
        except errors.LocalEntryNotFoundError as error:
            why = "local_files_only is set" if self.offline else "the hub cannot be reached"
            raise CheckpointError(
                f"{self.repo_id} is not a folder here, its {file} is not in the hub's cache here, "
                f"and {why}"
            ) from error
        except errors.EntryNotFoundError as error:
            at = f"revision {self.revision or 'main'}"
            advice = f". {_GGUF}" if "gguf" in self.repo_id.lower() else ""
            raise CheckpointError(f"{self.repo_id} has no {file} at {at}{advice}") from error
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{self.repo_id} is gated: accept its terms on its hub page, then pass token= or "
                "log in with `hf auth login`"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{self.repo_id} is neither a folder here nor a repository that the hub shows; if "
                "it is private, pass token= or log in with `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{self.repo_id} has no revision {self.revision}") from error
        except errors.HFValidationError as error:
            raise CheckpointError(f"{self.repo_id} is neither a folder nor a hub id") from error
        except (HTTPError, errors.SafetensorsParsingError, OSError) as error:
            raise CheckpointError(f"{self.repo_id}: {file} cannot be read: {error}") from error
