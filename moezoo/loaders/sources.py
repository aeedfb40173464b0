"""The sources of a checkpoint's files: a folder on this machine, or a repository of the hub.

Of a repository the headers come over the network in range requests, and a file is downloaded when
it is asked for.
"""

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi, errors, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from moezoo.errors import CheckpointError
from moezoo.loaders.files import CONFIG, GGUF, reading
from moezoo.loaders.headers import StoredTensor, parse_header, read_header

CONNECTIONS = 16
"""Number of files that are read, or requested from the hub, at a time."""

_log = logging.getLogger(__name__)


class Files(Protocol):
    """A local folder or a hub repository."""

    @property
    def name(self) -> str:
        """Name of the source in messages."""

    @property
    def revision(self) -> str | None:
        """Commit that all files are of; None for a folder."""

    def listing(self) -> Collection[str]: ...

    def local(self, file: str) -> Path | None:
        """Return the file's path if it is on this machine, else None."""

    def tensors(self, file: str) -> dict[str, StoredTensor]:
        """Return the tensors in the header of a safetensors file."""

    def download(self, files: Iterable[str], *, progress: bool) -> dict[str, Path]: ...


class Folder:
    """A folder on this machine."""

    revision = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(name)

    def listing(self) -> Collection[str]:
        with reading(self.path):
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


class Repository:
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
        return parse_header(entries, f"{self.repo_id}/{file}", file)

    def download(self, files: Iterable[str], *, progress: bool) -> dict[str, Path]:
        files = list(files)
        with ThreadPoolExecutor(min(CONNECTIONS // 2, len(files) or 1)) as pool:
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
            advice = f". {GGUF}" if "gguf" in self.repo_id.lower() else ""
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
