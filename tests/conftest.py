"""Settings for every test: one thread, no gpu tests without a GPU, NaN in fresh buffers."""

import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Triton looks once, when it is first imported: kernel tests run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
hypothesis.settings.register_profile("moezoo", deadline=None, derandomize=True)
hypothesis.settings.load_profile("moezoo")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = left_to_gpu([item for item in items if "gpu" not in item.keywords])
    config.hook.pytest_deselected(items=left_out)
    left_out_ids = {item.nodeid for item in left_out}
    items[:] = [item for item in items if item.nodeid not in left_out_ids]
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(no_gpu)


def left_to_gpu(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of `sampled` tests, the cases that a CPU leaves out.

    It runs one in `n`, and those with a value of a parameter that none of these has, or with what
    `by` makes of it. bf16 does not count: the interpreter does not multiply it.
    """
    left_out: list[tuple[pytest.Item, set[tuple[str, str, str]]]] = []
    seen: set[tuple[str, str, str]] = set()
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is None:
            continue
        values = values_of(item, sampled.kwargs.get("by", repr))
        if zlib.crc32(item.name.encode()) % sampled.kwargs["n"]:
            left_out.append((item, values))
        else:
            seen |= values
    still_out = []
    for item, values in left_out:
        if values <= seen:
            still_out.append(item)
        seen |= values
    return still_out


def values_of(item: pytest.Item, by: Callable[[Any], str]) -> set[tuple[str, str, str]]:
    """A case's test with each of its parameters and what it is."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or torch.bfloat16 in callspec.params.values():
        return set()
    test = item.nodeid.partition("[")[0]
    return {(test, name, by(value)) for name, value in callspec.params.items()}


@pytest.fixture(autouse=True)
def nan_filled_buffers(request: pytest.FixtureRequest) -> Iterator[None]:
    """`torch.empty` gives NaN, so that memory nobody wrote cannot pass for a result (CPU tests)."""
    if "gpu" in request.keywords:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
