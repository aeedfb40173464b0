"""Facts about the machine that every benchmark reports, and the paths of results."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device_name(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as lines:
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def describe(device: torch.device | str) -> dict[str, Any]:
    import safetensors
    import transformers

    import moezoo

    return {
        "device": device_name(device),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "moezoo": moezoo.__version__,
    }


def read_bandwidth(device: torch.device | str, nbytes: int = 1 << 29) -> float:
    """Return the bytes per second at which `device` reads uncached memory: the best of ten sums."""
    data = torch.randn(nbytes // 4, device=device)
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return nbytes / best


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def result_path(benchmark: str, device: torch.device | str) -> Path:
    """Return the path results/<benchmark>_<device>.json."""
    name = "".join(c if c.isalnum() else "_" for c in device_name(device)).strip("_").lower()
    return RESULTS / f"{benchmark}_{name}.json"


def write_result(benchmark: str, device: torch.device | str, content: dict[str, Any]) -> Path:
    """Write `content` to `result_path` and return the path."""
    path = result_path(benchmark, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": benchmark, **describe(device), **content}
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path
