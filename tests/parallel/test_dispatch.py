"""Tokens sent to ranks and back, against each token's sum over its experts, written out."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from ranks import results
from tolerances import RELATIVE, relative_difference
from torch import Tensor

from moezoo.layers.moe import fused_experts
from moezoo.layers.quant import BlockFp8
from moezoo.parallel.dispatch import FEW_ROWS, AllGather, AllToAll, _Fixed
from moezoo.parallel.mesh import Parallel, join
from moezoo.parallel.pack import destinations, pack_order, sum_answers

H, I = 48, 40
RANKS = 4
TOKENS = (5, 0, 1, 12)
"""Of each rank."""

CASES: dict[str, dict[str, Any]] = {
    "even": {"sizes": (2, 2, 2, 2), "k": 3},
    "more ranks than experts per token": {"sizes": (2, 2, 2, 2), "k": 1},
    "uneven, with empty ranks": {"sizes": (0, 5, 0, 1), "k": 2},
    "more ranks than experts": {"sizes": (1, 1, 0, 0), "k": 2},
}
DISPATCHERS = {
    "counted": partial(AllToAll),
    "counted in 3 parts": partial(AllToAll, chunks=3),
    "fixed": partial(AllToAll, capacity=12),
    "agreed": partial(AllToAll),
    "agreed in 5 parts": partial(AllToAll, chunks=5),
    "replicated": partial(AllGather),
    "replicated in 3 parts": partial(AllGather, chunks=3),
}


def experts(num_slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(num_slots, 2 * I, H, generator=generator) / H**0.5
    w2 = torch.randn(num_slots, H, I, generator=generator) / I**0.5
    return w13.to(dtype), w2.to(dtype)


def tokens(rank: int, num_slots: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank + 1)
    x = torch.randn(TOKENS[rank], H, generator=generator).to(dtype)
    weights = torch.rand(TOKENS[rank], k, generator=generator)
    slots = torch.rand(TOKENS[rank], num_slots, generator=generator).argsort(1)[:, :k].int()
    slots[::4, 0] = -1
    return x, weights, slots


def work(rank: int, dtype: torch.dtype) -> dict[tuple[str, str], tuple[Tensor, bool]]:
    mesh = join(Parallel(RANKS), "cpu")
    found = {}
    for case, settings in CASES.items():
        sizes, k = settings["sizes"], settings["k"]
        bounds = [sum(sizes[:r]) for r in range(RANKS + 1)]
        w13, w2 = (w[bounds[rank] : bounds[rank + 1]] for w in experts(bounds[-1], dtype))
        for name, make in DISPATCHERS.items():
            dispatcher = make(mesh, bounds)
            given = tokens(rank, bounds[-1], k, dtype)
            if isinstance(dispatcher, AllGather):
                given = tokens(3, bounds[-1], k, dtype)
            outs = []
            agreed = name.startswith("agreed")
            with dispatcher.forward_pass(len(given[0])) if agreed else nullcontext():
                for _ in range(2):
                    flight = dispatcher.dispatch(*given)
                    assert isinstance(flight, _Fixed) == (agreed or name == "fixed")
                    for x, weights, rows in flight.arrivals():
                        some = fused_experts(x, w13, w2, weights, rows) if len(w2) else 0 * x
                        flight.answer(some)
                    outs.append(flight.combine())
            found[case, name] = outs[0], torch.equal(*outs)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_sum_over_experts(dtype: torch.dtype) -> None:
    by_rank = results(RANKS, work, dtype)
    for rank, found in enumerate(by_rank):
        for (case, name), (y, same) in found.items():
            settings = CASES[case]
            of = 3 if name.startswith("replicated") else rank
            given = tokens(of, sum(settings["sizes"]), settings["k"], dtype)
            expected = reference(*given, num_slots=sum(settings["sizes"]), dtype=dtype)
            assert y.dtype == dtype and y.shape == expected.shape
            assert relative_difference(y, expected) <= RELATIVE[dtype], (case, name, rank)
            assert same, f"{case}, {name}: other bits the second time"
            if name.startswith("replicated"):
                assert torch.equal(y, by_rank[0][case, name][0]), "ranks differ"


def reference(
    x: Tensor, weights: Tensor, slots: Tensor, *, num_slots: int, dtype: torch.dtype
) -> Tensor:
    w13, w2 = (w.double() for w in experts(num_slots, dtype))
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, chosen in enumerate(slots.tolist()):
        for weight, slot in zip(weights[t].double(), chosen, strict=True):
            if slot >= 0:
                gate, up = (w13[slot] @ x[t].double()).chunk(2)
                y[t] += weight * (w2[slot] @ (torch.nn.functional.silu(gate) * up))
    return y


def fp8_work(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    mesh = join(Parallel(2), "cpu")
    generator = torch.Generator().manual_seed(0)
    width, inner = 300, 130
    w13 = BlockFp8.quantize(torch.randn(4, 2, inner, width, generator=generator) / width**0.5)
    w2 = BlockFp8.quantize(torch.randn(4, width, inner, generator=generator) / inner**0.5)
    generator.manual_seed(rank + 1)
    x = torch.randn(9, width, generator=generator).to(dtype)
    x[3] *= 1e3
    x[4] = 0
    weights = torch.rand(9, 2, generator=generator)
    slots = torch.rand(9, 4, generator=generator).argsort(1)[:, :2].int()
    found = {"one process": fused_experts(x, w13, w2, weights, slots)}
    own = slice(2 * rank, 2 * rank + 2)
    w13, w2 = w13.map(lambda t: t[own]), w2.map(lambda t: t[own])
    for name, options in {
        "model": {},
        "fp8": {"fp8": True},
        "fp8 in parts": {"fp8": True, "chunks": 2},
        "fp8 fixed": {"fp8": True, "capacity": 11},
    }.items():
        flight = AllToAll(mesh, (0, 2, 4), **options).dispatch(x, weights, slots)
        for arrival in flight.arrivals():
            flight.answer(fused_experts(arrival.x, w13, w2, arrival.topk_weights, arrival.rows))
        found[name] = flight.combine()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_on_the_wire_costs_what_experts_in_fp8_cost_anyway(dtype: torch.dtype) -> None:
    """The experts round tokens to the same numbers again, with a scale that was rounded once."""
    for found in results(2, fp8_work, dtype):
        expected = found.pop("one process")
        for name, y in found.items():
            for row, (ours, theirs) in enumerate(zip(y, expected, strict=True)):
                assert relative_difference(ours, theirs) <= RELATIVE[dtype], (name, row)


@pytest.mark.parametrize("num_ranks", [1, 3, 5])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_pack(num_tokens: int, num_ranks: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    sizes = torch.tensor([2, 0, 3, 1, 4][:num_ranks])
    rank_of_slot = torch.arange(num_ranks + 1).repeat_interleave(
        torch.cat((sizes, torch.tensor([1])))
    )
    k = min(3, int(sizes.sum()))
    slots = torch.randint(-1, int(sizes.sum()), (num_tokens, k), generator=generator).int()
    there = destinations(slots, rank_of_slot, num_ranks)
    goes = [{int(rank_of_slot[s]) for s in row if s >= 0} for row in slots.tolist()]
    assert there.tolist() == [[rank in ranks for rank in range(num_ranks)] for ranks in goes]

    order, places = pack_order(there, there.sum(0), int(there.sum()), k)
    expected = [t for rank in range(num_ranks) for t in range(num_tokens) if rank in goes[t]]
    assert order.tolist() == expected
    x = torch.randn(num_tokens, 8, generator=generator)
    counts = torch.tensor([len(ranks) for ranks in goes])[:, None]
    assert places.shape == (num_tokens, min(k, num_ranks))
    assert relative_difference(sum_answers(x[order], places), x * counts) < 1e-6


def alone(rank: int) -> None:
    mesh = join(Parallel(1), "cpu")
    w13, w2 = experts(6, torch.float32)
    x, weights, slots = tokens(3, 6, 2, torch.float32)
    expected = fused_experts(x, w13, w2, weights, slots)
    for make in DISPATCHERS.values():
        flight = make(mesh, (0, 6)).dispatch(x, weights, slots)
        for arrival in flight.arrivals():
            flight.answer(fused_experts(arrival.x, w13, w2, arrival.topk_weights, arrival.rows))
        assert relative_difference(flight.combine(), expected) < 1e-6

    dispatcher = AllToAll(mesh, (0, 6))
    with dispatcher.fixed(2), pytest.raises(ValueError, match=r"12 tokens .* capacity is 2; give"):
        dispatcher.dispatch(x, weights, slots)
    assert dispatcher.capacity is None
    for make in DISPATCHERS.values():
        with pytest.raises(ValueError, match="no gradient through experts of other ranks"):
            make(mesh, (0, 6)).dispatch(x.requires_grad_(), weights, slots)


def test_one_rank_capacity_and_gradients() -> None:
    results(1, alone)


def other_tokens(rank: int) -> str:
    mesh = join(Parallel(3), "cpu")
    x, weights, slots = tokens(3, 6, 2, torch.float32)
    dispatcher = AllGather(mesh, (0, 2, 4, 6))
    with dispatcher.forward_pass(len(x)):
        dispatcher.dispatch(x, weights, slots)
    if rank == 1:  # in the next pass the same ones in another order
        x = x.roll(1, 0)
    with pytest.raises(ValueError, match="all_gather") as caught, dispatcher.forward_pass(len(x)):
        dispatcher.dispatch(x, weights, slots)
    with pytest.raises(ValueError, match="all_gather"):
        dispatcher.dispatch(x[: 12 - rank], weights, slots)
    return str(caught.value)


def test_ranks_that_should_have_the_same_tokens() -> None:
    first, second, third = results(3, other_tokens)
    assert "rank 1 has other tokens than rank 0" in first
    assert "rank 0 has other tokens than rank 1" in second
    assert "rank 1 has other tokens than rank 2" in third


def agreeing(rank: int, cases: list[tuple[int, ...]]) -> list[int | None]:
    mesh = join(Parallel(3), "cpu")
    dispatcher = AllToAll(mesh, (0, 2, 4, 6))
    found = []
    for counts in cases:
        with dispatcher.forward_pass(counts[rank]):
            found.append(dispatcher.capacity_for(2))
        assert dispatcher.capacity_for(2) is None
        with dispatcher.fixed(7), dispatcher.forward_pass(counts[rank]):
            assert dispatcher.capacity_for(2) == 7
    return found


def test_ranks_agree_on_buffers_where_padding_is_cheap() -> None:
    """With 3 ranks and 2 experts a token goes to 5/9 of the ranks."""
    n = 9 * FEW_ROWS
    cases = [
        ((n, n, n), n),
        ((n, n, n * 7 // 9), n),  # 3 n rows, and 25/9 * 5/9 n = 1.54 n counted ones
        ((n, n, n * 6 // 9), None),  # 1.48 n
        ((n, 0, 0), None),
        ((FEW_ROWS // 3, 0, 0), FEW_ROWS // 3),
        ((0, 0, 0), 0),
    ]
    for found in results(3, agreeing, [counts for counts, _ in cases]):
        assert found == [capacity for _, capacity in cases]
