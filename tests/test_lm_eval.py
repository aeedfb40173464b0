"""lm-eval's HFLM around the model: the same numbers as around transformers' model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moezoo
from moezoo.assets import tiny_model

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
tasks = pytest.importorskip("lm_eval.api.task", reason="lm_eval is not installed")
huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed")

QUESTIONS = [
    ("The dog was hungry, so it ate the", ["bone", "window", "Tuesday"]),
    ("At night the sky was full of", ["stars", "shoes"]),
    ("She opened the door with a", ["key", "cloud", "spoon", "song"]),
    ("The little girl was sad because her kite had flown", ["away", "bread"]),
    ("It began to rain, and everybody got", ["wet", "old", "seven"]),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data sets come from files alone, and their cache goes where the test's files go."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def task(name: str, folder: Path, **settings: Any) -> Any:
    rows = [
        {"question": question, "choices": choices, "answer": 0, "text": f"{question} {choices[0]}."}
        for question, choices in QUESTIONS
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
    }
    return tasks.ConfigurableTask(config=common | settings)


def all_tasks(folder: Path) -> list[Any]:
    return [
        task(
            "choices",
            folder,
            output_type="multiple_choice",
            doc_to_text="{{question}}",
            doc_to_choice="{{choices}}",
            doc_to_target="{{answer}}",
            metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        ),
        task(
            "perplexity",
            folder,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        ),
        task(
            "continue",
            folder,
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="{{choices[0]}}",
            generation_kwargs={"until": ["."], "max_gen_toks": 8, "do_sample": False},
            metric_list=[{"metric": "exact_match"}],
        ),
    ]


def evaluate(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    lm = huggingface.HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(tiny_model()),
        batch_size=3,
        max_length=128,
    )
    none_of_its_own = lm_eval.tasks.TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(
        lm, tasks=all_tasks(folder), task_manager=none_of_its_own, bootstrap_iters=0
    )


def answers(results: dict[str, Any], name: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in results["samples"][name]]


def test_same_results_as_transformers(tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_model(), dtype=torch.float32, experts_implementation="eager"
    )
    ours = moezoo.from_pretrained(tiny_model(), dtype="float32", device="cpu", progress=False)
    our, their = evaluate(ours, tmp_path), evaluate(theirs, tmp_path)
    for name in ("choices", "perplexity", "continue"):
        assert len(our["samples"][name]) == len(QUESTIONS)
        for metric, value in their["results"][name].items():
            if isinstance(value, float):
                assert our["results"][name][metric] == pytest.approx(value, rel=1e-4), metric
    assert our["results"]["choices"]["acc,none"] > 0.5
    assert answers(our, "continue") == answers(their, "continue")
    likelihoods = (
        torch.tensor([choice[0] for row in answers(results, "choices") for choice in row])
        for results in (our, their)
    )
    torch.testing.assert_close(*likelihoods, atol=1e-3, rtol=1e-4)
