"""Ranks generate together: the tokens of one process, whoever has the prompts."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from ranks import results, run
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

import moezoo
from moezoo import Parallel
from moezoo.assets import tiny_model
from moezoo.errors import ExpertMapError, RankError
from moezoo.generation import on_engine
from moezoo.generation.engine import Engine
from moezoo.parallel import dispatch as dispatchers
from moezoo.parallel.mesh import Mesh

TEXTS = (
    "The little dog",
    "By the sea there lived an old woman who had three sons, and the eldest of them",
    "The king said",
    "Once upon a time " * 12,
    "One day",
    "A",
    "He was a",
)
PROMPTS = [{"id": i, "prompt": text} for i, text in enumerate(TEXTS)]
SETTINGS: tuple[dict[str, Any], ...] = (
    # Prompts take several passes, and "," ends them at different steps.
    {"max_new_tokens": 10, "do_sample": False, "batch_tokens": 16, "eos_token_id": 12},
    # Fewer rows than prompts, so that some begin while others are in the middle.
    {"max_new_tokens": 7, "batch_size": 2, "do_sample": True, "seed": 3, "temperature": 0.9}
    | {"repetition_penalty": 1.3},
)


def load(parallel: Parallel | None) -> Any:
    return moezoo.from_pretrained(tiny_model(), dtype="float32", device="cpu", parallel=parallel)


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_model())


def complete(model: Any, prompts: list[dict[str, Any]], **settings: Any) -> dict[int, Any]:
    completions = moezoo.generate(model, tokenizer(), prompts, **settings)
    return {c.id: (c.token_ids, c.finish_reason) for c in completions}


@cache
def in_one_process() -> list[dict[int, Any]]:
    model = load(None)
    return [complete(model, PROMPTS, **settings) for settings in SETTINGS]


def share(rank: int, size: int) -> list[dict[str, Any]]:
    """Rank 1 has none, the others have what comes."""
    others = [r for r in range(size) if r != 1]
    return [p for i, p in enumerate(PROMPTS) if others[i % len(others)] == rank]


def generating(rank: int, size: int) -> list[Any]:
    found: list[Any] = []
    for parallel in (
        Parallel(size, dispatch="all_gather"),
        Parallel(size, dispatch="all_to_all", placement="round_robin"),
        Parallel(size, dispatch="all_to_all", capacity=5),
    ):
        model = load(parallel)
        prompts = PROMPTS if parallel.dispatch == "all_gather" else share(rank, size)
        found.append([complete(model, prompts, **settings) for settings in SETTINGS])
    return found


def test_generate_as_one_process_does() -> None:
    size = 3
    expected = in_one_process()
    assert {reason for _, reason in expected[0].values()} == {"stop", "length"}
    found = results(size, generating, size)
    for rank, (gathered, own, limited) in enumerate(found):
        assert gathered == expected
        for given in (own, limited):
            assert [given[0].keys(), given[1].keys()] == [
                {prompt["id"] for prompt in share(rank, size)}
            ] * 2
    for dispatch in (1, 2):
        for i in range(len(SETTINGS)):
            merged: dict[int, Any] = {}
            for rank in range(size):
                merged |= found[rank][dispatch][i]
            assert merged == expected[i]


IDS = torch.arange(40).view(4, 10) * 7 + 5
MODEL_SETTINGS: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.8},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": True, "num_beams": 2},
    {"do_sample": True, "prefill_chunk_size": 4},
)


def generate_each(model: Any, ids: Tensor, settings: tuple[dict[str, Any], ...]) -> list[Any]:
    return [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)
        for options in settings
    ]


def same_prompts(rank: int) -> list[Any]:
    model = load(Parallel(2, dispatch="all_gather"))
    torch.manual_seed(rank)
    return generate_each(model, IDS, MODEL_SETTINGS)


def test_model_generate_with_the_same_prompts() -> None:
    """Draws are those of the first rank's seed, on moezoo's loop and on transformers' own."""
    model = load(None)
    torch.manual_seed(0)
    expected = generate_each(model, IDS, MODEL_SETTINGS)
    for found in results(2, same_prompts):
        for own, theirs in zip(found, expected, strict=True):
            assert torch.equal(own, theirs)


def own_prompts(rank: int) -> list[Any]:
    """No rows on rank 1, and the first rank is done before the last."""
    model = load(Parallel(3))
    ids = IDS[:0] if rank == 1 else IDS[: rank + 1, rank:]
    found = []
    for _ in range(2):
        mask = torch.ones_like(ids)
        found.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=3 + rank, do_sample=False)
        )
    with pytest.raises(ValueError, match=r"beams, assisted decoding .* need one process"):
        model.generate(ids, max_new_tokens=2, num_beams=2)
    # Nobody is left waiting.
    settings = {"max_new_tokens": 3 + rank, "do_sample": False, "return_dict_in_generate": True}
    found += [model.generate(input_ids=ids, **settings | {"return_dict_in_generate": False})]
    found += [model.generate(ids, **settings)]
    return found


def test_model_generate_with_prompts_of_its_own() -> None:
    model = load(None)
    for rank, found in enumerate(results(3, own_prompts)):
        if rank == 1:
            expected = IDS[:0]
        else:
            ids = IDS[: rank + 1, rank:]
            expected = model.generate(ids, max_new_tokens=3 + rank, do_sample=False)
        output = found.pop()
        assert isinstance(output, GenerateDecoderOnlyOutput)
        assert isinstance(output.past_key_values, DynamicCache)
        for sequences in (*found, output.sequences):
            assert torch.equal(sequences, expected)


def passes(rank: int) -> tuple[list[int | None], list[tuple[int, ...]], int]:
    """How tokens travelled in each layer and pass, what scores are, and how often ranks agreed."""
    model = load(Parallel(3))
    seen: list[int | None] = []
    told: list[str] = []
    dispatch, numbers = dispatchers.AllToAll.dispatch, Mesh.numbers

    def agreeing(self: Any, own: Any, doing: str) -> Any:
        told.append(doing)
        return numbers(self, own, doing)

    Mesh.numbers = agreeing  # type: ignore[method-assign]

    def watched(self: Any, x: Tensor, topk_weights: Tensor, slots: Tensor) -> Any:
        seen.append(self.capacity)
        return dispatch(self, x, topk_weights, slots)

    dispatchers.AllToAll.dispatch = watched  # type: ignore[method-assign]
    complete(model, share(rank, 3), max_new_tokens=4, do_sample=False, batch_tokens=16)
    texts = list(TEXTS[: 2 * rank])
    scores = moezoo.score(model, tokenizer(), texts, batch_size=1)
    return seen, [score.token_ids for score in scores], told.count(dispatchers.BEGINNING)


def test_ranks_make_the_same_passes() -> None:
    (first, none, agreed), (second, *_), (third, four, _) = results(3, passes)
    assert first == second == third
    assert None in first and {1, 2, 3, 4} & set(first)
    assert (len(none), len(four)) == (0, 4)
    # Once in each pass of six layers, and once to end each of the two calls.
    assert agreed == len(first) // 6 + 2


def on_gpus(rank: int, size: int) -> list[Any]:
    torch.use_deterministic_algorithms(False)
    found: list[Any] = []
    for dispatch in ("all_gather", "all_to_all") if size > 1 else (None,):
        parallel = None if dispatch is None else Parallel(size, dispatch=dispatch)
        model = moezoo.from_pretrained(tiny_model(), dtype="float32", parallel=parallel)
        own = dispatch == "all_to_all"
        for prompts in (share(rank, 2), PROMPTS[rank::2]) if own else (PROMPTS,) * 2:
            found += [complete(model, prompts, **settings) for settings in SETTINGS]
        ids = IDS.cuda()[: 4 * (1 - rank)] if own else IDS.cuda()
        for _ in range(2):  # the second has the engine of the first
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8}
            found.append(model.generate(ids, **options, do_sample=False).cpu())
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus() -> None:
    (expected,) = results(1, on_gpus, 1)
    (first, second) = results(2, on_gpus, 2)
    number = len(expected)
    for i, one in enumerate(expected):
        own = first[number + i], second[number + i]
        if isinstance(one, Tensor):
            for sequences in (first[i], second[i], own[0]):
                assert torch.equal(sequences, one)
            assert torch.equal(own[1], IDS[:0])
        else:
            assert first[i] == second[i] == one
            assert own[0] | own[1] == one


class Graph:
    """A CUDA graph's stand-in: a replay runs again what was recorded."""

    def __init__(self, run: Callable[[], Any], result: Any) -> None:
        self._run, self._result = run, result

    def replay(self) -> None:
        new = self._run()
        if self._result is not None:
            self._result.copy_(new)


class Recording(Engine):
    """Records its steps as it would on a GPU: the warm-up runs, and so do replays."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.captures = True
        self.recorded: list[object] = []

    def _record(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        self.recorded.append(getattr(run, "func", "step"))
        run()
        result = run()
        return Graph(run, result), result

    def _capture(self, batch: int, sampler: Any) -> tuple[Any, Any]:
        state = [self.ids, self.lengths, *sampler.state()]
        before = [x.clone() for x in state]
        recorded = self._record(partial(self._step_of_rows, batch, sampler))
        for x, old in zip(state, before, strict=True):
            x.copy_(old)
        return recorded

    def _step_of_rows(self, batch: int, sampler: Any) -> Tensor:
        """Rows without a sequence are for kernels only; they would be at the end."""
        logits = torch.zeros(batch, self.decoder.embed.num_embeddings)
        if rows := int((self.lengths > 0).sum()):
            logits[:rows] = self._step(rows, sampler)
        else:
            self.peers.step_without_tokens(self.decoder)
        return logits


def recording(rank: int) -> tuple[dict[int, Any], int]:
    made: list[Recording] = []

    def engine(*args: Any, **options: Any) -> Recording:
        made.append(Recording(*args, **options))
        return made[-1]

    on_engine.Engine = engine  # type: ignore[assignment, misc]
    found = complete(load(Parallel(3)), share(rank, 3), **SETTINGS[0])
    return found, len(made[0].recorded)


def test_ranks_record_at_the_same_time() -> None:
    """What is recorded runs as well, so another order would end in a time-out."""
    found = results(3, recording)
    assert {i: c for completions, _ in found for i, c in completions.items()} == in_one_process()[0]
    assert len({number for _, number in found}) == 1


def different(rank: int, case: str) -> None:
    gathers = case in ("prompts", "lengths", "model.generate")
    parallel = Parallel(
        2,
        dispatch="all_gather" if gathers else "all_to_all",
        timeout=6,
        capacity=5 if case == "capacity" else None,
    )
    model = load(parallel)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    prompts = PROMPTS[:2]
    if case == "prompts":
        prompts = PROMPTS[rank : rank + 2]
    elif case == "lengths":
        settings["max_new_tokens"] += rank
    elif case == "batch_tokens":
        settings["batch_tokens"] = 16 + rank
    elif case == "engine":
        settings["no_repeat_ngram_size"] = 2
    elif case == "capacity":
        with pytest.raises(ValueError, match=r"rank 1 has 6 tokens .* the capacity is 5; give"):
            model.generate(IDS[: 2 - rank, : 2 + 4 * rank], **settings)
        list(moezoo.score(model, tokenizer(), TEXTS[1 : 1 + rank]))
    elif case == "model.generate":
        model.generate(IDS + rank, **settings)
    elif case == "dies" and rank == 1:
        raise RuntimeError("lost")
    complete(model, prompts, **settings)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("prompts", ExpertMapError, "ranks 0 and 1 generate from other prompts or with other"),
        ("lengths", ExpertMapError, "ranks 0 and 1 generate from other prompts or with other"),
        ("model.generate", ExpertMapError, "ranks 0 and 1 generate from other prompts"),
        ("batch_tokens", ExpertMapError, "batch_tokens is 16 on rank 0 and 17 on rank 1; give all"),
        ("capacity", ValueError, "rank 1 has 20 tokens in a forward pass, and the capacity is 5"),
        ("engine", ValueError, "settings that moezoo's engine does not do"),
    ],
)
def test_different_arguments(case: str, error: type[Exception], message: str) -> None:
    for raised in run(2, different, case):
        with pytest.raises(error, match=message):
            raise raised


def test_a_rank_that_does_not_generate() -> None:
    survivor, failed = run(2, different, "dies")
    assert isinstance(failed, RuntimeError)
    with pytest.raises(RankError, match="rank 1 did not come while comparing the settings"):
        raise survivor
