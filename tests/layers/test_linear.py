"""The switch that linear layers of one row on the CPU use."""

import torch

from moezoo.layers.linear import without_onednn


def test_threads_that_overlap_leave_onednn_as_they_found_it():
    assert torch.backends.mkldnn.enabled
    first, second = without_onednn(), without_onednn()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mkldnn.enabled  # the second one still runs
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.enabled
