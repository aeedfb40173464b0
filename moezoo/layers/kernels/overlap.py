"""Launches that overlap: a kernel's blocks start while those of the one before still run.

Between the small kernels of a layer the GPU would otherwise idle for a few microseconds each. On
Hopper and later a launch may ask for that (programmatic dependent launch); it then has to wait for
its predecessor before it touches memory. Every kernel here waits, most begin with it, so each
finishes after all before it have, and memory that they share may be used again in stream order.

Two things may be read before the wait: weights, which no kernel writes, and what was there when the
kernel before this one let it start. If that one had waited by then, as `wait` does, all before it
have ended; if not, what it may read before its own wait was there.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Wait for the kernel before this one, and let the one after it start."""
    wait_for_previous(OVERLAP)
    start_next(OVERLAP)


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def start_next(OVERLAP: tl.constexpr):
    """Let the kernel after this one start: once all the programs of this one have said so."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@cache
def launch_options(device: torch.device, *, persistent: bool = False) -> dict[str, Any]:
    """Return the launch options on `device` for a kernel that calls `wait`.

    Persistent programs, which share out the tiles of a large product, start only when the kernel
    before has ended: started early, they made layers up to a fifth slower (measured on one H100).
    """
    if persistent:
        return {"OVERLAP": False}
    if device.type == "cuda" and torch.version.hip is None and capability(device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
