"""Which device a name means, and whether Triton's kernels run on a tensor's."""

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


def runs_kernels(*tensors: torch.Tensor) -> bool:
    """Whether kernels take them: on CUDA, and neither a compiler nor a gradient looks inside."""
    if not tensors[0].is_cuda or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
