import json
import sys

import pytest
from expert_parallel_tables import TABLES, lines, main

STEP = {"steps": "decode", "ranks": 4, "balancedness": 0.5, "mean_seconds": 4e-3}
RESULT = {
    "load": [{"ranks": 0, "checkpoint_bytes": 4e9, "bytes_read": [4e9, 0], "seconds": [2, 1.5]}],
    "eplb": [
        STEP
        | {"eplb": "off", "slowest_seconds": 5e-3, "seconds": {"nothing": 4e-3}, "cost": {}}
        | {"number": {"nothing": 9, "piece": 0, "switch": 0}},
        STEP
        | {"eplb": "dynamic", "slowest_seconds": 6e-3, "cost": {"piece": 0.025}}
        | {"seconds": {"nothing": 4e-3, "piece": 4.1e-3}}
        | {"number": {"nothing": 9, "piece": 3, "switch": 0}},
    ],
    "layer": [
        {"case": "a", "tokens": 4096, "seconds": {"one GPU": 1e-3, "world size 1": 1e-3}}
        | {"ranks": {"2": {"seconds": {"all_to_all": 2e-3, "all_to_all, 2 chunks": 1.5e-3}}}},
    ],
}
RESULT["layer"][0]["ranks"]["2"] |= {"travel_seconds": 1e-3, "compute_seconds": 1e-3}


def test_tables_have_the_figures():
    *_, off, dynamic = lines("eplb", RESULT["eplb"])
    assert off == "| decode | off | 4 | 0.50 | 4.00 | 5.00 | 4.00 |  |  |  |  |"
    assert dynamic.endswith("| 6.00 | 4.00 | 3 | 4.10 (+2.5%) |  |  |")
    _, _, _, whole, _, _, _, overlap = lines("layer", RESULT["layer"])
    assert whole == "| a | 4,096 | 1,000 | 1,000 | 2,000 |  |  |"
    # Of 2 ms after each other 0.5 are saved, and 1 could be.
    assert overlap == "| a | 2 | 4,096 | 1,000 | 1,000 | 2,000 | 1,500 |  | 50% |"


def test_pages_get_the_tables_that_they_ask_for(tmp_path, monkeypatch):
    result, page = tmp_path / "result.json", tmp_path / "page.md"
    result.write_text(json.dumps(RESULT))
    around = "a\n<!-- benchmarks/expert_parallel_tables.py load -->\n{}<!-- end -->\nb\n"
    page.write_text(around.format("| old |\n"))
    monkeypatch.setattr(sys, "argv", ["", str(result), "--write", str(page)])
    main()
    table = "\n".join(TABLES["load"][1](RESULT["load"])) + "\n"
    assert "| one, without ranks | 4.0 | 4.0 | 1.50 |" in table
    assert page.read_text() == around.format(table)
    page.write_text(page.read_text().replace(".py load", ".py loads"))
    with pytest.raises(KeyError):
        main()
