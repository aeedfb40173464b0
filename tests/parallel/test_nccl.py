"""Dispatch through NCCL with one rank: what is packed and sent is what comes back."""

from functools import partial

import pytest
import torch
from ranks import results
from tolerances import RELATIVE, relative_difference
from torch import Tensor

from moezoo.layers.moe import Dispatcher, fused_experts
from moezoo.layers.quant import BlockFp8
from moezoo.parallel.dispatch import AllGather, AllToAll
from moezoo.parallel.mesh import Parallel, join

E, H, I, K = 16, 512, 256, 4


def tokens(count: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, H, generator=generator).bfloat16()
    weights = torch.rand(count, K, generator=generator)
    slots = torch.rand(count, E, generator=generator).argsort(1)[:, :K].int()
    return x.cuda(), weights.cuda(), slots.cuda()


def there_and_back(dispatcher: Dispatcher, w13: object, w2: object, given: tuple) -> Tensor:
    flight = dispatcher.dispatch(*given)
    for x, weights, rows in flight.arrivals():
        flight.answer(fused_experts(x, w13, w2, weights, rows))
    return flight.combine()


def work(rank: int) -> None:
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(False)
    mesh = join(Parallel(1))
    assert mesh.device == torch.device("cuda", 0)
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(E, 2, I, H, generator=generator) / H**0.5
    w2 = torch.randn(E, H, I, generator=generator) / I**0.5
    dense = w13.bfloat16().cuda(), w2.bfloat16().cuda()
    fp8 = BlockFp8.quantize(w13.cuda()), BlockFp8.quantize(w2.cuda())
    bounds = (0, E)
    for count in (0, 1, 33, 4096):
        given = tokens(count)
        for dispatcher in (
            AllToAll(mesh, bounds),
            AllToAll(mesh, bounds, chunks=3),
            AllToAll(mesh, bounds, capacity=4096),
            AllGather(mesh, bounds),
            AllGather(mesh, bounds, chunks=2),
        ):
            y = there_and_back(dispatcher, *dense, given)
            expected = fused_experts(given[0], *dense, given[1], given[2])
            assert relative_difference(y, expected) <= RELATIVE[torch.bfloat16], (count, dispatcher)
        for capacity in (None, 4096):
            dispatcher = AllToAll(mesh, bounds, capacity=capacity, fp8=True)
            y = there_and_back(dispatcher, *fp8, given)
            expected = fused_experts(given[0], *fp8, given[1], given[2])
            assert relative_difference(y, expected) <= RELATIVE[torch.bfloat16], (count, capacity)

        for chunks in (1, 3):
            dispatcher = AllToAll(mesh, bounds, chunks=chunks)
            with dispatcher.forward_pass(count):
                assert dispatcher.capacity_for(K) == count
                y = there_and_back(dispatcher, *dense, given)
            expected = fused_experts(given[0], *dense, given[1], given[2])
            assert relative_difference(y, expected) <= RELATIVE[torch.bfloat16], (count, chunks)

    # A captured step answers for the tokens of its time.
    for weights, options in ((dense, {}), (fp8, {"fp8": True})):
        step = partial(there_and_back, AllToAll(mesh, bounds, capacity=8, **options), *weights)
        given = tokens(8)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step(given)
        for seed in (2, 3):
            for tensor, new in zip(given, tokens(8, seed), strict=True):
                tensor.copy_(new)
            graph.replay()
            expected = fused_experts(given[0], *weights, given[1], given[2])
            assert relative_difference(y, expected) <= RELATIVE[torch.bfloat16]


@pytest.mark.gpu
def test_one_rank_through_nccl() -> None:
    results(1, work)
