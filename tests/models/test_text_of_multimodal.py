"""The text models in multimodal checkpoints, against transformers' whole model without an image."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from configurations import MULTIMODAL, VISION, randomize
from hub_writers import compressed_tensors
from safetensors.torch import load_file, save_file
from test_oracle import assert_close, change_config, load, padded, token_ids

import moezoo
from moezoo.errors import CheckpointError, UnsupportedArchitectureError
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import Int4


def whole(model_type: str, **options: object) -> transformers.PreTrainedModel:
    text_type = {"kimi_k25": "deepseek_v3"}.get(model_type, f"{model_type}_text")
    options = {"tie_word_embeddings": False} | options
    config = transformers.AutoConfig.for_model(
        model_type,
        text_config=MULTIMODAL[model_type] | {"model_type": text_type} | options,
        vision_config=VISION[model_type],
        **options,
    )
    config.text_config.pad_token_id = 0
    model = transformers.AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    randomize(model, 0)
    return model.eval()


def write(model: transformers.PreTrainedModel, folder: Path, **options: bool) -> None:
    """As the hub has it: transformers calls the layers of Kimi K2.5 so as it calls those of its
    model of images."""
    model.save_pretrained(folder, **options)
    file = folder / "model.safetensors"
    names = {
        name: re.sub(r"^(language_model\.model|model\.language_model)\.blocks", r"\1.layers", name)
        for name in load_file(file)
    }
    stored = {names[name]: tensor for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})


@pytest.fixture(params=MULTIMODAL)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("per_expert", [True, False])
@torch.inference_mode()
def test_the_text_model_computes_what_the_whole_does(
    model_type: str, per_expert: bool, tmp_path: Path
) -> None:
    theirs = whole(model_type)
    write(theirs, tmp_path, save_original_format=per_expert)
    ours = load(tmp_path)
    inputs = padded("left")
    kept = inputs["attention_mask"].bool()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    axes = positions.expand(3, -1, -1) if model_type.startswith("qwen") else positions
    expected = theirs(**inputs, position_ids=axes).logits
    assert_close(ours(**inputs, position_ids=positions).logits[kept], expected[kept])
    greedy = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    ids = token_ids(2, 11)
    assert ours.generate(ids, **greedy).tolist() == theirs.generate(ids, **greedy).tolist()


def test_experts_as_the_hub_has_them(tmp_path: Path) -> None:
    """Transposed, which transformers reads and does not write."""
    theirs = whole("qwen3_vl_moe")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    for name in stored:
        if name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = stored[name].mT.contiguous()
    save_file(stored, file, metadata={"format": "pt"})
    ids = token_ids(2, 11)
    with torch.inference_mode():
        assert_close(load(tmp_path)(ids).logits, theirs(ids).logits)


def test_experts_of_which_nobody_can_tell_the_order(tmp_path: Path) -> None:
    whole("qwen3_vl_moe", moe_intermediate_size=10).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match="moe_intermediate_size"):
        load(tmp_path)


@torch.inference_mode()
def test_what_is_saved_is_a_text_model_that_transformers_reads(
    model_type: str, tmp_path: Path
) -> None:
    theirs = whole(model_type)
    write(theirs, tmp_path / "whole")
    load(tmp_path / "whole").save_pretrained(tmp_path / "text")
    text, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "text",
        dtype=torch.float32,
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    ids = token_ids(2, 11)
    assert_close(text.eval()(ids).logits, theirs(ids).logits)
    assert_close(load(tmp_path / "text")(ids).logits, theirs(ids).logits)


@torch.inference_mode()
def test_the_whole_config_says_whether_the_head_is_the_embedding(
    model_type: str, tmp_path: Path
) -> None:
    theirs = whole(model_type, tie_word_embeddings=True)
    write(theirs, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change_config(tmp_path, text_config=config["text_config"] | {"tie_word_embeddings": False})
    ids = token_ids(2, 11)
    ours = load(tmp_path)
    assert ours.decoder.lm_head is None
    assert_close(ours(ids).logits, theirs(ids).logits)


def test_an_embedding_that_is_no_head_unties(model_type: str, tmp_path: Path) -> None:
    theirs = whole(model_type)
    write(theirs, tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    ids = token_ids(2, 11)
    with torch.inference_mode():
        assert_close(load(tmp_path)(ids).logits, theirs(ids).logits)


def test_quantised_while_it_loads_and_inspected(model_type: str, tmp_path: Path) -> None:
    write(whole(model_type), tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    if model_type == "qwen3_5_moe":
        stored["mtp.layers.0.mlp.gate.weight"] = torch.ones(1)
    save_file(stored, file, metadata={"format": "pt"})
    report = moezoo.inspect(tmp_path)
    assert report.supported and report.model_type == model_type
    assert load(tmp_path, quantization="int8_w8a16")(token_ids(1, 5)).logits.isfinite().all()


def test_a_text_config_that_is_none(model_type: str, tmp_path: Path) -> None:
    whole(model_type).save_pretrained(tmp_path)
    change_config(tmp_path, text_config=3)
    with pytest.raises(CheckpointError, match="text_config is 3"):
        load(tmp_path)


INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
            },
        }
    },
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
}


def test_experts_of_kimi_in_int4(tmp_path: Path) -> None:
    """As on the hub, where the text model's part of the config says so."""
    encode = compressed_tensors("pack-quantized", **INT4["config_groups"]["group_0"]["weights"])
    theirs = whole("kimi_k25", hidden_size=64, moe_intermediate_size=32)
    write(theirs, tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    for name in [name for name in stored if ".mlp.experts." in name]:
        fields, values = encode(stored.pop(name))
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{field}": tensor for field, tensor in fields.items()}
        layer, expert, part = re.search(
            r"layers\.(\d+)\..*experts\.(\d+)\.(\w+)_proj", name
        ).groups()
        experts = theirs.model.language_model.layers[int(layer)].mlp.experts
        if part == "down":
            experts.down_proj.data[int(expert)] = values
        else:
            experts.gate_up_proj.data[int(expert)].chunk(2)[part == "up"].copy_(values)
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    change_config(tmp_path, text_config=config["text_config"] | {"quantization_config": INT4})
    ours = load(tmp_path)
    assert {x.quantized for x in ours.modules() if isinstance(x, FusedMoE)} == {Int4}
    ids = token_ids(2, 11)
    with torch.inference_mode():
        assert_close(ours(ids).logits, theirs(ids).logits)
        ours.save_pretrained(tmp_path / "text")
        assert load(tmp_path / "text")(ids).logits.equal(ours(ids).logits)
    assert moezoo.inspect(tmp_path).supported
