"""The model object, with the trained model of the package: what users of transformers expect."""

import copy
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    StaticCache,
    pipeline,
)

import moezoo
from moezoo.assets import tiny_model
from moezoo.layers.mask import packed_positions

STORY = (
    "The old fisherman had promised his daughter a kite. He folded the paper twice, tied it to a"
    " thin stick of willow and let her paint it yellow. On Sunday they walked up the hill behind"
    " the church, where the wind never slept. The kite rose at once. It pulled so hard that she"
    " laughed and held on with both hands, and the gulls came near to see what kind of bird it was."
    " When the string broke, nobody was sad. It flew over the harbour, over the last boat, and"
    " somewhere far away, she was sure, another child would find it in the morning."
)
PROMPTS = ["Once upon a time there was a little fox", "The boat", "In the morning, the king said"]


class Pair(NamedTuple):
    ours: PreTrainedModel
    theirs: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(dtype: torch.dtype) -> Pair:
    folder = tiny_model()
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager"
    )
    ours = moezoo.from_pretrained(folder, dtype=dtype, device="cpu", progress=False)
    return Pair(ours, theirs, AutoTokenizer.from_pretrained(folder, padding_side="left"))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with torch.inference_mode():
        yield load(torch.float32)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def test_is_a_model_of_transformers(pair: Pair) -> None:
    model = pair.ours
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, GenerationMixin)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert type(model.config) is Qwen3MoeConfig
    assert model.config.num_experts == 16
    assert model.can_generate()
    assert not model.training
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert model.num_parameters() == pair.theirs.num_parameters() == 6_975_488
    assert model.get_input_embeddings().weight.shape == (4096, 256)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "Qwen3Moe" in repr(model)


def test_generation_config_is_the_checkpoints(pair: Pair) -> None:
    settings = pair.ours.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, 0.8, 0.95)
    assert settings.eos_token_id == settings.pad_token_id == 0


def test_dtype_defaults_to_the_checkpoints() -> None:
    model = moezoo.from_pretrained(tiny_model(), device="cpu", progress=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_loads_inside_inference_mode() -> None:
    with torch.inference_mode():
        model = moezoo.from_pretrained(tiny_model(), dtype="float32", device="cpu", progress=False)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.get_input_embeddings().weight.data.mul_(2)


def test_loss_on_text(pair: Pair) -> None:
    ids = pair.tokenizer(STORY, return_tensors="pt").input_ids
    assert ids.shape[1] > 100
    ours, theirs = (model(ids, labels=ids).loss for model in (pair.ours, pair.theirs))
    assert ours.dtype == torch.float32
    assert abs(ours - theirs) < 1e-4
    assert 2 < ours < 5


def test_loss_on_text_in_sixteen_bits() -> None:
    pair = load(torch.bfloat16)
    ids = pair.tokenizer(STORY, return_tensors="pt").input_ids
    ours, theirs = (model(ids, labels=ids).loss for model in (pair.ours, pair.theirs))
    assert ours.dtype == theirs.dtype
    assert abs(ours - theirs) < 0.01


def test_labels_are_shifted_and_masked_as_in_transformers(pair: Pair) -> None:
    batch = pair.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for more in ({}, {"num_items_in_batch": 40}):
        ours, theirs = (m(**batch, labels=labels, **more) for m in (pair.ours, pair.theirs))
        assert abs(ours.loss - theirs.loss) < 1e-4
        kept = batch.attention_mask.bool()
        assert difference(ours.logits[kept], theirs.logits[kept]) < 2e-5
    assert pair.ours(**batch).loss is None


def test_hidden_states(pair: Pair) -> None:
    ids = pair.tokenizer(STORY, return_tensors="pt").input_ids
    ours, theirs = (m(ids, output_hidden_states=True) for m in (pair.ours, pair.theirs))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 7
    for our, their in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(our, their) < 2e-5


def test_tuples(pair: Pair) -> None:
    ids = torch.tensor([[5, 6, 7]])
    logits, cache = pair.ours(ids, return_dict=False, use_cache=True)
    assert logits.equal(pair.ours(ids).logits)
    assert cache.get_seq_length() == 3
    assert len(pair.ours(ids, return_dict=False, use_cache=False)) == 1


def test_logits_of_chosen_positions(pair: Pair) -> None:
    ids = torch.arange(30, 42).view(2, 6)
    every = pair.ours(ids).logits
    each = torch.tensor([[5, 0, 2], [1, 1, 4]])
    chosen = pair.ours(ids, logits_to_keep=each).logits
    assert difference(chosen, torch.stack([every[0, each[0]], every[1, each[1]]])) < 2e-5
    mask = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0]]).bool()
    assert difference(pair.ours(ids, logits_to_keep=mask).logits, every[mask]) < 2e-5


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_four_dimensional_mask(pair: Pair, kind: str) -> None:
    """Two texts packed into one row, which must not see each other."""
    ids = torch.tensor([[11, 12, 13, 14, 21, 22, 23]])
    text = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    allowed = (text[:, None] == text) & torch.ones(7, 7, dtype=torch.bool).tril()
    mask = allowed[None, None]
    if kind == "float":
        mask = torch.zeros(1, 1, 7, 7).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    packed = pair.ours(ids, attention_mask=mask, position_ids=positions).logits
    assert difference(packed[:, :4], pair.ours(ids[:, :4]).logits) < 2e-5
    assert difference(packed[:, 4:], pair.ours(ids[:, 4:]).logits) < 2e-5


def test_loss_of_flattened_texts(pair: Pair) -> None:
    """As transformers' collator packs them for training."""
    texts = [{"input_ids": pair.tokenizer(text)["input_ids"]} for text in (STORY, *PROMPTS)]
    batch = DataCollatorWithFlattening(return_tensors="pt")(texts)
    ours, theirs = (model(**batch, use_cache=False) for model in (pair.ours, pair.theirs))
    assert difference(ours.logits, theirs.logits) < 2e-5
    assert abs(ours.loss - theirs.loss) < 1e-5
    lengths = [len(text["input_ids"]) for text in texts]
    for text, logits in zip(texts, ours.logits.split(lengths, 1), strict=True):
        assert difference(logits, pair.ours(torch.tensor([text["input_ids"]])).logits) < 2e-5


def test_positions_that_count_on_need_no_mask(pair: Pair) -> None:
    assert packed_positions(torch.arange(7, 12)[None]) is None
    assert packed_positions(torch.tensor([[3]])) is None
    ids = torch.arange(30, 42)[None]
    counted = pair.ours(ids, position_ids=torch.arange(12)[None], use_cache=False).logits
    assert counted.equal(pair.ours(ids, use_cache=False).logits)


def test_mask_with_holes(pair: Pair) -> None:
    ids = torch.arange(30, 42).view(1, 12)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1]])
    ours, theirs = (m(ids, attention_mask=mask).logits for m in (pair.ours, pair.theirs))
    assert difference(ours[mask.bool()], theirs[mask.bool()]) < 2e-5


@pytest.mark.parametrize("kind", ["dynamic", "config", "static"])
def test_caches_of_transformers(pair: Pair, kind: str) -> None:
    ids = pair.tokenizer(STORY, return_tensors="pt").input_ids[:, :40]
    whole = pair.ours(ids, use_cache=False)
    assert whole.past_key_values is None
    config = pair.ours.config
    cache = {
        "dynamic": lambda: DynamicCache(),
        "config": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=64),
    }[kind]()
    pieces = []
    for chunk in (ids[:, :25], ids[:, 25:39], ids[:, 39:]):
        output = pair.ours(chunk, past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache
        pieces.append(output.logits)
    assert int(cache.get_seq_length()) == 40
    assert difference(torch.cat(pieces, 1), whole.logits) < 2e-5


def test_copied_cache_is_independent(pair: Pair) -> None:
    """One prefix, two continuations."""
    ids = torch.arange(50, 60).view(1, 10)
    prefix = pair.ours(ids, use_cache=True).past_key_values
    twin = copy.deepcopy(prefix)
    first = pair.ours(torch.tensor([[7, 8]]), past_key_values=prefix).logits
    second = pair.ours(torch.tensor([[9, 9]]), past_key_values=twin).logits
    for logits, end in ((first, [[7, 8]]), (second, [[9, 9]])):
        whole = pair.ours(torch.cat((ids, torch.tensor(end)), 1)).logits[:, -2:]
        assert difference(logits, whole) < 2e-5


def test_pipeline(pair: Pair) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    ours, theirs = (
        pipeline("text-generation", model=model, tokenizer=pair.tokenizer)
        for model in (pair.ours, pair.theirs)
    )
    expected = theirs(PROMPTS, **options)
    assert ours(PROMPTS, **options) == expected
    assert ours(PROMPTS, batch_size=3, **options) == expected
    ((only,),) = ours(PROMPTS[:1], return_full_text=False, **options)
    assert PROMPTS[0] + only["generated_text"] == expected[0][0]["generated_text"]


def test_pipeline_says_nothing_of_an_unsupported_model(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    transformers.logging.enable_propagation()
    try:
        pipeline("text-generation", model=pair.ours, tokenizer=pair.tokenizer)
    finally:
        transformers.logging.disable_propagation()
    assert "not supported" not in caplog.text


@pytest.mark.parametrize("option", ["output_attentions", "output_router_logits"])
def test_what_the_layers_do_not_return(pair: Pair, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=True"):
        pair.ours(torch.tensor([[1]]), **{option: True})


def test_router_logits_that_the_config_asks_for(pair: Pair) -> None:
    ids = torch.tensor([[1, 2, 3]])
    pair.ours.config.output_router_logits = True
    try:
        with pytest.raises(ValueError, match="output_router_logits=True"):
            pair.ours(ids)
        without = pair.ours(ids, output_router_logits=False).logits
    finally:
        pair.ours.config.output_router_logits = False
    assert without.equal(pair.ours(ids).logits)


def test_a_number_of_items_without_labels_is_for_a_loss_elsewhere(pair: Pair) -> None:
    """As Trainer passes it with label smoothing or a loss function."""
    ids = torch.tensor([[1, 2, 3]])
    output = pair.ours(ids, num_items_in_batch=torch.tensor(2))
    assert output.loss is None
    assert output.logits.equal(pair.ours(ids).logits)


def test_wrong_calls(pair: Pair) -> None:
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        pair.ours()
    with pytest.raises(TypeError, match="atention_mask"):
        pair.ours(torch.tensor([[1]]), atention_mask=torch.tensor([[1]]))
    with pytest.raises(TypeError, match=r"moezoo\.from_pretrained"):
        type(pair.ours).from_pretrained(tiny_model())


@pytest.mark.parametrize("shape", [(0, 5), (1, 0), (5,)])
def test_no_tokens_are_refused_by_their_shape(pair: Pair, shape: tuple[int, ...]) -> None:
    message = re.escape(f"input_ids is {list(shape)}, expected [B, T] with a row and a token")
    with pytest.raises(ValueError, match=message):
        pair.ours(torch.zeros(shape, dtype=torch.long))
    if len(shape) == 2:
        with pytest.raises(ValueError, match=message):
            pair.ours.generate(torch.zeros(shape, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"inputs_embeds is \[.*, 8\], expected \[B, T, H\]"):
        pair.ours(inputs_embeds=torch.zeros(*shape, 8))


@pytest.mark.parametrize("shape", [(1, 3), (2, 11), (1, 12), (11,), (1, 1, 11)])
def test_masks_of_another_shape_are_refused(pair: Pair, shape: tuple[int, ...]) -> None:
    ids = torch.arange(5, 16)[None]
    cache = pair.ours(ids[:, :4], use_cache=True).past_key_values
    message = re.escape(f"mask is {list(shape)}, expected [B, past + T], which is [1, 11]")
    for number in (0, 1):
        mask = torch.full(shape, number)
        with pytest.raises(ValueError, match=message):
            pair.ours(ids, attention_mask=mask)
        with pytest.raises(ValueError, match=message):
            pair.ours(ids[:, 4:], attention_mask=mask, past_key_values=cache)


def test_what_the_config_says_of_outputs_is_a_default(pair: Pair) -> None:
    ids = torch.tensor([[1, 2, 3]])
    pair.ours.config.output_hidden_states = True
    try:
        assert len(pair.ours(ids).hidden_states) == pair.ours.config.num_hidden_layers + 1
        assert pair.ours(ids, output_hidden_states=False).hidden_states is None
    finally:
        pair.ours.config.output_hidden_states = False


def test_token_type_ids_are_ignored_as_in_transformers(pair: Pair) -> None:
    ids = torch.tensor([[1, 2, 3]])
    typed = pair.ours(ids, token_type_ids=torch.ones_like(ids)).logits
    assert typed.equal(pair.ours(ids).logits)


def test_embeddings_can_be_resized(tmp_path: Path) -> None:
    model = load(torch.float32).ours
    model.resize_token_embeddings(4100, mean_resizing=False)
    assert model.decoder.lm_head is None
    assert model(torch.tensor([[4099]])).logits.shape == (1, 1, 4100)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).vocab_size == 4100


def test_save_takes_the_arguments_of_transformers(pair: Pair, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    theirs = inspect.signature(PreTrainedModel.save_pretrained).parameters
    known = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    defaults = {name: theirs[name].default for name in known[1:]}
    pair.ours.save_pretrained(tmp_path / "a", **defaults, safe_serialization=True)
    pair.ours.save_pretrained(tmp_path / "b", True, None, False, "2MB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 5
    for folder in (tmp_path / "a", tmp_path / "b"):
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert difference(saved(ids).logits, pair.ours(ids).logits) < 2e-5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("state_dict", {"a": torch.ones(1)}),
        ("push_to_hub", True),
        ("safe_serialization", False),
        ("variant", "fp16"),
        ("save_original_format", False),
    ],
)
def test_save_refuses_by_name_what_it_does_not_do(
    pair: Pair, tmp_path: Path, option: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=f"{option}="):
        pair.ours.save_pretrained(tmp_path / "new", **{option: value})
    assert not (tmp_path / "new").exists()
    with pytest.raises(TypeError, match="max_shard"):
        pair.ours.save_pretrained(tmp_path / "new", max_shards=3)


def test_continuous_batching_of_transformers_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"moezoo\.generate"):
        pair.ours.generate_batch([[1, 2]])


def test_hooks_see_tensors(pair: Pair) -> None:
    """Calibration and activation patching hook the inputs of attention and experts."""
    seen = []
    layer = pair.ours.decoder.layers[0]
    hooked = (layer.attn, layer.attn.qkv, layer.mlp)
    handles = [
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for module in hooked
    ]
    pair.ours(torch.tensor([[1, 2, 3]]))
    for handle in handles:
        handle.remove()
    assert [tuple(x.shape[:2]) for x in seen] == [(1, 3)] * 3
