"""Which device a name means, how tensors get there, and whether kernels run on them."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


def device_of(device: torch.device | str | None) -> torch.device:
    """The device that a caller names, with its index; by default a GPU if there is one.

    Raises `ValueError` for what is no device, is of a kind that moezoo does not run on, or is not
    on this machine.
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
    """A copy of a tensor on the host; the host does not wait for it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopies:
    """Copies of tensors of one device on their way to the host, which need not wait for them."""

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
        """The copies, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


def runs_kernels(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether kernels take them: on CUDA, and neither a compiler nor a gradient looks inside.

    `others` are all else that the result depends on; kernels have no backward.
    """
    if not x.is_cuda or torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(
        tensor is not None and tensor.requires_grad for tensor in (x, *others)
    )


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether products of fp8 run there; the CPU widens the numbers first."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 9)


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nothing uses, that which torch keeps for later included."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def device_made_current(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of a model's tensors."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return nullcontext()
    return torch.cuda.device_of(x)
