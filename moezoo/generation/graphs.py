"""CUDA graphs of a decoder's passes: which passes become one, and how it is recorded."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from moezoo.generation.turns import smallest
from moezoo.layers.decoder import Decoder
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.moe import RoutingRecorder
from moezoo.layers.norm import is_hooked

BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Steps are made for so many rows; rows without a sequence fill them up."""

GRAPH_TOKENS = 2048
"""Prompt tokens of a forward pass up to which it becomes a CUDA graph."""


def batch_size(rows: int) -> int:
    """For how many rows a step is made that has at least so many."""
    return next((size for size in BATCH_SIZES if size >= rows), rows)


def capturable(decoder: nn.Module) -> bool:
    """Whether a recorded step would do what the modules do when they are called."""
    return not any(
        is_hooked(module)
        or (isinstance(module, SequenceMixer | RoutingRecorder) and module.prevents_capture)
        for module in decoder.modules()
    )


def captures_steps(decoder: Decoder) -> bool:
    """Whether steps are CUDA graphs, which they are on all ranks or on none."""
    (captures,) = smallest(decoder, decoder.embed.weight.is_cuda and capturable(decoder))
    return bool(captures)


def record(decoder: Decoder, run: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
    """A CUDA graph of `run`, and the memory where it leaves its result; graphs may share a pool."""
    with unrecorded(decoder):
        run()  # compiles kernels, which a capture must not
    device = decoder.embed.weight.device
    graph = torch.cuda.CUDAGraph()
    capture = torch.cuda.graph(
        graph,
        pool=pool,
        stream=_capture_stream(device),
        # Other threads and the garbage collector may free memory meanwhile.
        capture_error_mode="relaxed",
    )
    with torch.cuda.device(device), capture:
        result = run()
    return graph, result


@contextmanager
def unrecorded(decoder: Decoder) -> Iterator[None]:
    """For passes that do nobody's work."""
    with ExitStack() as stack:
        for counter in (decoder.recorder, decoder.balancer):
            if counter is not None:
                stack.enter_context(counter.undone())
        yield


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """torch has one for all devices, on that which is current at the first capture."""
    return torch.cuda.Stream(device)
