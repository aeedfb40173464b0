import json

import generate_tables


def row(section, case="qwen3-30b-a3b", **fields):
    return {"section": section, "case": case, **fields}


def pace(batch, context, **tokens_per_second):
    fields = {"batch": batch, "context": context, "tokens_per_second": tokens_per_second}
    return row("decode", **fields, of_roofline=0.704)


def test_tables_have_the_figures(tmp_path, monkeypatch):
    rows = [
        pace(32, 8192),
        pace(8, 8192, moezoo=676.6),
        pace(1, 2048, moezoo=344.6),
        pace(1, 512, moezoo=1352.2, transformers=5.3),
        row(
            "prefill",
            prompt_tokens=2048,
            seconds={"moezoo": {"median": 0.0294}, "transformers": {"median": 0.1241}},
            of_peak={"moezoo": 0.556},
        ),
    ]
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(generate_tables, "RESULT", result)
    monkeypatch.setattr(generate_tables, "TITLES", {"qwen3-30b-a3b": "Qwen3"})
    assert generate_tables.decoding()[2:] == [
        "| Qwen3, 1 x 512 | 1,352 | 70 % | 5 |",
        "| Qwen3, 8 x 8,192 | 677 | 70 % |  |",
    ]
    assert generate_tables.prompts() == [
        "| tokens | 2,048 |",
        "| --- | --- |",
        "| Qwen3, moezoo | 29.4 (56 %) |",
        "| Qwen3, transformers | 124 |",
    ]
