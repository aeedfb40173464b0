"""The tables of benchmarks/quality_tables.py."""

import json

import pytest
import quality_tables


def test_a_scheme_of_several_checkpoints(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(scheme: str, bits: float, over: float, changed: float, *errors: float):
        return {
            "scheme": scheme,
            "bits_per_weight": bits,
            "loss_over_bf16": over,
            "top1_changed": changed,
            "weight_error_by_layer": errors,
        }

    checkpoints = {
        "a": [entry("bf16", 16.0, 0, 0, 0), entry("int8", 8.25, 0.001, 0.0123, 0.01, 0.03)],
        "b": [entry("int8", 8.125, -0.0002, 0.02, 0.02, 0.02), entry("mxfp4", 4.25, 1, 0.5, 0.1)],
    }
    result = tmp_path / "quality.json"
    result.write_text(
        json.dumps({"checkpoints": {name: {"schemes": s} for name, s in checkpoints.items()}})
    )
    monkeypatch.setattr(quality_tables, "RESULT", result)
    monkeypatch.setattr(quality_tables, "SUMMARY", {"mxfp4": "four bits"})
    assert quality_tables.whole()[2:] == [
        "| int8 | 8.125 to 8.25 | +0.0010, -0.0002 | 1.2 %, 2.0 % | 3.0 % |",
        "| mxfp4 | 4.25 | +1.0000 | 50.0 % | 10.0 % |",
    ]
    assert quality_tables.summary()[2:] == [
        "| four bits | 4.25 | +1.0000 | 50.0 % | 10.0 % |",
    ]
