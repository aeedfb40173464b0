from collections.abc import Callable

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that `run` asks for at once on the current GPU, beyond what is there at its start.

    What the caching allocator gives may be more: it does not split every block.
    """
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    run()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
