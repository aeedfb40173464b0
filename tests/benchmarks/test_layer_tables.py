import layer_tables


def cell(tokens, us, kept):
    return {
        "layer": "qwen3-30b-a3b",
        "num_tokens": tokens,
        "floor_us": 0.5 * us["moezoo"],
        "floor_share": 0.5,
        "timings": {name: {"median_us": value} for name, value in us.items()},
        "references_us": kept,
    }


def test_tables_have_the_figures(monkeypatch):
    cells = [
        cell(1, {"moezoo": 31.04, "triton_kernels": 92.5}, {"vllm_tuned": 41}),
        cell(4096, {"moezoo": 723.4, "triton_kernels": 711.6}, {}),
    ]
    ceilings = {"read_bytes_per_second": 3.06e12, "flop_per_second": 7.7e14}
    document = {"cells": cells, "ceilings": ceilings}
    monkeypatch.setattr(layer_tables, "result", lambda name: document)
    head, _, ours, triton_kernels, torch, _, vllm, floor = layer_tables.bf16()
    assert head == "| tokens | 1 | 4,096 |"
    assert ours == "| moezoo | **31.0** | 723 |"
    assert triton_kernels == "| triton_kernels | 92.5 | **712** |"
    assert torch == "| torch `grouped_mm` |  |  |"
    assert vllm.endswith("| 41.0 |  |")
    assert floor == "| floor: bytes over 3.06 TB/s, FLOP over 770 TFLOP/s | 15.5 | 362 |"
