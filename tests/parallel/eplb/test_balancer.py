"""Ranks whose experts move while tokens go to them."""

import logging
import threading
import time
import warnings
from functools import cache

import pytest
import torch
import torch.distributed as dist
from ranks import die, results, run

from moezoo.errors import LoadImbalanceWarning, RankError
from moezoo.layers.quant import BlockFp8, Int4, Int8, Mxfp4
from moezoo.parallel.eplb.balancer import Balancer
from moezoo.parallel.eplb.options import EPLB
from moezoo.parallel.eplb.pace import Pace
from moezoo.parallel.mesh import Parallel, join

E, LAYERS, STEPS = 6, (1, 2, 4), 80
HELD = 9
"""The first step in which one rank may plan."""


@cache
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
        [
            stacked(tensors).to(mesh.device)
            for tensors in zip(*(expert(layer, e) for e in held), strict=True)
        ]
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
        if not same(held[slot].cpu(), right)
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


def moving(rank, all_options, parallel):
    mesh = join(parallel, "cpu")
    outcomes = []
    for options in all_options:
        balanced, layers = balancer(mesh, options)
        # Less than the largest tensor, so that one comes in parts.
        balanced._pace = Pace(least=2000, most=2000)
        memory = [tensor.data_ptr() for tensors in layers for tensor in tensors]
        find, post = balanced._find, balanced._transfer.post
        go = threading.Event()
        posted = []

        def slowly(*args, find=find, go=go, waits=options.use_async and rank == 2):
            if waits:
                go.wait()
            time.sleep(0.003 * mesh.rank)  # ranks are ready at other times
            return find(*args)

        def counted(wave, piece, post=post, posted=posted):
            posted.append(sum(part.stop - part.start for part in piece))
            return post(wave, piece)

        balanced._find, balanced._transfer.post = slowly, counted
        history, wrong, chosen, most = [], [], [], 0
        for number in range(STEPS):
            if number == HELD:
                go.set()
            before = len(posted)
            chosen.append(step(mesh, balanced, number))
            most = max(most, len(posted) - before)
            history.append(balanced.state.physical_to_logical_map.tolist())
            wrong += wrong_slots(mesh, balanced, layers)
        assert memory == [tensor.data_ptr() for tensors in layers for tensor in tensors]
        assert max(posted) <= 2000 and len(posted) > 5
        assert (most == 1) == options.use_async
        outcomes.append((history, wrong, chosen))
    return outcomes


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_weights_follow_the_maps_which_every_rank_switches_at_the_same_step(dispatch):
    all_options = [
        EPLB(num_redundant_experts=3, window_size=6, step_interval=8),
        EPLB(window_size=6, step_interval=4, policy="least_movement", use_async=False),
        EPLB(num_redundant_experts=6, step_interval=10, expert_placement_strategy="round_robin"),
    ]
    parallel = Parallel(3, dispatch=dispatch)
    ranks = results(3, moving, all_options, parallel)
    for options, outcomes in zip(all_options, zip(*ranks, strict=True), strict=True):
        histories, wrong, chosen = zip(*outcomes, strict=True)
        assert wrong == ([],) * 3
        assert histories[1] == histories[0] and histories[2] == histories[0]
        switched = {i for i in range(1, STEPS) if histories[0][i] != histories[0][i - 1]}
        assert len(switched) >= 2
        if options.use_async:  # all went on with what they had while one was not ready
            assert min(switched) >= HELD
        else:
            assert switched <= set(range(0, STEPS, options.step_interval))
        if dispatch == "all_gather":  # else a token's expert would be on no rank, or on two
            for one, other in zip(chosen[0], chosen[2], strict=True):
                assert all(map(torch.equal, one, other))


def stopped(rank, use_async):
    """Rank 1 dies before the second wave of a rebalance is there; what the others are left with."""
    mesh = join(Parallel(3, timeout=8), "cpu")
    options = EPLB(num_redundant_experts=3, step_interval=8, use_async=use_async)
    balanced, layers = balancer(mesh, options)
    post, posted = balanced._transfer.post, []

    def dying(wave, piece):
        posted.append(wave.switches[0].layer)
        if rank == 1 and len(set(posted)) == 2:
            die()
        return post(wave, piece)

    balanced._transfer.post = dying
    begin = time.monotonic()
    for number in range(STEPS):
        try:
            with mesh.named_faults("stepping"):
                step(mesh, balanced, number)
        except RankError as error:
            maps = balanced.state.physical_to_logical_map.tolist()
            took = time.monotonic() - begin
            return str(error), maps, wrong_slots(mesh, balanced, layers), len(set(posted)), took
    return None


@pytest.mark.parametrize("use_async", [True, False])
def test_a_rank_that_dies_during_a_transfer_is_named_and_no_map_is_half_switched(use_async):
    first, dead, third = run(3, stopped, use_async)
    assert dead is None
    for message, maps, wrong, waves, took in (first, third):
        assert "rank 1 gave no sign of life" in message
        assert wrong == []
        assert maps == first[1]
        assert waves == 2
        assert took < 20


def watched(rank, options):
    """Loads of ranks that stay uneven where nothing is balanced."""
    mesh = join(Parallel(2), "cpu")
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("moezoo").addHandler(handler)
    logging.getLogger("moezoo").setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        slots = options.slots(E, LAYERS, 2, [[0, 1, 2], [3, 4, 5]])
        balanced = Balancer(slots, [[torch.zeros(3)]] * 3, options=options, mesh=mesh)
        for _ in range(STEPS):
            balanced.begin(torch.tensor([True] * 8 + [False]))
            for i in range(3):
                ids = torch.tensor([[0]] * 7 + [[4], [5]])
                assert torch.equal(balanced.physical_ids(i, ids), ids.int())
            dist.barrier()
            balanced.end_step()
        maps = balanced.state.physical_to_logical_map.tolist()
    return maps, records, [(warning.category, str(warning.message)) for warning in caught]


def test_uneven_ranks_are_logged_and_warned_of_where_nothing_moves():
    options = EPLB(enabled=False, step_interval=8, window_size=4)
    (maps, records, caught), (_, *others) = results(2, watched, options)
    assert maps == [[0, 1, 2, 3, 4, 5]] * 3
    # 7 of 8 tokens that are none of padding go to the first rank: a mean of 4
    assert len(records) >= 3
    assert all("balancedness 0.571 over the last" in record for record in records)
    ((category, message),) = caught
    assert category is LoadImbalanceWarning
    assert "is 0.57 of the highest, and was below 0.6 for 3 intervals" in message
    assert others == [[], []]


def beside_a_gpu(rank):
    torch.use_deterministic_algorithms(False)  # they wait for the GPU
    mesh = join(Parallel(1), "cuda")
    balanced, layers = balancer(mesh, EPLB(num_redundant_experts=3, step_interval=8))
    first = balanced.state.physical_to_logical_map.tolist()
    # Not those that have copies to begin with.
    ids = [torch.randint(3, E, (64, 2), device="cuda") for _ in range(STEPS)]
    for choices in ids:
        balanced.begin(None)
        for i in range(len(LAYERS)):
            balanced.physical_ids(i, choices)
        balanced.end_step()
        torch.cuda.set_sync_debug_mode("error")  # from the second step on: the first compiles
        time.sleep(0.01)  # as a step takes its time
    torch.cuda.set_sync_debug_mode("default")
    moved = balanced.state.physical_to_logical_map.tolist() != first
    return moved, wrong_slots(mesh, balanced, layers)


@pytest.mark.gpu
def test_the_host_never_waits_for_the_gpu():
    assert results(1, beside_a_gpu) == [(True, [])]


def beside_collectives(rank, dispatch):
    """Experts travel between steps whose collectives are launched, or replayed in a graph."""
    torch.use_deterministic_algorithms(False)
    mesh = join(Parallel(2, dispatch=dispatch, timeout=20), "cuda")
    balanced, layers = balancer(mesh, EPLB(num_redundant_experts=2, step_interval=8))
    balanced._pace = Pace(least=2000, most=2000)
    rows = torch.full((4, 1024), rank, device="cuda")

    def collectives():
        return [
            (mesh.all_to_all(rows, "x").wait(), mesh.all_gather(rows, "y").wait()) for _ in "12"
        ]

    collectives()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = collectives()
    generator = torch.Generator("cuda").manual_seed(rank if dispatch == "all_to_all" else 0)
    history = []
    for number in range(STEPS):
        ids = torch.randint(1 + number // 12 % 3, (64, 2), device="cuda", generator=generator)
        balanced.begin(None)
        for i in range(len(LAYERS)):
            balanced.physical_ids(i, ids)
        if number == 1:
            torch.cuda.set_sync_debug_mode("error")  # from the second step on: the first compiles
        if number % 3 == 0:
            collectives()
        else:
            graph.replay()
        balanced.end_step()
        history.append(balanced._maps.tolist())
    torch.cuda.set_sync_debug_mode("default")
    assert all(row[:, 0].tolist() == [0, 0, 1, 1] for row, _ in recorded)
    assert balanced.state.physical_to_logical_map.tolist() == history[-1]
    return history, wrong_slots(mesh, balanced, layers)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_experts_travel_between_two_gpus(dispatch):
    (history, wrong), other = results(2, beside_collectives, dispatch)
    assert other == (history, []) and wrong == []
    assert history[0] != history[-1]
