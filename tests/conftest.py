"""Settings for every test: one thread, no gpu tests without a GPU, NaN in fresh buffers."""

import os
import zlib
from collections.abc import Iterator

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
    left_out = [item for item in items if "gpu" not in item.keywords and is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    left_out_ids = {item.nodeid for item in left_out}
    items[:] = [item for item in items if item.nodeid not in left_out_ids]
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(no_gpu)


def is_left_out(item: pytest.Item) -> bool:
    """Whether a test of which one case in `n` runs on a CPU leaves this one to the GPU."""
    sampled = item.get_closest_marker("sampled")
    return sampled is not None and zlib.crc32(item.name.encode()) % sampled.kwargs["n"] > 0


@pytest.fixture(autouse=True)
def nan_filled_buffers(request: pytest.FixtureRequest) -> Iterator[None]:
    """`torch.empty` gives NaN, so that memory nobody wrote cannot pass for a result (CPU tests)."""
    if "gpu" in request.keywords:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
