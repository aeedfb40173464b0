import pytest
import torch

from kernels.routings import ROUTINGS, topk_ids
from moezoo.layers.kernels.permute import Permutation, max_tiles, permute, permute_ref


def assert_same(actual: Permutation, expected: Permutation) -> None:
    num_rows, num_tiles = int(expected.offsets[-1]), int(expected.num_tiles)
    for name, tensor in actual._asdict().items():
        wanted = getattr(expected, name)
        assert tensor.dtype == torch.int32
        if name == "order":
            assert tensor.shape == wanted.shape
            tensor, wanted = tensor[:num_rows], wanted[:num_rows]
        if name == "tiles":
            tensor = tensor[:, :num_tiles]
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("tile_rows", [16, 128])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_matches_reference(routing: str, tile_rows: int, device: torch.device) -> None:
    ids = topk_ids(routing).to(device)
    num_experts = ROUTINGS[routing][2]
    assert_same(permute(ids, num_experts, tile_rows), permute_ref(ids, num_experts, tile_rows))


@pytest.mark.parametrize("tile_rows", [16, 32])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_reference_sorts_and_covers(routing: str, tile_rows: int) -> None:
    num_experts = ROUTINGS[routing][2]
    ids = topk_ids(routing)
    rows = permute_ref(ids, num_experts, tile_rows)
    flat = ids.flatten().long()
    by_sort = torch.where(flat < 0, num_experts, flat).argsort(stable=True)
    assert torch.equal(rows.order.long(), by_sort)
    present = flat >= 0
    assert torch.equal(
        rows.order[rows.positions.flatten()[present].long()].long(),
        torch.arange(flat.numel())[present],
    )
    counts = torch.bincount(flat[present], minlength=num_experts)
    assert torch.equal(rows.offsets.diff().long(), counts)
    tiles = [-(-count // tile_rows) for count in counts.tolist()]
    assert [(rows.tiles[0] == e).sum() for e in range(num_experts)] == tiles
    assert int(rows.num_tiles) == sum(tiles) <= max_tiles(flat.numel(), num_experts, tile_rows)


@pytest.mark.parametrize("num_experts", [3, 200])
def test_more_rows_than_a_block(num_experts: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, num_experts, (2500, 2), generator=generator).to(device)
    assert_same(permute(ids, num_experts, 64), permute_ref(ids, num_experts, 64))


@pytest.mark.parametrize("num_experts", [1, 3, 200])
def test_rows_for_two_launches(
    num_experts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = 70_000
    if device.type == "cpu":  # the interpreter sorts a hundred rows a second
        num_rows = 270
        monkeypatch.setattr("moezoo.layers.kernels.permute.FEW_ROWS", 256)
        monkeypatch.setattr("moezoo.layers.kernels.permute.block_rows", lambda _: 64)
        monkeypatch.setattr("moezoo.layers.kernels.permute.COUNTS", 512)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, num_experts, (num_rows, 1), generator=generator)
    ids[: num_rows // 2] = ids[: num_rows // 2].clamp(max=num_experts // 2)
    ids[:5] = torch.tensor([[num_experts], [-1], [2**31 - 1], [-(2**31)], [0]])
    ids = ids.int().to(device)
    assert_same(permute(ids, num_experts, 64), permute_ref(ids, num_experts, 64))


def test_an_expert_chosen_twice_by_a_token(device: torch.device) -> None:
    ids = torch.tensor([[1, 1, 0], [1, 2, 1], [2, 2, 2]], dtype=torch.int32, device=device)
    assert_same(permute(ids, 4, 16), permute_ref(ids, 4, 16))


def test_ids_out_of_range_are_nobodys(device: torch.device) -> None:
    for far in (2**31 - 1, 2**32):
        ids = torch.tensor([[0, 4], [far, 3], [-far, 1]], device=device)
        ids = ids.int() if far < 2**31 else ids
        rows = permute(ids, 4, 16)
        assert rows.order[:3].tolist() == [0, 5, 3]
        assert rows.positions.tolist() == [[0, -1], [-1, 2], [-1, 1]]
        assert rows.offsets.tolist() == [0, 1, 2, 2, 3]


def test_strided_ids(device: torch.device) -> None:
    ids = topk_ids("odd").to(device)
    strided = ids.repeat_interleave(2, 1)[:, ::2]
    assert_same(permute(strided, 7, 16), permute_ref(ids, 7, 16))


@pytest.mark.parametrize("ids", [torch.zeros(4, dtype=torch.int32), torch.zeros(4, 2)])
def test_refuses(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"topk_ids must be \[T, K\] int32 or int64"):
        permute(ids, 4, 16)
