"""What benchmarks count before they divide by a time, on models whose sizes are known."""

import pytest
import torch
from cases import CASES, deepseek_v2_lite, olmoe, qwen3_30b
from offline import Workload
from roofline import (
    active_parameters,
    causal_pairs,
    dense_bytes,
    expert_bytes,
    expert_layers,
    kv_bytes,
    prefill_flop,
    static_batch_seconds,
)

from moezoo import registry


def decoder(config):
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        return registry.build(config).bfloat16()


def test_a_step_of_qwen3_30b_reads_its_active_weights():
    model = decoder(qwen3_30b())
    hit = sum(8 * expert_bytes(layer) for layer in expert_layers(model))
    assert hit == 48 * 75_497_472
    attention = 2048 * (32 + 2 * 4 + 32) * 128 + 2 * 128
    layer = attention + 2 * 2048 + 128 * 2048
    assert dense_bytes(model) == 2 * (48 * layer + 2048 + 151936 * 2048)
    assert dense_bytes(model) + hit == pytest.approx(6.1e9, rel=0.01)


def test_tied_embeddings_are_read_as_the_head():
    config = olmoe(1)
    untied = dense_bytes(decoder(config))
    config.tie_word_embeddings = True
    assert dense_bytes(decoder(config)) == untied


def test_the_cache_of_a_token():
    assert kv_bytes(decoder(qwen3_30b()), 100) == 100 * 48 * 2 * 4 * 128 * 2
    assert kv_bytes(decoder(olmoe(16)), 100) == 100 * 16 * 2 * 16 * 128 * 2
    assert kv_bytes(decoder(deepseek_v2_lite()), 100) == 100 * 27 * (512 + 64) * 2


@pytest.mark.parametrize(
    ("config", "k", "billions"),
    [(qwen3_30b, 8, 3.35), (lambda: olmoe(16), 8, 1.28), (deepseek_v2_lite, 6, 2.66)],
    ids=["qwen3-30b-a3b", "olmoe-1b-7b", "deepseek-v2-lite"],
)
def test_active_parameters_are_those_published(config, k, billions):
    model = decoder(config())
    heads = 2 * model.embed.weight.numel()
    assert active_parameters(model, k) + heads == pytest.approx(1e9 * billions, rel=0.02)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 9])
def test_causal_pairs_are_those_of_the_mask(window):
    query, key = torch.arange(5)[:, None], torch.arange(5)
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    assert causal_pairs(5, window) == mask.sum()


def test_flop_of_a_prompt():
    model = decoder(CASES["tiny-mixtral"]())
    flop = {n: prefill_flop(model, 2, n) for n in (1, 2)}
    attention = 2 * 4 * 2 * 64 * 6
    assert flop[2] - flop[1] == 2 * active_parameters(model, 2) + 2 * attention


def test_static_batches_are_sorted_padded_and_as_long_as_their_longest_row():
    seconds = static_batch_seconds([30, 10, 20], [5, 2, 9], 2, token_seconds=0.1, step_seconds=1.0)
    assert seconds == pytest.approx(0.1 * (2 * 20 + 30) + 1.0 * (8 + 4))


def test_a_workload_is_the_same_each_time_and_begins_like_a_larger_one():
    workload = Workload.draw(6, (8, 48), (4, 16), 100)
    assert workload == Workload.draw(9, (8, 48), (4, 16), 100).first(6)
    assert all(8 <= length <= 48 for length in workload.lengths)
    assert all(4 <= limit <= 16 for limit in workload.limits)
    assert {0 < token < 100 for prompt in workload.prompts for token in prompt} == {True}
