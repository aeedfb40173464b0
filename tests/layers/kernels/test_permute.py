import pytest
import torch

from kernels.routings import ROUTINGS, topk_ids
from moezoo.layers.kernels.permute import num_tiles, permute, permute_ref


@pytest.mark.parametrize("tile_rows", [16, 128])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_matches_reference(routing: str, tile_rows: int, device: torch.device) -> None:
    ids = topk_ids(routing).to(device)
    result = permute(ids, ROUTINGS[routing][2], tile_rows)
    for actual, expected in zip(
        result, permute_ref(ids, ROUTINGS[routing][2], tile_rows), strict=True
    ):
        assert actual.dtype == torch.int32
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("tile_rows", [16, 32])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_tiles_cover_each_expert(routing: str, tile_rows: int) -> None:
    num_experts = ROUTINGS[routing][2]
    ids = topk_ids(routing)
    _, offsets, tile_experts = permute_ref(ids, num_experts, tile_rows)
    tiles = [-(-count // tile_rows) for count in offsets.diff().tolist()]
    assert [(tile_experts == e).sum() for e in range(num_experts)] == tiles
    assert len(tile_experts) == num_tiles(ids.numel(), num_experts, tile_rows)


def test_more_rows_than_a_block(device: torch.device) -> None:
    ids = torch.randint(0, 3, (2500, 2), generator=torch.Generator().manual_seed(0)).to(device)
    for actual, expected in zip(permute(ids, 3, 64), permute_ref(ids, 3, 64), strict=True):
        assert torch.equal(actual, expected)


def test_ids_out_of_range_are_nobodys(device: torch.device) -> None:
    for far in (2**31 - 1, 2**32):
        ids = torch.tensor([[0, 4], [far, 3], [-far, 1]], device=device)
        ids = ids.int() if far < 2**31 else ids
        order, offsets, _ = permute(ids, 4, 16)
        assert order.tolist() == [0, 5, 3, 1, 2, 4]
        assert offsets.tolist() == [0, 1, 2, 2, 3]


def test_strided_ids(device: torch.device) -> None:
    ids = topk_ids("odd").to(device)
    strided = ids.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(permute(strided, 7, 16)[0], permute(ids, 7, 16)[0])


@pytest.mark.parametrize("ids", [torch.zeros(4, dtype=torch.int32), torch.zeros(4, 2)])
def test_refuses(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"topk_ids must be \[T, K\] int32 or int64"):
        permute(ids, 4, 16)
