"""Ranks that find each other, compare what they are asked for, and notice who is gone."""

import dataclasses
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import die, results, run
from small_models import load, plain

from moezoo import Parallel
from moezoo.errors import CheckpointError, ExpertMapError, RankError
from moezoo.parallel.faults import RankWatch
from moezoo.parallel.mesh import join

TIMEOUT = 8.0
"""Seconds: a busy machine may let a process wait for half of that."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_parallel_size": 0}, "expert_parallel_size is 0, expected a whole number above 0"),
        ({"expert_parallel_size": True}, "expert_parallel_size is True"),
        ({"chunks": 0}, "chunks is 0"),
        ({"capacity": 1.5}, "capacity is 1.5"),
        ({"dispatch": "nccl"}, "dispatch is 'nccl', expected 'all_to_all' or 'all_gather'"),
        ({"wire": "int8"}, "wire is 'int8', expected 'model' or 'fp8'"),
        ({"placement": None}, "placement is None, expected 'linear' or 'round_robin', a list of"),
        ({"placement": 3}, "placement is 3, expected 'linear' or"),
        ({"placement": [[0, "1"]]}, r"placement is \[\[0, '1'\]\], expected"),
        ({"timeout": 0}, "timeout is 0, expected seconds above 0"),
        ({"dispatch": "all_gather", "capacity": 8}, "capacity=8 is for dispatch='all_to_all'"),
        ({"dispatch": "all_gather", "wire": "fp8"}, "wire='fp8' is for dispatch='all_to_all'"),
        ({"capacity": 8, "chunks": 2}, "capacity and chunks exclude each other"),
        ({"all2all_backend": "deepep"}, "all2all_backend='deepep' is not in this release"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parallel(**{"expert_parallel_size": 2} | options)


def test_parallel_is_frozen_and_has_a_hash() -> None:
    parallel = Parallel(2, placement=[[0, 1], [2]])
    assert parallel.placement == ((0, 1), (2,)) and hash(parallel) == hash(
        Parallel(2, placement=((0, 1), (2,)))
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        parallel.chunks = 2  # type: ignore[misc]
    assert (Parallel(2, placement="p.json").placement_file, parallel.placement_file) == (
        "p.json",
        None,
    )


def test_alone_without_torchrun() -> None:
    with pytest.raises(ExpertMapError, match="is 8, and there is 1 process: start them with torch"):
        join(Parallel(8), "cpu")
    assert not dist.is_initialized()


def groups_of_two(rank: int) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))  # as the user did before
    for size in (2, 4, 1):
        mesh = join(Parallel(size, timeout=20), "cpu")
        first = rank - rank % size
        assert list(mesh.group_ranks) == list(range(first, first + size))
        assert (mesh.ep_rank, mesh.ep_size, mesh.device) == (rank % size, size, torch.device("cpu"))
        assert dist.get_process_group_ranks(mesh.group) == list(mesh.group_ranks)
        total = mesh.all_reduce(torch.tensor([float(rank)]), "adding").wait()
        assert total.item() == sum(mesh.group_ranks)
        gathered = mesh.all_gather(torch.full((2, 3), rank, dtype=torch.int64), "gathering").wait()
        assert gathered[:, 0].tolist() == [r for r in mesh.group_ranks for _ in range(2)]
        # Rank r sends r rows to the first rank, and one to each other.
        place = mesh.ep_rank
        sent = [rank, *[1] * (size - 1)]
        received = list(mesh.group_ranks) if place == 0 else [1] * size
        rows = torch.full((sum(sent), 2), rank, dtype=torch.bfloat16)
        came = mesh.all_to_all(rows, "sending", sent=sent, received=received).wait()
        assert came[:, 1].tolist() == [
            r for r, n in zip(mesh.group_ranks, received, strict=True) for _ in range(n)
        ]
        even = torch.arange(2 * size)[:, None] + 100 * rank
        came = mesh.all_to_all(even, "sending").wait()
        assert came.flatten().tolist() == [
            100 * r + 2 * place + i for r in mesh.group_ranks for i in (0, 1)
        ]


def test_groups_and_collectives() -> None:
    results(4, groups_of_two)


def other_facts(rank: int) -> list[str]:
    messages = []
    for options in (
        {"expert_parallel_size": 2},
        {"expert_parallel_size": 3, "chunks": rank + 1},
        {"expert_parallel_size": 3, "placement": "linear" if rank < 2 else [[0], [1], [2]]},
    ):
        with pytest.raises(ExpertMapError) as caught:
            join(Parallel(**options), "cpu")
        messages.append(str(caught.value))
    torch.__version__ = f"2.{11 if rank < 2 else 10}.0"
    with pytest.raises(ExpertMapError) as caught:
        join(Parallel(3), "cpu")
    return [*messages, str(caught.value)]


def test_ranks_that_were_started_otherwise() -> None:
    for messages in results(3, other_facts):
        for message, part in zip(
            messages,
            (
                "expert_parallel_size is 2, and there are 3 processes",
                "Parallel.chunks is 1 on rank 0 and 2 on rank 1",
                "Parallel.placement is linear on rank 0 and [[0], [1], [2]] on rank 2",
                "torch is 2.11.0 on rank 0 and 2.10.0 on rank 2",
            ),
            strict=True,
        ):
            assert message.startswith("Expert map mismatch: ") and part in message


def other_models(rank: int, folders: list[Path]) -> list[str]:
    messages = []
    for options in (
        {"folder": folders[rank]},
        {"folder": folders[0], "quantization": "fp8_w8a8" if rank else None},
        {"folder": folders[0], "quantization": "int8_w8a16", "parallel": {"wire": "fp8"}},
        {"folder": folders[0], "parallel": {"placement": "nowhere.json"}},
        {"folder": folders[0], "parallel": {"placement": [[0, 1], [2, 9]]}},
    ):
        parallel = Parallel(2, **options.pop("parallel", {}))
        with pytest.raises((ExpertMapError, ValueError, CheckpointError, RankError)) as caught:
            load(options.pop("folder"), parallel=parallel, **options)
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    return messages


def test_models_that_differ(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("mixtral", "qwen3_moe")]
    for folder in folders:
        plain(folder.name).save_pretrained(folder)
    (first, *_), (second, *_) = by_rank = results(2, other_models, folders)
    assert "its tensors (a hash) is" in first and "on rank 0 and" in first and first == second
    for _, quantized, wire, nowhere, experts in by_rank:
        assert "quantization is None on rank 0 and Quantization(type='fp8_w8a8'" in quantized
        assert "wire='fp8' is for experts in fp8_w8a8 in blocks, and these are int8_w8a16" in wire
        assert "placement is 'nowhere.json', expected 'linear' or 'round_robin'" in nowhere
        assert "int8" in wire and "Expert map mismatch" in nowhere
        assert "puts expert 9 on rank 1, and there are experts 0 to 3" in experts


def fault(rank: int, kind: str, folder: Path) -> str | None:
    """The ranks work together until one of them does not."""
    mesh = join(Parallel(3, timeout=TIMEOUT), "cpu")
    begin = time.monotonic()
    try:
        if kind == "dies in a collective":
            for step in range(5):
                if step == 3 and rank == 2:
                    die()
                mesh.all_to_all(torch.zeros(3, 2), "sending tokens").wait()
        elif kind == "stops in a collective":
            for step in range(5):
                if step == 3 and rank == 2:
                    os.kill(os.getpid(), signal.SIGSTOP)
                mesh.all_reduce(torch.zeros(3, 2), "adding").wait()
        elif kind == "does not come":
            if rank == 1:
                time.sleep(100)
            mesh.all_to_all(torch.zeros(3, 2), "sending tokens").wait()
        elif kind == "dies while loading":
            with mesh.together("loading the model"):
                if rank == 1:
                    die()
        elif kind == "fails while loading":
            load(folder if rank else folder / "x", parallel=Parallel(3, timeout=TIMEOUT))
        else:
            assert kind == "is slow to load"
            with mesh.together("loading the model"):
                time.sleep(2 * TIMEOUT if rank == 0 else 0)
            return f"{time.monotonic() - begin > 2 * TIMEOUT}"
    except (RankError, CheckpointError) as error:
        assert time.monotonic() - begin < 3 * TIMEOUT
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dies in a collective", "rank 2 gave no sign of life while sending tokens"),
        ("stops in a collective", "rank 2 gave no sign of life while adding"),
        ("does not come", "rank 1 did not come while sending tokens: rank 1 was last"),
        (
            "dies while loading",
            f"rank 1 gave no sign of life for {TIMEOUT / 2:g} s while the others were",
        ),
        ("fails while loading", "rank 0 failed while"),
        ("is slow to load", "True"),
    ],
)
def test_faults_name_their_rank(kind: str, message: str, tmp_path: Path) -> None:
    plain("mixtral").save_pretrained(tmp_path)
    never = {"stops in a collective": (2,), "does not come": (1,)}.get(kind, ())
    found = run(3, fault, kind, tmp_path, timeout=12 * TIMEOUT, never=never)
    rest = [text for text in found if text is not None]
    if kind == "fails while loading":
        assert rest.pop(0).startswith("CheckpointError")
        assert "CheckpointError" in rest[0]
    assert len(rest) == (3 if kind == "is slow to load" else 2)
    for text in rest:
        assert message in text


def test_a_failure_is_blamed_until_its_rank_goes_on() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    first, second = (RankWatch(store, rank, 2, timeout=1) for rank in range(2))
    second.begins("adding")
    with pytest.raises(OSError), second.reporting_errors():
        raise OSError("the disk is full")
    lost = RuntimeError("lost")
    told = "rank 1 failed, and this one was sending: OSError: the disk is full"
    assert told in str(first.fault("sending", lost))
    second.begins("adding more")
    assert "while sending, with all ranks alive: lost" in str(first.fault("sending", lost))


def kept_waiting(rank: int, kind: str, file: Path) -> str:
    """As on a GPU, where a rank's calls return though another does not come."""
    mesh = join(Parallel(3, timeout=TIMEOUT), "cpu")
    if rank != 2:
        mesh.watch.end_if_kept_waiting(mesh.group_ranks)
    sys.stderr.close()
    sys.stderr = file.with_name(f"{rank}").open("w")
    mesh.numbers([0], "beginning")
    mesh.watch.begins("sending tokens")
    if rank == 2 and kind == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.75 * TIMEOUT)  # a step; then the collective that rank 2 does not come to
    if rank != 2 or kind == "comes late":
        mesh.watch.begins("sending answers")
    time.sleep(3 * TIMEOUT)
    return "lives"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "stops",
            f"rank 2 gave no sign of life for {TIMEOUT / 2:g} s; this rank was sending answers, "
            "and ends",
        ),
        (
            "does not come",
            f"rank 2 did not come within {TIMEOUT:g} s: rank 2 was last sending tokens",
        ),
        ("comes late", None),
    ],
)
def test_a_rank_that_waits_in_vain_on_a_gpu_says_for_whom(
    kind: str, message: str | None, tmp_path: Path
) -> None:
    never = () if message is None else (2,)
    found = run(3, kept_waiting, kind, tmp_path / "x", timeout=12 * TIMEOUT, never=never)
    if message is None:
        assert found == ["lives"] * 3
        return
    assert found == [None] * 3
    for rank in (0, 1):
        assert (tmp_path / f"{rank}").read_text().startswith(f"RankError: {message}")
