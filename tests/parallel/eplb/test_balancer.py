"""Ranks whose experts move while tokens go to them."""

import logging
import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from eplb_ranks import Parallel, results, run_ranks

from moezoo.errors import LoadImbalanceWarning, RankError
from moezoo.layers.quant import BlockFp8, Int4, Int8, Mxfp4
from moezoo.parallel.eplb.balancer import Balancer
from moezoo.parallel.eplb.options import EPLB

E, LAYERS, STEPS = 6, (1, 2, 4), 40


def expert(layer, e):
    """All tensors of one expert, of every kind that a format has."""
    generator = torch.Generator().manual_seed(100 * layer + e)
    w = torch.randn(32, 64, generator=generator)
    int4 = Int4.quantize(w.bfloat16(), zeros=True)
    order = torch.randperm(64, generator=generator).int()
    return [
        *(w[0], w[:3, :7].bfloat16(), w[0, 0]),
        *BlockFp8.quantize(w).tensors().values(),
        *(int4.data, int4.scales, int4.zeros, order),
        *(Int8.quantize(w).data, Int8.quantize(w).scales),
        Mxfp4.quantize(w).data,
        Mxfp4.quantize(w).scales.view(torch.float8_e8m0fnu),
    ]


def same(a, b):
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def stacked(tensors):
    one = tensors[0]
    rows = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    return torch.stack(rows).view(one.dtype).view(len(rows), *one.shape)


def balancer(mesh, options):
    """And the weights that it looks after: those that the first map puts on this rank."""
    slots = options.slots(E, LAYERS, mesh.ep_size, "linear")
    layers = [
        [stacked(tensors) for tensors in zip(*(expert(layer, e) for e in held), strict=True)]
        for layer, held in slots.of_rank(mesh.ep_rank).items()
    ]
    return Balancer(slots, layers, options=options, mesh=mesh), layers


def wrong_slots(mesh, balanced, layers):
    """Slots whose weights are not those of the expert that the map says."""
    maps = balanced.state.physical_to_logical_map.unflatten(1, (mesh.ep_size, -1))[:, mesh.ep_rank]
    return [
        (i, slot, n)
        for i, tensors in enumerate(layers)
        for slot, e in enumerate(maps[i].tolist())
        for n, (held, right) in enumerate(zip(tensors, expert(LAYERS[i], e), strict=True))
        if not same(held[slot], right)
    ]


def step(mesh, balanced, number):
    """Tokens of this rank, of other numbers than elsewhere or none, go to popular experts."""
    alike = mesh.parallel.dispatch == "all_gather"
    generator = torch.Generator().manual_seed(number if alike else number * 10 + mesh.rank)
    popular = torch.rand(E, generator=torch.Generator().manual_seed(number // 12)) ** 4
    num_tokens = 20 if alike else (number + mesh.rank) % 4 * 10
    balanced.begin(None)
    chosen = []
    for i in range(len(LAYERS)):
        ids = torch.multinomial(popular.expand(max(num_tokens, 1), -1), 2, generator=generator)
        ids = ids[:num_tokens]
        chosen.append(balanced.physical_ids(i, ids))
        assert torch.equal(balanced.state.physical_to_logical_map[i][chosen[-1].long()], ids)
    dist.barrier()  # as a layer's tokens on their way would be
    balanced.end_step(dummy=num_tokens == 0)
    return chosen


def moving(mesh, all_options):
    outcomes = []
    for options in all_options:
        balanced, layers = balancer(mesh, options)
        memory = [tensor.data_ptr() for tensors in layers for tensor in tensors]
        fetch = balanced._transfer.fetch

        def slowly(wave, fetch=fetch):  # ranks are ready at other times
            time.sleep(0.003 * mesh.rank)
            fetch(wave)

        balanced._transfer.fetch = slowly
        history, wrong, chosen = [], [], []
        for number in range(STEPS):
            chosen.append(step(mesh, balanced, number))
            history.append(balanced.state.physical_to_logical_map.tolist())
            wrong += wrong_slots(mesh, balanced, layers)
        assert memory == [tensor.data_ptr() for tensors in layers for tensor in tensors]
        outcomes.append((history, wrong, chosen))
    return outcomes


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_weights_follow_the_maps_which_every_rank_switches_at_the_same_step(dispatch):
    all_options = [
        EPLB(num_redundant_experts=3, window_size=6, step_interval=8),
        EPLB(window_size=6, step_interval=4, policy="least_movement", use_async=False),
        EPLB(num_redundant_experts=6, step_interval=10, expert_placement_strategy="round_robin"),
    ]
    parallel = Parallel(3, dispatch=dispatch, timeout=30)
    ranks = results(run_ranks(3, moving, all_options, parallel=parallel))
    for options, outcomes in zip(all_options, zip(*ranks, strict=True), strict=True):
        histories, wrong, chosen = zip(*outcomes, strict=True)
        assert wrong == ([],) * 3
        assert histories[1] == histories[0] and histories[2] == histories[0]
        switched = {i for i in range(1, STEPS) if histories[0][i] != histories[0][i - 1]}
        assert len(switched) > 3
        if not options.use_async:
            assert switched <= set(range(0, STEPS, options.step_interval))
        if dispatch == "all_gather":  # else a token's expert would be on no rank, or on two
            for one, other in zip(chosen[0], chosen[2], strict=True):
                assert all(map(torch.equal, one, other))
