"""Helpers for devices: their names, copies between them, and whether kernels run on them."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


def device_of(device: torch.device | str | None) -> torch.device:
    """Return the device that a caller names, with its index; by default a GPU if there is one.

    Raises `ValueError` for anything that is no device, is of a type that moezoo does not run on, or
    is not on this machine.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}, expected 'cuda', 'cuda:1' or 'cpu'") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected 'cuda', 'cuda:1' or 'cpu'")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {device!r}, but torch sees no CUDA device; use 'cpu'")
        if chosen.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(
                f"device is {device!r}, but there are {torch.cuda.device_count()} CUDA devices"
            )
    return chosen


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the host to a device, without waiting; on a CPU return it as it is."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopies:
    """Asynchronous copies of tensors from one device to the host."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not tensors[0].is_cuda:
            self._copies = [tensor.clone() for tensor in tensors]
            return
        self._copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                tensor, non_blocking=True
            )
            for tensor in tensors
        ]
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[torch.Tensor]:
        """Wait for the copies, and return them."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


def runs_kernels(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether kernels can take these tensors: on CUDA, without torch.compile and gradients.

    `others` are all other tensors that the result depends on; kernels have no backward.
    """
    if not x.is_cuda or torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(
        tensor is not None and tensor.requires_grad for tensor in (x, *others)
    )


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether fp8 products run on a device; on a CPU numbers are widened first."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 9)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that nothing uses, torch's own reserve included."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def device_made_current(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context that makes the device of `x` current, on which Triton launches kernels."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return nullcontext()
    return torch.cuda.device_of(x)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Return whether a device has no room; torch's CPU allocator has no class of its own for
    that."""
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return out_of_memory or "can't allocate memory" in str(error)
