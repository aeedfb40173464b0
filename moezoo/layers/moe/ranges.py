"""Ranges in torch's profiler that are named after the verbs of the layer."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler

_NOTHING: AbstractContextManager[None] = nullcontext()


def profiler_range(name: str) -> AbstractContextManager[object]:
    """Return a context that is the range `moezoo::name` while a profiler runs.

    Without one it takes 0.1 us, where an unused `record_function` takes 10.
    """
    if not profiler._is_profiler_enabled or torch.compiler.is_compiling():
        return _NOTHING
    return torch.profiler.record_function(f"moezoo::{name}")
