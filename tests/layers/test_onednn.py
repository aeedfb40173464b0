"""The switch of oneDNN, and products of one row that use it."""

import pytest
import torch
from tolerances import assert_close

from moezoo.layers import onednn
from moezoo.layers.linear import linear
from moezoo.layers.onednn import matvec, without_onednn


def test_threads_that_overlap_leave_onednn_as_they_found_it(monkeypatch):
    # Without such types it has nothing to switch.
    monkeypatch.setattr(onednn, "ONEDNN_DTYPES", (torch.bfloat16,))
    assert torch.backends.mkldnn.enabled
    first, second = without_onednn(), without_onednn()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mkldnn.enabled  # the second one still runs
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_one_row_of_a_large_matrix_is_multiplied_by_onednn(monkeypatch, large, biased):
    monkeypatch.setattr(onednn, "ONEDNN_DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(onednn, "LARGE_MATRIX", 64 * 48 if large else 64 * 48 + 1)
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((64, 48), (48,), (64,))
    )
    switched = []

    def watched(name):
        real = getattr(torch, name)

        def call(*args):
            switched.append(torch.backends.mkldnn.enabled)
            return real(*args)

        return call

    for name in ("mv", "addmv"):
        monkeypatch.setattr(torch, name, watched(name))
    with without_onednn():
        y = matvec(weight, x, bias if biased else None)
        assert not torch.backends.mkldnn.enabled
    assert switched == [large] and torch.backends.mkldnn.enabled
    expected = weight.double() @ x.double() + (bias.double() if biased else 0.0)
    assert_close(y, expected.bfloat16())
    layer = torch.nn.functional.linear(x[None, None], weight, bias)
    assert_close(linear(x[None, None], weight, bias), layer)
