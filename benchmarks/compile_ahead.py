"""Fill Triton's cache with all processors, so that the GPU does not wait for its compiler.

Each worker walks through the launches of a layer with weights that take no memory, and compiles
every kernel instead of launching it.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moezoo.tools.layer import moezoo_layer
from moezoo.tools.layer_weights import LAYERS, Layer, QuantizedWeights, Weights, on_meta

MAX_WORKERS = 12


def borrowed(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a GPU tensor of any size over a few bytes of memory: only its address is valid."""
    memory = torch.empty(4096, dtype=torch.uint8, device="cuda")
    kind = {1: "|u1", 2: "<f2", 4: "<f4"}[dtype.itemsize]
    array = {"shape": shape, "typestr": kind, "data": (memory.data_ptr(), False), "version": 2}
    holder = SimpleNamespace(__cuda_array_interface__=array, memory=memory)
    return torch.as_tensor(holder, device="cuda").view(dtype)


def compile_layer(name: str, num_tokens: int, quantization: str | None = None) -> list[str]:
    """Compile a layer's kernels in a process that launches nothing; return the error, if any."""
    import triton

    launch = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    layer, problems = LAYERS[name], []
    num_experts, hidden_size = layer.num_experts, layer.hidden_size
    w13 = borrowed(num_experts, 2 * layer.intermediate_size, hidden_size)
    w2 = borrowed(num_experts, hidden_size, layer.intermediate_size)
    x = torch.zeros(num_tokens, hidden_size, dtype=torch.bfloat16, device="cuda")
    logits = torch.randn(num_tokens, num_experts, device="cuda")
    triton.JITFunction.run = compile_only
    try:
        second = partial(_quantized, layer, quantization) if quantization else _triton_kernels
        for build in (_moezoo, second):
            try:
                with torch.inference_mode():
                    build(w13, w2, layer.k)(x, logits)
            except Exception as error:  # it will be met again, and told, where it is measured
                problems.append(f"{name}, {num_tokens}, {quantization or ''}: {error!r:.300}")
    finally:
        triton.JITFunction.run = launch
        torch.cuda.empty_cache()
    return problems


def _moezoo(w13: Tensor, w2: Tensor, k: int) -> Callable[[Tensor, Tensor], Tensor]:
    return moezoo_layer(Weights(w13, w2), k)


def _quantized(
    layer: Layer, quantization: str, w13: Tensor, w2: Tensor, k: int
) -> Callable[[Tensor, Tensor], Tensor]:
    weights = on_meta(layer, quantization)

    def there(tensor: Tensor) -> Tensor:
        return borrowed(*tensor.shape, dtype=tensor.dtype)

    return moezoo_layer(QuantizedWeights(weights.w13.map(there), weights.w2.map(there)), k)


def _triton_kernels(w13: Tensor, w2: Tensor, k: int) -> Callable[[Tensor, Tensor], Tensor]:
    try:
        from peer_triton_kernels import layer
    except ImportError:
        return lambda x, logits: x
    return layer(w13.mT, w2.mT, k)


def compile_ahead(
    layers: list[str], tokens: list[int], seconds: float, quantization: str | None = None
) -> list[str]:
    """Compile for all cells, within the given seconds; return the errors."""
    deadline = time.monotonic() + seconds
    jobs = [(name, num_tokens, quantization) for num_tokens in tokens for name in layers]
    workers = min(len(jobs), os.cpu_count() or 1, MAX_WORKERS)
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    futures = [pool.submit(compile_layer, *job) for job in jobs]
    done, late = wait(futures, timeout=deadline - time.monotonic())
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=not late, cancel_futures=True)
    for process in processes if late else ():
        process.kill()
    problems = [f"{len(late)} of {len(jobs)} not compiled in time"] if late else []
    for future in done:
        error = future.exception()
        problems += [repr(error)] if error is not None else future.result()
    return list(dict.fromkeys(problems))
