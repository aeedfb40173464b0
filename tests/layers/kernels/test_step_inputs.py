from typing import Any

import pytest
import torch

from moezoo.layers.kernels.step_inputs import step_inputs, step_inputs_ref


def arguments(
    num_rows: int, num_tables: int, hidden: int, dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    pages, page_size = 3, 16
    lengths = torch.randint(1, pages * page_size, (num_rows,), generator=generator)
    lengths[num_rows // 2] = 0
    tables = torch.randint(0, 99, (num_tables, num_rows + 2, pages), generator=generator)
    return {
        "ids": torch.randint(0, 40, (num_rows,), generator=generator).to(device),
        "lengths": lengths.int().to(device),
        "tables": tables.int().to(device)[:, :num_rows],
        "page_size": page_size,
        "embedding": torch.randn(40, hidden, generator=generator).to(device, dtype),
        "rotation": tuple(
            torch.randn(pages * page_size, dim, generator=generator).to(device, dtype)
            for _ in range(2)
        ),
    }


@pytest.mark.parametrize("shape", [(1, 1, 32, 8), (5, 2, 40, 6), (3, 1, 2500, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_matches_reference(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    given = arguments(*shape, dtype, device)
    ours, theirs = given["lengths"].clone(), given["lengths"].clone()
    found = step_inputs(**given | {"lengths": ours})
    expected = step_inputs_ref(**given | {"lengths": theirs})
    assert torch.equal(ours, theirs)
    for one, other in zip(found[1], expected[1], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    assert found[2].dtype == torch.int64


def test_what_does_not_fit(device: torch.device) -> None:
    given = arguments(3, 1, 8, 4, torch.float32, device)
    with pytest.raises(ValueError, match="ids must be int64"):
        step_inputs(**given | {"ids": given["ids"].int()})
    with pytest.raises(ValueError, match=r"tables \[W, B, P\]"):
        step_inputs(**given | {"tables": given["tables"][0]})
    with pytest.raises(ValueError, match="dense rows"):
        step_inputs(**given | {"tables": given["tables"].transpose(1, 2).contiguous().mT})
