"""Models divided over ranks, against the same model in one process."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import CONFIGURATIONS, GPT_OSS, reference
from hub_stand_in import Hub, serve
from hub_writers import gptq
from huggingface_hub import constants
from ranks import results
from safetensors.torch import load_file, save_file
from small_models import MODELS, ids, load, moe_layers, plain, theirs
from test_hub_formats import gptq_config
from test_hub_formats import write as write_hub
from test_oracle import write
from tolerances import relative_difference
from torch import Tensor
from transformers import AutoConfig

import moezoo
from moezoo import Parallel
from moezoo.errors import RankError
from moezoo.layers.quant import QuantizedWeights
from moezoo.loaders import stream
from moezoo.parallel.placement import Placement
from moezoo.parallel.sharding import step_without_tokens

RANKS = 3
EXACT, ROUNDED = 1e-5, 4e-2
"""In relation to the largest logit: fp32, where sums come in another order, and bf16, where another
rounding is a step of fp8 in the next layer at times."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in ("deepseek_v3", "qwen3_moe", "mixtral"):
        found[name] = tmp_path_factory.mktemp(name)
        plain(name).save_pretrained(found[name])
    return found


def placement_file(folder: Path, num_ranks: int) -> str:
    """Eight experts and some replicas, other ones in each of the layers 1 and 2."""
    num_redundant = -8 % num_ranks + num_ranks
    torch.manual_seed(5)
    rows = [
        torch.cat((torch.arange(8), torch.randint(8, (num_redundant,))))[
            torch.randperm(8 + num_redundant)
        ]
        for _ in range(2)
    ]
    Placement(8, num_ranks, (1, 2), torch.stack(rows)).save(folder / f"of-{num_ranks}.json")
    return str(folder / f"of-{num_ranks}.json")


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def prompt(rank: int) -> Tensor:
    """Of other lengths on each rank."""
    return ids(rank + 1, 5 + 2 * rank)


def work(rank: int, folder: Path, cases: list[dict[str, Any]]) -> list[list[Tensor]]:
    found = []
    for case in cases:
        case = dict(case)
        options = case.pop("load", {})
        model = load(folder, parallel=Parallel(**case), **options)
        same = case.get("dispatch") == "all_gather"
        outputs = [logits(model, prompt(1 if same else rank))]
        # Then a step in which this rank, or all but the first, have nothing to do.
        if not same:
            if rank == 0:
                outputs.append(logits(model, prompt(0)))
            else:
                with torch.no_grad():
                    step_without_tokens(model.decoder)
        found.append(outputs)
    return found


def check(
    folder: Path, cases: list[dict[str, Any]], num_ranks: int, tolerance: float = EXACT
) -> None:
    by_rank = results(num_ranks, work, folder, cases)
    for i, case in enumerate(cases):
        whole = load(folder, **case.get("load", {}))
        for rank in range(num_ranks):
            same = case.get("dispatch") == "all_gather"
            expected = logits(whole, prompt(1 if same else rank))
            for output in by_rank[rank][i]:
                assert relative_difference(output, expected) < tolerance, (case, rank)


def test_logits_are_those_of_one_process(folders: dict[str, Path], tmp_path: Path) -> None:
    size = {"expert_parallel_size": RANKS}
    file = placement_file(tmp_path, RANKS)
    cases = [
        size,
        size | {"placement": "round_robin", "chunks": 2},
        size | {"placement": [[7, 0], [], [1, 2, 3, 4, 5, 6]]},
        size | {"placement": file},
        size | {"placement": file, "capacity": 30},
        size | {"placement": file, "dispatch": "all_gather"},
        size | {"dispatch": "all_gather", "chunks": 3},
        size | {"capacity": 27},
    ]
    check(folders["deepseek_v3"], cases, RANKS)


def test_more_ranks_than_experts_and_groups_of_ranks(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    check(
        folders["mixtral"],
        [
            {"expert_parallel_size": 5},
            {"expert_parallel_size": 5, "placement": "round_robin", "dispatch": "all_gather"},
            {"expert_parallel_size": 5, "load": {"quantization": "int4_w4a16"}},
            {"expert_parallel_size": 1},
        ],
        5,
    )
    file = placement_file(tmp_path, 2)
    check(
        folders["deepseek_v3"],
        [{"expert_parallel_size": 2}, {"expert_parallel_size": 2, "placement": file}],
        4,
    )


def test_logits_are_those_of_transformers(folders: dict[str, Path]) -> None:
    by_rank = results(2, work, folders["qwen3_moe"], [{"expert_parallel_size": 2}])
    expected = theirs(folders["qwen3_moe"])
    for rank, ((output, *_),) in enumerate(by_rank):
        assert relative_difference(output, logits(expected, prompt(rank))) < EXACT


def test_quantised(folders: dict[str, Path], tmp_path: Path) -> None:
    """While they load, and as hub checkpoints have them, where placements have replicas."""
    size = {"expert_parallel_size": RANKS, "placement": placement_file(tmp_path, RANKS)}
    kinds: list[Any] = ["fp8_w8a8", "int4_w4a16", "int8_w8a16", "mxfp4"]
    cases = [size | {"load": {"quantization": kind}} for kind in kinds]
    cases.append(cases[0] | {"wire": "fp8", "chunks": 2})
    cases.append(cases[0] | {"wire": "fp8", "capacity": 30})
    check(folders["deepseek_v3"], cases, RANKS)
    some = (cases[0], cases[1], cases[-1])
    bf16 = [case | {"load": case["load"] | {"dtype": "bfloat16"}} for case in some]
    check(folders["deepseek_v3"], bf16, RANKS, ROUNDED)
    for kind in kinds[:2]:
        saved = tmp_path / kind
        load(folders["deepseek_v3"], quantization=kind).save_pretrained(saved)
        check(saved, [size], RANKS)


def test_stacked_experts_with_biases(tmp_path: Path) -> None:
    """gpt-oss: all experts of a layer in one tensor, as they are and in mxfp4."""
    config = GPT_OSS | {"hidden_size": 64, "intermediate_size": 64}
    reference("gpt_oss", config).save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", quantization="mxfp4").save_pretrained(tmp_path / "mxfp4")
    size = {"expert_parallel_size": RANKS}
    for folder in ("plain", "mxfp4"):
        check(tmp_path / folder, [size, size | {"placement": [[4, 1], [0], [3, 2]]}], RANKS)


@pytest.mark.parametrize("model_type", ["cohere2_moe", "dbrx", "llama4_text", "longcat_flash"])
def test_mixtures_of_their_own(model_type: str, tmp_path: Path) -> None:
    """A mean with the shared experts, stacks of 2-D, scaled inputs of two experts, experts that do
    nothing."""
    cases = {"cohere2_moe": "dense-first-sigmoid", "llama4_text": "tempered-dense-k2"}
    known = CONFIGURATIONS[model_type]
    write(
        model_type, reference(model_type, known[cases.get(model_type, next(iter(known)))]), tmp_path
    )
    size = {"expert_parallel_size": RANKS}
    check(tmp_path, [size, size | {"dispatch": "all_gather", "placement": "round_robin"}], RANKS)


def read_work(rank: int, folder: Path, case: dict[str, Any]) -> tuple[int, int, list[int]]:
    """Bytes read, bytes held in experts, and the rows of each layer."""
    read = 0
    real = stream.os.preadv

    def counting(file: int, buffers: Any, offset: int) -> int:
        nonlocal read
        count = real(file, buffers, offset)
        read += count
        return count

    stream.os.preadv = counting
    options = case.pop("load", {})
    model = load(folder, parallel=Parallel(**case), **options)
    held = sum(
        tensor.nbytes
        for moe in moe_layers(model)
        for w in (moe.w13, moe.w2)
        for tensor in (w.parameters() if isinstance(w, QuantizedWeights) else [w])
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())
    return read, held, [len(moe.w2.data) for moe in moe_layers(model)]


@pytest.mark.parametrize("stored", ["per expert", "stacked", "fp8_w8a8"])
def test_a_rank_reads_its_experts_only(
    stored: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(folders["deepseek_v3"], quantization="fp8_w8a8" if stored == "fp8_w8a8" else None)
    whole = sum(w.nbytes for w in model.state_dict().values())
    in_experts = sum(
        tensor.nbytes
        for name, tensor in model.state_dict().items()
        if ".mlp.w13" in name or ".mlp.w2" in name
    )
    folder = folders["deepseek_v3"]
    if stored == "fp8_w8a8":
        folder = tmp_path
        model.save_pretrained(folder)
    elif stored == "stacked":
        folder = tmp_path
        stacked(folders["deepseek_v3"], folder)
    of_one = in_experts // 16  # two layers of eight experts
    placement = [[7, 2, 0], [], [1, 3, 4, 5, 6]]
    case = {"expert_parallel_size": RANKS, "placement": placement}
    shares = moezoo.inspect(folder, **case).ranks
    for rank, (read, held, rows) in enumerate(results(RANKS, read_work, folder, case)):
        count = len(placement[rank])
        assert shares[rank].rank == rank and shares[rank].experts == 2 * count
        assert shares[rank].read_bytes == read
        assert shares[rank].weight_bytes == whole - in_experts + held
        assert rows == [count, count]
        assert held == 2 * count * of_one
        assert read == whole - in_experts + held


def stacked(source: Path, folder: Path) -> None:
    """The checkpoint with all experts of a layer in one tensor."""
    tensors = load_file(source / "model.safetensors")
    layers = {name.split(".")[2] for name in tensors if ".experts." in name}
    for layer in layers:
        start = f"model.layers.{layer}.mlp.experts"
        parts: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
        for e in range(8):
            gate, up, down = (
                tensors.pop(f"{start}.{e}.{name}_proj.weight") for name in ("gate", "up", "down")
            )
            parts["gate_up_proj"].append(torch.cat((gate, up)))
            parts["down_proj"].append(down)
        tensors |= {f"{start}.{name}": torch.stack(part) for name, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())


def random_work(rank: int, options: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(3 + 10 * rank)  # that of rank 0 counts
    model = moezoo.from_config(
        AutoConfig.for_model("deepseek_v3", **MODELS["deepseek_v3"]),
        device="cpu",
        parallel=Parallel(**parallel),
        **options,
    )
    return model.decoder.state_dict()


@pytest.mark.parametrize("quantization", [None, "fp8_w8a8"])
def test_random_weights_are_those_of_one_process(quantization: str | None) -> None:
    options = {"quantization": quantization}
    torch.manual_seed(3)
    config = AutoConfig.for_model("deepseek_v3", **MODELS["deepseek_v3"])
    whole = moezoo.from_config(config, device="cpu", **options).decoder.state_dict()
    placement = [[7, 2, 0], [1, 3, 4, 5, 6]]
    parallel = {"expert_parallel_size": 2, "placement": placement}
    for rank, state in enumerate(results(2, random_work, options, parallel)):
        assert state.keys() == whole.keys()
        for name, tensor in state.items():
            expected = whole[name]
            if ".mlp.w13" in name or ".mlp.w2" in name:
                expected = expected[placement[rank]]
            assert tensor.view(torch.uint8).equal(expected.view(torch.uint8)), (name, rank)
    # Seeded otherwise they are others, and so they are the second time.
    again = moezoo.from_config(config, device="cpu", **options).decoder.state_dict()
    assert not again["layers.0.attn.o.weight"].equal(whole["layers.0.attn.o.weight"])
    assert not whole["layers.1.mlp.gate"].equal(whole["layers.2.mlp.gate"])


def saving(rank: int, folder: Path, cases: list[dict[str, Any]], target: Path) -> None:
    for i, case in enumerate(cases):
        options = dict(case)
        load_options = options.pop("load", {})
        of = options.pop("folder", folder)
        model = load(of, parallel=Parallel(**options), **load_options)
        model.save_pretrained(target / str(i), max_shard_size="30KB")
        logits(model, prompt(1))  # it still runs
    if rank == 0:
        (target / "no folder").write_text("")
    with pytest.raises(OSError if rank == 0 else RankError, match="no folder"):
        model.save_pretrained(target / "no folder")
    model.save_pretrained(target / "again", max_shard_size="30KB")
    model = load(folder, parallel=Parallel(**cases[-1]), quantization="int4_w4a16")
    with pytest.raises(ValueError, match="rank 0 has no experts in some layers, and does not"):
        model.save_pretrained(target / "x")


def test_saved_as_one_process_saves(folders: dict[str, Path], tmp_path: Path) -> None:
    """Bit for bit, copies of experts left out."""

    def how(module: str) -> Any:
        # Of experts, GPTQ moved the columns of the last one alone, which the last rank has.
        return partial(gptq, desc_act="experts" not in module or "experts.4" in module)

    hub, _ = write_hub(tmp_path / "gptq", how, gptq_config(desc_act=True), by_name=True)
    size = {"expert_parallel_size": RANKS}
    cases = [
        size | {"folder": hub},
        size
        | {"placement": placement_file(tmp_path, RANKS)}
        | {"load": {"quantization": "fp8_w8a8", "dtype": "bfloat16"}},
        size | {"load": {"quantization": "int4_w4a16"}, "dispatch": "all_gather"},
        size | {"placement": [[], [7, 0, 2], [1, 3, 4, 5, 6]]},
    ]
    results(RANKS, saving, folders["deepseek_v3"], cases, tmp_path)
    for i, case in enumerate(cases):
        expected = tmp_path / f"{i} of one"
        one = load(case.get("folder", folders["deepseek_v3"]), **case.get("load", {}))
        one.save_pretrained(expected, max_shard_size="30KB")
        files = {path.name: path.read_bytes() for path in expected.iterdir()}
        assert len(files) > 3
        assert files == {path.name: path.read_bytes() for path in (tmp_path / str(i)).iterdir()}
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again == files  # those of the last case


def hub_work(rank: int, endpoint: str, cache: Path) -> set[str]:
    """The files that this rank has downloaded."""
    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_OFFLINE, constants.HF_TOKEN_PATH = False, str(cache / "no token")
    cache = cache / str(rank)  # as on another host
    load(Path("some/moe"), parallel=Parallel(2), cache_dir=cache)
    return {path.name for path in cache.rglob("*.safetensors")}


def test_a_rank_downloads_the_files_of_its_experts_only(tmp_path: Path) -> None:
    """Each expert in a file of its own, and the rest in another."""
    folder = tmp_path / "model"
    plain("mixtral").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        expert = re.search(r"experts\.(\d+)", name)
        file = f"expert-{expert[1]}.safetensors" if expert else "rest.safetensors"
        files.setdefault(file, {})[name] = tensor
    for file, some in files.items():
        save_file(some, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, some in files.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shares = moezoo.inspect(folder, expert_parallel_size=2).ranks
    with serve(Hub("some/moe", folder)) as hub:
        for rank, found in enumerate(results(2, hub_work, hub.endpoint, tmp_path)):
            own = {f"expert-{expert}.safetensors" for expert in (2 * rank, 2 * rank + 1)}
            assert found == {"rest.safetensors"} | own
            sizes = (tensor.nbytes for file in found for tensor in files[file].values())
            assert shares[rank].download_bytes == sum(sizes)
