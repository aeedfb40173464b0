"""Every architecture against transformers: tiny random models that it wrote and moezoo loads."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from configurations import CONFIGURATIONS, MIXTRAL, MULTIMODAL, ROPE, reference
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_chunked_causal_mask

import moezoo
from moezoo.generation.paged import row_state_bytes
from moezoo.registry import list_architectures

CHUNKED_MASK = signature(create_chunked_causal_mask).parameters
TOLERANCE = 2e-5
"""Relative difference of fp32 logits, ||ours - theirs|| / ||theirs||."""
LENGTH = 13
FIRST = partial(pytest.param, marks=pytest.mark.first_configuration)
CASES = [(model_type, name) for model_type, cases in CONFIGURATIONS.items() for name in cases]


@dataclass(repr=False)
class Pair:
    """A model of transformers, the folder it wrote and moezoo's model of it."""

    model_type: str
    reference: PreTrainedModel
    folder: Path
    model: PreTrainedModel

    @property
    def forgets_length(self) -> bool:
        """Whether a token's rotation does not depend on what comes after it."""
        return not self.model.decoder.rope.depends_on_length

    @property
    def counts_padding(self) -> bool:
        """Whether what is before a sequence changes it, in transformers and so here."""
        return getattr(self.model.config, "floor_scale", LENGTH) < LENGTH

    @property
    def keeps_texts_apart(self) -> bool:
        """Whether transformers does, for texts packed into a row: some models do not give their
        masks the positions, and states need kernels of other packages."""
        mixes = self.model_type in ("afmoe", "gpt_oss") or row_state_bytes(self.model.decoder)
        return not (mixes or self.counts_padding)

    def logits(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.forget()
        return self.model(**inputs).logits, self.reference(**inputs).logits

    def forget(self) -> None:
        """Dynamic rope in transformers stays stretched until it sees a short sequence."""
        if self.forgets_length:
            return
        for model in (self.model, self.reference):
            model(torch.zeros(1, 1, dtype=torch.long))


def write(model_type: str, model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """What transformers writes, with the `model_type` that the checkpoint has on the hub."""
    model.save_pretrained(folder, **options)
    if idle_experts(model):
        without_weights_of_idle_experts(folder, model.config.n_routed_experts)
    if model_type != model.config.model_type:
        remote_code = {"AutoConfig": f"configuration_{model_type}.Config"}
        change_config(folder, model_type=model_type, auto_map=remote_code)


def idle_experts(model: PreTrainedModel) -> int:
    """LongCat's, for which transformers has weights that it does not use, unlike the hub. It does
    not load a checkpoint without them."""
    return getattr(model.config, "zero_expert_num", 0)


def without_weights_of_idle_experts(folder: Path, num_experts: int) -> None:
    file = folder / "model.safetensors"
    stored = {}
    for name, tensor in load_file(file).items():
        found = re.search(r"experts\.(\d+)\.", name)
        if found is None or int(found[1]) < num_experts:
            is_stack = name.endswith("experts.gate_up_proj")
            stored[name] = tensor[:num_experts].clone() if is_stack else tensor
    save_file(stored, file, metadata={"format": "pt"})


def change_config(folder: Path, *, remove: tuple[str, ...] = (), **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def load(folder: Path, **options: Any) -> PreTrainedModel:
    options = {"dtype": torch.float32, "device": "cpu", "progress": False} | options
    return moezoo.from_pretrained(folder, **options)


@pytest.fixture(scope="module", params=CASES, ids=[f"{m}-{n}" for m, n in CASES])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    model_type, name = request.param
    theirs = reference(model_type, CONFIGURATIONS[model_type][name])
    folder = tmp_path_factory.mktemp(f"{model_type}-{name}")
    write(model_type, theirs, folder)
    with torch.inference_mode():
        yield Pair(model_type, theirs, folder, load(folder))


def token_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


def padded(side: str) -> dict[str, torch.Tensor]:
    """Three sequences of 13, 5 and 9 tokens in one batch."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    for row, length in enumerate((LENGTH, 5, 9)):
        if side == "left":
            mask[row, : LENGTH - length] = 0
        else:
            mask[row, length:] = 0
    return {"input_ids": token_ids(3, LENGTH) * mask, "attention_mask": mask}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert difference < TOLERANCE, f"relative difference {difference:.1e}"


def test_every_registered_architecture_has_configurations() -> None:
    assert set(list_architectures()) == {*CONFIGURATIONS, *MULTIMODAL}


def test_logits(pair: Pair) -> None:
    ours, theirs = pair.logits(input_ids=token_ids(2, LENGTH))
    assert_close(ours, theirs)
    uncached = pair.model(token_ids(2, LENGTH), use_cache=False).logits
    assert_close(uncached, theirs)


@pytest.mark.first_configuration
def test_one_token(pair: Pair) -> None:
    assert_close(*pair.logits(input_ids=token_ids(1, 1)))


@pytest.mark.parametrize("side", ["left", FIRST("right")])
def test_padding(pair: Pair, side: str) -> None:
    inputs = padded(side)
    kept = inputs["attention_mask"].bool()
    ours, theirs = pair.logits(**inputs)
    assert_close(ours[kept], theirs[kept])
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    ours, theirs = pair.logits(**inputs, position_ids=positions)
    assert_close(ours[kept], theirs[kept])
    if pair.forgets_length and not pair.counts_padding:
        alone = pair.model(inputs["input_ids"][1:2][kept[1:2]][None]).logits
        assert_close(ours[1][kept[1]], alone[0])


def test_packed_texts(pair: Pair) -> None:
    """Texts in one row whose positions start anew, as `DataCollatorWithFlattening` packs them."""
    ids, lengths = token_ids(2, LENGTH), [4, 1, 8]
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.stack((positions, torch.arange(LENGTH)))
    for given in (positions[None], rows):
        ours, theirs = pair.logits(input_ids=ids, position_ids=given, use_cache=False)
        if pair.keeps_texts_apart:
            assert_close(ours, theirs)
        if pair.forgets_length:
            texts = ids[:1].split(lengths, 1)
            apart = torch.cat([pair.model(text, use_cache=False).logits for text in texts], 1)
            assert_close(ours[:1], apart)
            if given is rows:
                assert_close(ours[1:], pair.model(ids[1:], use_cache=False).logits)


@pytest.mark.first_configuration
def test_logits_to_keep(pair: Pair) -> None:
    inputs = {"input_ids": token_ids(2, LENGTH)}
    every, _ = pair.logits(**inputs)
    last, theirs = pair.logits(**inputs, logits_to_keep=3)
    assert last.shape == (2, 3, 61)
    assert_close(last, theirs)
    some, theirs = pair.logits(**inputs, logits_to_keep=torch.tensor([0, 7]))
    assert_close(some, theirs)
    assert_close(some, every[:, [0, 7]])


@pytest.mark.first_configuration
def test_inputs_embeds(pair: Pair) -> None:
    ids = token_ids(2, LENGTH)
    assert pair.model.get_input_embeddings()(ids).equal(pair.reference.get_input_embeddings()(ids))
    ours, theirs = pair.logits(inputs_embeds=torch.randn(2, LENGTH, pair.model.config.hidden_size))
    assert_close(ours, theirs)


@pytest.mark.parametrize("side", [FIRST("none"), "left"])
def test_cache_in_chunks(pair: Pair, side: str) -> None:
    """Two chunks, then one token at a time, well beyond every window."""
    if side == "none":
        ids, mask = token_ids(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    else:
        ids, mask = padded("left").values()
    pair.forget()
    whole = pair.model(ids, attention_mask=mask).logits
    ours_cache, theirs_cache = None, DynamicCache(config=pair.reference.config)
    pieces, expected = [], []
    start = 0
    for size in (4, 4, 1, 1, 1, 1, 1):
        end = start + size
        chunk = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        output = pair.model(**chunk, past_key_values=ours_cache, use_cache=True)
        ours_cache = output.past_key_values
        theirs = pair.reference(**chunk, past_key_values=theirs_cache, use_cache=True)
        assert ours_cache.get_seq_length() == end
        pieces.append(output.logits)
        expected.append(theirs.logits)
        start = end
    kept, ours = mask.bool(), torch.cat(pieces, 1)
    # All at once: a token of a delta net, whose logits are small, may differ by more on some CPUs.
    assert_close(ours[kept], torch.cat(expected, 1)[kept])
    if pair.forgets_length:
        assert_close(ours[kept], whole[kept])


def generate(pair: Pair, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pair.forget()
    return pair.model.generate(**options), pair.reference.generate(**options)


def test_greedy_tokens(pair: Pair) -> None:
    ours, theirs = generate(pair, **padded("left"), max_new_tokens=6, do_sample=False)
    assert ours.shape == (3, LENGTH + 6)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.first_configuration
def test_greedy_tokens_with_a_static_cache(pair: Pair) -> None:
    if pair.model_type == "llama4_text" and "block_sequence_ids" not in CHUNKED_MASK:
        pytest.skip("this transformers fails to make masks of chunks for static caches")
    options = {"cache_implementation": "static", "disable_compile": True, "do_sample": False}
    ours, theirs = generate(pair, **padded("left"), max_new_tokens=9, **options)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.first_configuration
def test_greedy_tokens_from_embeddings(pair: Pair) -> None:
    embeds = pair.reference.get_input_embeddings()(token_ids(2, 6))
    ours, theirs = generate(pair, inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.first_configuration
def test_beam_tokens(pair: Pair) -> None:
    ours, theirs = generate(pair, **padded("left"), max_new_tokens=5, num_beams=3, do_sample=False)
    assert ours.tolist() == theirs.tolist()


def test_every_parameter_matters(pair: Pair) -> None:
    """Logits depend on every parameter, so that the tests above would see a wrong one.

    Of those that several layers have alike, the last layer's is tried.
    """
    ids = token_ids(3, LENGTH)
    before = pair.model(ids).logits
    alike = {
        (re.sub(r"layers\.\d+", "layers", name), parameter.shape): (name, parameter)
        for name, parameter in pair.model.named_parameters()
    }
    for name, parameter in alike.values():
        stored = parameter.data.clone()
        parameter.data += torch.randn(stored.shape, generator=torch.Generator().manual_seed(3))
        change = (pair.model(ids).logits - before).norm() / before.norm()
        parameter.data.copy_(stored)
        assert change > 10 * TOLERANCE or not stored.numel(), name


@pytest.mark.first_configuration
def test_stacked_layout(pair: Pair, tmp_path: Path) -> None:
    write(pair.model_type, pair.reference, tmp_path, save_original_format=False)
    stacked = load(tmp_path).state_dict()
    per_expert = pair.model.state_dict()
    assert stacked.keys() == per_expert.keys()
    for name, tensor in stacked.items():
        assert tensor.equal(per_expert[name]), name


def test_saved_model_is_read_by_transformers(pair: Pair, tmp_path: Path) -> None:
    if idle_experts(pair.reference):
        pytest.skip("transformers asks for weights of experts that do nothing")
    pair.model.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    expected = pair.reference.state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    for name, tensor in theirs.state_dict().items():
        assert tensor.equal(expected[name]), name
    ids = token_ids(2, LENGTH)
    assert_close(pair.logits(input_ids=ids)[0], theirs.eval()(ids).logits)


@pytest.mark.first_configuration
def test_saved_model_is_read_back(pair: Pair, tmp_path: Path) -> None:
    pair.model.save_pretrained(tmp_path)
    again = load(tmp_path)
    ours, before = again.config.to_dict(), pair.model.config.to_dict()
    assert ours | {"_name_or_path": None} == before | {"_name_or_path": None}
    ids = token_ids(2, LENGTH)
    assert again(ids).logits.equal(pair.logits(input_ids=ids)[0])


@pytest.mark.first_configuration
def test_old_spelling_of_the_config(pair: Pair, tmp_path: Path) -> None:
    """Checkpoints on the hub have `rope_theta` and `rope_scaling` in place of `rope_parameters`."""
    write(pair.model_type, pair.reference, tmp_path)
    if pair.model_type == "kimi_linear":
        pytest.skip("nothing is rotated")
    rope = dict(pair.reference.config.rope_parameters)
    if "full_attention" in rope:
        pytest.skip("the old spelling has no rotation for each kind of layer")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    partial = {k: rope.pop(k) for k in ("partial_rotary_factor",) if k in rope}
    if pair.model_type == "gpt_oss" and kind == "default":
        pytest.skip("where its config names no scaling, it has that of the releases")
    if pair.model_type == "cohere2_moe" and kind != "default":
        pytest.skip("transformers' own config drops the scaling")
    scaling = None if kind == "default" else rope | {"type": kind}
    old = {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"} | partial
    change_config(tmp_path, remove=("rope_parameters", "dtype", "transformers_version"), **old)
    ids = token_ids(2, LENGTH)
    assert load(tmp_path)(ids).logits.equal(pair.logits(input_ids=ids)[0])


@pytest.mark.parametrize("rope", ["yarn", "dynamic"])
def test_rope_of_mixtral_without_head_dim(tmp_path: Path, rope: str) -> None:
    """Mixtral's configs say nothing of the head's width, on which transformers' yarn stumbles."""
    spelt_out = MIXTRAL | {"head_dim": 10, "rope_parameters": ROPE[rope]}
    theirs = reference("mixtral", spelt_out | {"max_position_embeddings": 6})
    write("mixtral", theirs, tmp_path)
    change_config(tmp_path, remove=("head_dim",))
    ids = token_ids(2, LENGTH)
    with torch.inference_mode():
        model = load(tmp_path)
        assert_close(model(ids).logits, theirs(ids).logits)
        greedy = {"max_new_tokens": 5, "do_sample": False}
        assert model.generate(ids, **greedy).equal(theirs.generate(ids, **greedy))
    assert model.config.head_dim is None


@pytest.mark.first_configuration
def test_sixteen_bits(pair: Pair) -> None:
    """In bf16 both stay as close to fp32 as rounding lets them."""
    ids = token_ids(4, 8)
    exact, _ = pair.logits(input_ids=ids)
    model = load(pair.folder, dtype=torch.bfloat16)
    ours = model(ids).logits
    assert ours.dtype == torch.bfloat16
    fixed = {n: p.dtype for n, p in model.named_parameters() if p.dtype != torch.bfloat16}
    assert set(fixed.values()) <= {torch.float32}
    gate = ["gate"] if pair.model_type == "ernie4_5_moe" else []
    assert {name.split(".")[-1] for name in fixed} <= {"correction_bias", *gate}
    # Tokens whose routing flips move far, the others by rounding: the median token says which.
    differences = (ours.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert differences.median() < 0.06
