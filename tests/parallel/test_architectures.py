"""Every architecture with its experts on two ranks, one of which has fewer tokens, or none."""

from collections.abc import Iterator
from typing import Any

import torch
from configurations import CONFIGURATIONS
from ranks import results
from transformers import AutoConfig, MixtralConfig, PreTrainedConfig

import moezoo
from moezoo import Parallel
from moezoo.parallel.sharding import step_without_tokens

LENGTH, NEW = 9, 4
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}


def cases() -> Iterator[tuple[str, PreTrainedConfig]]:
    for model_type, configurations in CONFIGURATIONS.items():
        if model_type != "kimi_k2":  # transformers has no such config; it is deepseek_v3
            config = next(iter(configurations.values()))
            if isinstance(config, dict):
                config = AutoConfig.for_model(model_type, **config)
            yield model_type, config


def model_of(config: PreTrainedConfig, **options: Any) -> Any:
    torch.manual_seed(0)
    return moezoo.from_config(config, dtype=torch.float32, device="cpu", **options)


def differences(rank: int) -> list[str]:
    """Those whose logits or greedy tokens are not one process's."""
    torch.set_num_threads(1)
    wrong = []
    ids = torch.arange(1, LENGTH + rank)[None]
    for model_type, config in cases():
        whole = model_of(config)
        divided = model_of(config, parallel=Parallel(2, timeout=60))
        with torch.no_grad():
            expected, actual = whole(ids).logits, divided(ids).logits
        written = divided.generate(ids[:0] if rank else ids, **GREEDY)
        same = bool(rank) or torch.equal(written, whole.generate(ids, **GREEDY))
        if not same or (actual - expected).norm() > 2e-5 * expected.norm():
            wrong.append(model_type)
    return wrong


def test_as_in_one_process() -> None:
    assert results(2, differences, timeout=180) == [[], []]


def other_k(rank: int) -> float:
    """Routers that choose other numbers of experts, beside a rank without tokens."""
    torch.set_num_threads(1)
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=61, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=6, **sizes
    )
    ids = torch.arange(1, LENGTH)[None]
    whole, divided = model_of(config), model_of(config, parallel=Parallel(2, timeout=60))
    worst = 0.0
    for k in (1, 3):
        with torch.no_grad(), whole.set_routing(k=k), divided.set_routing(k=k):
            if rank:
                step_without_tokens(divided.decoder)
                continue
            expected, actual = whole(ids).logits, divided(ids).logits
            worst = max(worst, ((actual - expected).norm() / expected.norm()).item())
    return worst


def test_routing_by_order_beside_a_rank_without_tokens() -> None:
    assert max(results(2, other_k)) < 2e-5
