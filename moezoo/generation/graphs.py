"""CUDA graphs of a decoder's forward passes: which passes become graphs, and how."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from moezoo.generation.turns import smallest
from moezoo.layers.decoder import Decoder
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.mla import MultiHeadLatentAttention
from moezoo.layers.moe import RoutingRecorder
from moezoo.layers.norm import is_hooked

BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of rows that steps are made for; rows without a sequence pad them."""

GRAPH_TOKENS = 2048
"""Most prompt tokens of a forward pass that becomes a CUDA graph."""


def batch_size(rows: int) -> int:
    """Return the smallest of BATCH_SIZES for so many rows; beyond them the number itself."""
    return next((size for size in BATCH_SIZES if size >= rows), rows)


def capturable(decoder: nn.Module) -> bool:
    """Whether a CUDA graph does what the modules do: none has hooks or works on the host."""
    return not any(
        is_hooked(module)
        or (isinstance(module, SequenceMixer | RoutingRecorder) and module.prevents_capture)
        # A step that expands latents asks the GPU for the longest sequence.
        or (isinstance(module, MultiHeadLatentAttention) and not module.absorbs)
        for module in decoder.modules()
    )


def captures_steps(decoder: Decoder) -> bool:
    """Whether steps become CUDA graphs, on all ranks or on none."""
    (captures,) = smallest(decoder, decoder.embed.weight.is_cuda and capturable(decoder))
    return bool(captures)


def record(decoder: Decoder, run: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
    """Run `run`, and return a CUDA graph of it with the tensors that hold its result.

    Graphs may share a memory pool.
    """
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
    """Return a context whose forward passes count neither as routed tokens nor as load."""
    with ExitStack() as stack:
        for counter in (decoder.recorder, decoder.balancer):
            if counter is not None:
                stack.enter_context(counter.uncounted())
        yield


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's stream for captures: torch's own is on whichever device came first."""
    return torch.cuda.Stream(device)
