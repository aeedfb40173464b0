import pytest
import torch

from moezoo.layers.kernels.interleave import interleave, interleave_ref


@pytest.mark.parametrize("ways", [1, 2, 4])
@pytest.mark.parametrize("columns", [64, 52, 300])
def test_matches_reference(ways: int, columns: int, device: torch.device) -> None:
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0)).to(device)
    strided = torch.cat((x, x), 1)[:, :columns]
    for tensor in (x, strided, x[:0]):
        assert torch.equal(interleave(tensor, ways), interleave_ref(tensor, ways))


def test_first_ways_of_eight_words_come_first() -> None:
    x = torch.arange(36)[None]
    first, second = interleave_ref(x, 4).view(2, 4, 8)
    assert first.tolist() == [[way + 4 * i for i in range(8)] for way in range(4)]
    assert second[:, 0].tolist() == [32, 33, 34, 35]
    assert not second[:, 1:].any()
