import pytest
import torch
from tolerances import assert_close

from moezoo.layers.kernels.per_head import (
    absorb_query,
    absorb_query_ref,
    expand_values,
    expand_values_ref,
)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # no tl.dot: bf16 is right in the interpreter too


SHAPES = [(1, 2, 16, 32, 8), (3, 3, 12, 40, 6), (8, 1, 128, 100, 64), (2, 2, 1, 1, 2)]
"""Rows, heads, width without rotation, latent width, rotated width."""


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_absorb_query(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    rows, heads, nope, latent, rope = shape
    q = normal(rows, heads, nope + rope, dtype=dtype, device=device)
    # Rows of the projection hold a head's keys and then its values.
    kv_b = normal(heads, nope + 5, latent, dtype=dtype, device=device)
    found = absorb_query(q, kv_b[:, :nope])
    assert_close(found, absorb_query_ref(q, kv_b[:, :nope]))
    assert torch.equal(found[..., latent:], q[..., nope:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expand_values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    rows, heads, width, latent, _ = shape
    x = normal(rows, heads, latent, dtype=dtype, device=device)
    kv_b = normal(heads, 5 + width, latent, dtype=dtype, device=device)
    assert_close(expand_values(x, kv_b[:, 5:]), expand_values_ref(x, kv_b[:, 5:]))


def test_what_does_not_fit(device: torch.device) -> None:
    q = torch.zeros(9, 2, 24, device=device)
    key = torch.zeros(2, 16, 32, device=device)
    with pytest.raises(ValueError, match="T <= 8"):
        absorb_query(q, key)
    with pytest.raises(ValueError, match="q must be"):
        absorb_query(q[:4, :1], key)
    with pytest.raises(ValueError, match="q must be"):
        absorb_query(q[:4].half(), key)
    with pytest.raises(ValueError, match="x must be"):
        expand_values(q[:4], key)
    with pytest.raises(ValueError, match="dense heads"):
        absorb_query(q[:4].mT.contiguous().mT, key)
