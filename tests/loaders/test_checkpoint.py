"""Opening checkpoints: folders, hub repositories, and everything that can be wrong with them."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_stand_in import COMMIT, Hub, serve
from safetensors.torch import save_file

from moezoo.errors import CheckpointError
from moezoo.loaders.checkpoint import Checkpoint, open_checkpoint
from moezoo.loaders.files import INDEX, WEIGHTS
from moezoo.loaders.headers import read_header

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.bias": torch.arange(3, dtype=torch.bfloat16),
    "b": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4),
}


def write(folder: Path, *shards: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS)
        return folder
    weight_map = {}
    for n, shard in enumerate(shards, start=1):
        file = f"model-{n:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def split(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor} for name, tensor in tensors.items()]


def contents(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    path, offset = checkpoint.fetch([name])[name]
    info = checkpoint.tensors[name]
    raw = path.read_bytes()[offset : offset + info.nbytes]
    return torch.frombuffer(bytearray(raw), dtype=info.dtype).view(info.shape)


def refusal(folder: Path | str, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("shards", [[TENSORS], split(TENSORS)], ids=["file", "sharded"])
def test_reads_names_shapes_dtypes_and_places(tmp_path, shards):
    checkpoint = open_checkpoint(write(tmp_path, *shards))
    assert checkpoint.config == {"model_type": "toy"}
    assert checkpoint.config_folder == tmp_path
    assert {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }
    for name in ("a.weight", "a.bias", "b"):
        assert torch.equal(contents(checkpoint, name), TENSORS[name])


def test_a_single_file_stands_over_an_index(tmp_path):
    write(tmp_path, {"x": torch.ones(2)}, {"y": torch.ones(2)})
    write(tmp_path, {"z": torch.ones(2)})
    assert list(open_checkpoint(tmp_path).tensors) == ["z"]


@pytest.mark.parametrize("name", ["./nothing", "/no/where", "a/b/c", "has space", "."])
def test_names_the_folder_that_does_not_exist(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == ".":
        assert ". has no config.json" in refusal(name)
    else:
        assert f"{name} does not exist; expected a folder with config.json" in refusal(name)


@pytest.mark.parametrize("name", [None, 3, b"folder", ""])
def test_no_name_at_all(name):
    with pytest.raises(ValueError, match="expected a folder or a hub id such as Qwen/") as caught:
        open_checkpoint(name)
    assert f"model_id is {name!r}, " in str(caught.value)


def test_a_file_is_not_a_folder(tmp_path):
    path = write(tmp_path, TENSORS) / WEIGHTS
    assert f"{path} is a file, not a folder" in refusal(path)


def test_no_config(tmp_path):
    (write(tmp_path, TENSORS) / "config.json").unlink()
    assert f"{tmp_path} has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_config_that_is_not_an_object(tmp_path, text):
    (write(tmp_path, TENSORS) / "config.json").write_text(text, encoding="latin1")
    assert f"{tmp_path / 'config.json'} is not" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_not_read_and_how_to_convert_them(tmp_path, name):
    (write(tmp_path, TENSORS) / WEIGHTS).rename(tmp_path / name)
    message = refusal(tmp_path)
    assert name in message and "unpickling runs code" in message and "save_pretrained" in message


def test_gguf_is_refused_by_name(tmp_path):
    (write(tmp_path, TENSORS) / WEIGHTS).rename(tmp_path / "model-Q4_K_M.gguf")
    assert "GGUF, llama.cpp's format, is not supported" in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "GGUF" in refusal(tmp_path)
    assert "GGUF" in refusal(tmp_path / "model-Q4_K_M.gguf")


def test_no_weights_at_all(tmp_path):
    (write(tmp_path, TENSORS) / WEIGHTS).rename(tmp_path / "consolidated.safetensors")
    message = refusal(tmp_path)
    assert f"has neither {WEIGHTS} nor {INDEX}; it has consolidated.safetensors" in message


def test_names_the_missing_shards_and_their_tensors(tmp_path):
    write(tmp_path, *split(TENSORS))
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    message = refusal(tmp_path)
    assert f"lacks 1 of the 4 files that {INDEX} names" in message
    assert "model-00002-of-00004.safetensors (a.bias)" in message


@pytest.mark.parametrize(
    "index, message",
    [
        ("{", " is not JSON: "),
        ("{}", ": weight_map is None, expected a table of tensor names to files"),
        ('{"weight_map": []}', ": weight_map is [], expected a table"),
        ('{"weight_map": {"x": 3}}', ": weight_map has x in 3, expected the name of a file"),
        ('{"weight_map": {"x": "../y"}}', ": weight_map has x in '../y', expected"),
        ('{"weight_map": {"x": ""}}', ": weight_map has x in '', expected"),
    ],
)
def test_malformed_index(tmp_path, index, message):
    (write(tmp_path, *split(TENSORS)) / INDEX).write_text(index)
    assert refusal(tmp_path).startswith(f"{tmp_path / INDEX}{message}")


def test_index_that_names_a_tensor_its_file_lacks(tmp_path):
    write(tmp_path, *split(TENSORS))
    save_file({"other": torch.ones(1)}, tmp_path / "model-00002-of-00004.safetensors")
    message = refusal(tmp_path)
    assert f"{INDEX} and model-00002-of-00004.safetensors disagree" in message
    assert "the file lacks a.bias; the index lacks other" in message


def damaged(tmp_path: Path, damage: Callable[[bytes], bytes]) -> str:
    path = write(tmp_path, TENSORS) / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(tmp_path)
    assert message.startswith(str(path))
    return message


def with_header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def damage(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        changed = change(header)
        text = json.dumps(changed if isinstance(changed, list) else header).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return damage


def test_truncated_file_names_a_tensor_that_is_cut(tmp_path):
    message = damaged(tmp_path, lambda raw: raw[:-10])
    assert "the file is truncated" in message and "tensors are not whole, such as" in message


def test_file_that_ends_within_its_header(tmp_path):
    assert "truncated or not in the safetensors format" in damaged(tmp_path, lambda raw: raw[:40])


@pytest.mark.parametrize("raw", [b"", b"\x01", b"PK\x03\x04" + 100 * b"\x7f"])
def test_not_a_safetensors_file(tmp_path, raw):
    assert "truncated or not in the safetensors format" in damaged(tmp_path, lambda _: raw)


def test_a_git_lfs_pointer_is_not_weights(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    message = damaged(tmp_path, lambda _: pointer)
    assert "(63 bytes) is a git-LFS pointer: get the file itself with `hf download`" in message
    (tmp_path / "config.json").write_bytes(pointer)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'config.json'} is a git-LFS pointer: get")


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html>\n<html><body>404", b"\n <html>Not Found</html>"]
)
def test_a_web_page_is_not_weights(tmp_path, page):
    message = damaged(tmp_path, lambda _: page)
    assert f"({len(page)} bytes) is a web page: get the file itself with" in message


def test_bytes_behind_the_last_tensor(tmp_path):
    assert "the file has bytes of no tensor" in damaged(tmp_path, lambda raw: raw + b"\0")


def test_header_that_is_not_json(tmp_path):
    assert "the header is not JSON" in damaged(tmp_path, lambda raw: raw[:8] + b"!" + raw[9:])


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda h: h["a.bias"].update(shape=[4]), "a.bias [4] of BF16 takes 8 bytes"),
        (lambda h: h["a.bias"].update(shape=[-3]), "entry of a.bias is malformed"),
        (lambda h: h["a.bias"].update(shape="3"), "entry of a.bias is malformed"),
        (lambda h: h["a.bias"].pop("dtype"), "entry of a.bias is malformed"),
        (lambda h: h["a.bias"].update(data_offsets=[0]), "entry of a.bias is malformed"),
        (lambda h: h["a.bias"].update(dtype="F7"), "a.bias has dtype F7, expected one of F64"),
        (lambda h: h["b"].update(data_offsets=h["b"]["data_offsets"][:1] * 2), "b [] of I64"),
        (lambda h: h.pop("a.weight"), "leaves a hole"),
        (lambda h: [h], "the header is not a JSON object"),
    ],
)
def test_header_that_contradicts_itself(tmp_path, change, expected):
    assert expected in damaged(tmp_path, with_header(change))


def test_tensors_that_overlap(tmp_path):
    def change(header):
        start = header["a.weight"]["data_offsets"][0]
        header["c"] = {"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]}

    message = damaged(tmp_path, with_header(change))
    assert "overlaps the tensor before it" in message


def test_unreadable_file(tmp_path):
    (write(tmp_path, TENSORS) / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).mkdir()
    assert f"{tmp_path / WEIGHTS} cannot be read" in refusal(tmp_path)


def test_a_file_that_changed_since_it_was_opened(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, TENSORS))
    write(tmp_path, TENSORS | {"a.bias": torch.zeros(5)})
    with pytest.raises(CheckpointError, match="the file changed, load again"):
        checkpoint.fetch(["a.bias"])


def test_fingerprint_is_of_the_content_and_not_of_the_place_or_the_shards(tmp_path):
    def fingerprint(name, *shards):
        return open_checkpoint(write(tmp_path / name, *shards)).fingerprint()

    first = fingerprint("first", TENSORS)
    assert fingerprint("moved", TENSORS) == first
    assert fingerprint("sharded", *split(TENSORS)) == first
    (tmp_path / "moved" / "README.md").write_text("What is said about it is not what it says.")
    assert fingerprint("moved", TENSORS) == first


@pytest.mark.parametrize(
    "change",
    [
        {"a.weight": TENSORS["a.weight"] + 1},
        {"a.weight": TENSORS["a.weight"].view(4, 3)},
        {"a.weight": TENSORS["a.weight"].view(torch.int32)},
        {"large": torch.arange(100_000) + 1},
        {"another": torch.ones(1)},
    ],
)
def test_fingerprint_tells_other_weights(tmp_path, change):
    tensors = TENSORS | {"large": torch.arange(100_000)}
    first = open_checkpoint(write(tmp_path, tensors)).fingerprint()
    assert open_checkpoint(write(tmp_path, tensors | change)).fingerprint() != first


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_fingerprint_tells_another_config_or_tokenizer(tmp_path, file):
    first = open_checkpoint(write(tmp_path, TENSORS)).fingerprint()
    (tmp_path / file).write_text('{"model_type": "other"}')
    assert open_checkpoint(tmp_path).fingerprint() != first


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the hub with one sharded repository."""
    folder = write(tmp_path / "served", *split(TENSORS))
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    with serve(Hub("some/model", folder)) as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, Path]:
    return {"cache_dir": tmp_path / "cache"}


def test_headers_come_from_the_hub_without_the_weights(hub, cache):
    checkpoint = open_checkpoint("some/model", **cache)
    assert checkpoint.config == {"model_type": "toy"}
    assert {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }
    assert hub.downloads() == {"config.json", INDEX}


def test_headers_of_a_single_file_come_from_the_hub_without_the_weights(hub, cache):
    for path in hub.folder.glob("model*"):
        path.unlink()
    write(hub.folder, TENSORS)
    checkpoint = open_checkpoint("some/model", **cache)
    assert checkpoint.tensors.keys() == TENSORS.keys()
    assert hub.downloads() == {"config.json"}
    assert torch.equal(contents(checkpoint, "a.weight"), TENSORS["a.weight"])


def test_downloads_only_the_files_of_the_tensors_asked_for(hub, cache):
    checkpoint = open_checkpoint("some/model", **cache)
    files = {checkpoint.tensors[name].file for name in ("a.weight", "b")}
    assert torch.equal(contents(checkpoint, "a.weight"), TENSORS["a.weight"])
    assert torch.equal(contents(checkpoint, "b"), TENSORS["b"])
    assert hub.downloads() == {"config.json", INDEX} | files
    asked = len(hub.requests)
    contents(checkpoint, "b")
    assert len(hub.requests) == asked


def test_generation_config_is_downloaded_when_it_is_needed(hub, cache):
    checkpoint = open_checkpoint("some/model", **cache)
    assert (checkpoint.config_folder / "generation_config.json").read_text() == '{"top_k": 3}'


def test_the_cache_serves_without_the_hub(hub, cache):
    open_checkpoint("some/model", **cache).fetch(TENSORS)
    asked = len(hub.requests)
    checkpoint = open_checkpoint("some/model", **cache, local_files_only=True)
    assert torch.equal(contents(checkpoint, "a.weight"), TENSORS["a.weight"])
    assert len(hub.requests) == asked


def test_says_which_shards_the_cache_lacks(hub, cache):
    open_checkpoint("some/model", **cache).fetch(["a.weight", "a.bias", "b"])
    message = refusal("some/model", **cache, local_files_only=True)
    assert "some/model as cached on this machine lacks 1 of the 4 files" in message
    assert "(empty)" in message


def test_local_files_only_with_nothing_in_the_cache(hub, cache):
    message = refusal("some/model", **cache, local_files_only=True)
    assert "its config.json is not in the hub's cache here, and local_files_only is set" in message
    assert hub.requests == []


def test_offline_mode_serves_what_the_cache_has(hub, cache, monkeypatch):
    open_checkpoint("some/model", **cache).fetch(TENSORS)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    checkpoint = open_checkpoint("some/model", **cache)
    assert torch.equal(contents(checkpoint, "b"), TENSORS["b"])


def test_offline_mode_with_nothing_in_the_cache(hub, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "and the hub cannot be reached" in refusal("some/model", **cache)


def test_repository_that_does_not_exist(hub, cache):
    message = refusal("some/other", **cache)
    assert "some/other is neither a folder here nor a repository that the hub shows" in message
    assert "token=" in message


def test_private_repository_opens_with_a_token(hub, cache):
    hub.token = "hf_secret"
    assert "if it is private, pass token=" in refusal("some/model", **cache)
    assert open_checkpoint("some/model", **cache, token="hf_secret").tensors


def test_gated_repository(hub, cache):
    hub.gated = True
    assert "some/model is gated: accept its terms" in refusal("some/model", **cache)


def test_revision(hub, cache):
    assert open_checkpoint("some/model", **cache, revision=COMMIT).tensors
    assert "some/model has no revision v9" in refusal("some/model", **cache, revision="v9")


def test_fingerprint_of_a_repository_is_its_commit_and_reads_no_weights(hub, cache):
    checkpoint = open_checkpoint("some/model", **cache)
    assert checkpoint.fingerprint() == COMMIT
    assert hub.downloads() == {"config.json", INDEX}


def test_repository_without_a_config(hub, cache):
    (hub.folder / "config.json").unlink()
    message = refusal("some/model", **cache)
    assert message.endswith("some/model has no config.json at revision main")


def test_repository_with_pickles_only(hub, cache):
    for path in hub.folder.glob("model*"):
        path.unlink()
    (hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert "some/model has only pickled weights (pytorch_model.bin)" in refusal(
        "some/model", **cache
    )
    assert "pytorch_model.bin" not in {file for _, file, _ in hub.requests}


def test_repository_that_lacks_a_shard(hub, cache):
    (hub.folder / "model-00003-of-00004.safetensors").unlink()
    assert "model-00003-of-00004.safetensors (b)" in refusal("some/model", **cache)


def test_header_on_the_hub_that_is_not_one(hub, cache):
    (hub.folder / "model-00003-of-00004.safetensors").write_bytes(100 * b"\x7f")
    message = refusal("some/model", **cache)
    assert "some/model: model-00003-of-00004.safetensors cannot be read" in message


def test_a_truncated_file_on_the_hub_is_found_when_it_is_downloaded(hub, cache):
    path = hub.folder / "model-00001-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    checkpoint = open_checkpoint("some/model", **cache)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00004.*the file is truncated"):
        checkpoint.fetch(["a.weight"])


@pytest.mark.parametrize("progress", [True, False])
def test_bars_of_downloads_show_only_when_asked_for(hub, cache, monkeypatch, progress):
    bars = []

    def download(*args, tqdm_class, **options):
        bars.append(tqdm_class)
        return huggingface_hub.hf_hub_download(*args, **options)

    checkpoint = open_checkpoint("some/model", **cache)
    monkeypatch.setattr("moezoo.loaders.sources.hf_hub_download", download)
    checkpoint.fetch(["a.weight"], progress=progress)
    assert bars == [None] if progress else bars[0](total=3).disable


def test_reads_many_headers_at_once_in_any_order(tmp_path):
    shards = [{f"t{n}": torch.full((n + 1,), float(n))} for n in range(40)]
    checkpoint = open_checkpoint(write(tmp_path, *shards))
    assert threading.active_count() < 30
    for n in (0, 17, 39):
        assert torch.equal(contents(checkpoint, f"t{n}"), torch.full((n + 1,), float(n)))


def test_header_is_read_without_the_data(tmp_path):
    path = write(tmp_path, TENSORS) / WEIGHTS
    start, tensors = read_header(path)
    assert start + sum(tensor.nbytes for tensor in tensors.values()) == path.stat().st_size
