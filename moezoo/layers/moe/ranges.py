"""Ranges in torch's profiler that are named after the verbs of the layer."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler

_NOTHING: AbstractContextManager[None] = nullcontext()


def verb(name: str) -> AbstractContextManager[object]:
    """A range `moezoo::name` while a profiler runs. Otherwise it takes 0.1 us, where a
    `record_function` that nobody looks at takes 10."""
    if not profiler._is_profiler_enabled or torch.compiler.is_compiling():
        return _NOTHING
    return torch.profiler.record_function(f"moezoo::{name}")
