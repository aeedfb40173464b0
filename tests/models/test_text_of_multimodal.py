"""The text models in multimodal checkpoints, against transformers' whole model without an image."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from configurations import MULTIMODAL, VISION, randomize
from safetensors.torch import load_file, save_file
from test_oracle import assert_close, change_config, load, padded, token_ids

import moezoo
from moezoo.errors import CheckpointError, UnsupportedArchitectureError


def whole(model_type: str, **options: object) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(
        model_type,
        text_config=MULTIMODAL[model_type] | {"model_type": f"{model_type}_text"} | options,
        vision_config=VISION,
        **options,
    )
    config.text_config.pad_token_id = 0
    model = transformers.AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    randomize(model, 0)
    return model.eval()


@pytest.fixture(params=MULTIMODAL)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("per_expert", [True, False])
@torch.inference_mode()
def test_the_text_model_computes_what_the_whole_does(
    model_type: str, per_expert: bool, tmp_path: Path
) -> None:
    theirs = whole(model_type)
    theirs.save_pretrained(tmp_path, save_original_format=per_expert)
    ours = load(tmp_path)
    inputs = padded("left")
    kept = inputs["attention_mask"].bool()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = theirs(**inputs, position_ids=positions.expand(3, -1, -1)).logits
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
    theirs.save_pretrained(tmp_path / "whole")
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
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change_config(tmp_path, text_config=config["text_config"] | {"tie_word_embeddings": False})
    ids = token_ids(2, 11)
    ours = load(tmp_path)
    assert ours.decoder.lm_head is None
    assert_close(ours(ids).logits, theirs(ids).logits)


def test_an_embedding_that_is_no_head_unties(model_type: str, tmp_path: Path) -> None:
    theirs = whole(model_type)
    theirs.save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    ids = token_ids(2, 11)
    with torch.inference_mode():
        assert_close(load(tmp_path)(ids).logits, theirs(ids).logits)


def test_quantised_while_it_loads_and_inspected(model_type: str, tmp_path: Path) -> None:
    whole(model_type).save_pretrained(tmp_path)
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
