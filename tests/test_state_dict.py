"""State dicts of the hub's layout, Trainer's checkpoints, pickles and copies of the model."""

import copy
import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import plain
from transformers import Trainer, TrainingArguments

import moezoo
from moezoo.errors import CheckpointError
from moezoo.layers.moe.routing import softmax_topk

TOKENS = torch.arange(2, 14)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_state_dict_of_a_model_of_transformers(name: str) -> None:
    model = plain(name)
    ours = moezoo.from_config(model.config, dtype="float32", device="cpu")
    result = ours.load_state_dict(model.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=2e-5)


def test_state_dict_with_own_names_and_wrong_ones(tmp_path: Path) -> None:
    model = plain("qwen3_moe")
    model.save_pretrained(tmp_path)
    ours = moezoo.from_pretrained(tmp_path, dtype="float32", device="cpu", progress=False)
    before = logits(ours)
    with pytest.raises(CheckpointError, match=r"the state dict .* tensors? unknown"):
        ours.load_state_dict({**model.state_dict(), "model.foo": torch.ones(1)}, strict=False)
    state = {k: v for k, v in model.state_dict().items() if "layers.1." not in k}
    with pytest.raises(CheckpointError, match=r"tensors missing:\n  model\.layers\.1\."):
        ours.load_state_dict(state, strict=False)
    assert torch.equal(logits(ours), before)
    quantized = moezoo.from_pretrained(
        tmp_path, quantization="int8_w8a16", device="cpu", progress=False
    )
    with pytest.raises(ValueError, match="quantised weights; load it into the model in 16 or 32"):
        quantized.load_state_dict(model.state_dict())
    own = moezoo.from_config(model.config, dtype="float32", device="cpu")
    assert str(own.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(logits(own), before)


def training(folder: Path, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=3,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )


def test_trainer_resumes(tmp_path: Path) -> None:
    """As it would have gone on."""
    pytest.importorskip("accelerate")
    plain("qwen3_moe").save_pretrained(tmp_path / "model")
    data = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 8

    def losses(steps: int, folder: str, resume: bool) -> list[float]:
        model = moezoo.from_pretrained(
            tmp_path / "model", dtype="float32", device="cpu", progress=False
        )
        trainer = Trainer(model, training(tmp_path / folder, steps), train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = losses(6, "whole", resume=False)
    assert whole[3] < whole[0]
    losses(3, "parts", resume=False)
    assert losses(6, "parts", resume=True)[3:] == pytest.approx(whole[3:], abs=2e-4)


@pytest.mark.parametrize("quantization", [None, "int4_w4a16"])
def test_pickles_and_copies(quantization: str | None, tmp_path: Path) -> None:
    plain("deepseek_v3").save_pretrained(tmp_path)
    model = moezoo.from_pretrained(
        tmp_path,
        dtype="float32",
        device="cpu",
        quantization=quantization and {"type": quantization, "per_channel": True},
        progress=False,
    )
    model.generate(TOKENS, max_new_tokens=2, do_sample=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        torch.load(file, weights_only=False),
    ]
    for same in copies:
        assert type(same) is type(model)
        assert torch.equal(logits(same), logits(model))


def test_a_function_takes_the_place_of_a_router_with_a_bias(tmp_path: Path) -> None:
    plain("deepseek_v3").save_pretrained(tmp_path)
    model = moezoo.from_pretrained(tmp_path, dtype="float32", device="cpu", progress=False)
    layer = model.decoder.layers[-1].mlp
    before, router = logits(model), layer.route
    layer.route = partial(softmax_topk, k=1, renormalize=True)
    assert not torch.equal(logits(model), before)
    layer.route = router
    assert torch.equal(logits(model), before)


def test_quantized_weights_get_no_gradient(tmp_path: Path) -> None:
    plain("mixtral").save_pretrained(tmp_path)
    model = moezoo.from_pretrained(
        tmp_path, quantization="int8_w8a16", dtype="float32", device="cpu", progress=False
    )
    model.requires_grad_(True)
    w13 = model.decoder.layers[0].mlp.w13
    assert not any(parameter.requires_grad for parameter in w13.parameters())
    assert model.decoder.embed.weight.requires_grad
    assert torch.equal(w13.dequantize(torch.float16), w13().dequantize(torch.float16))


def test_a_model_that_does_not_fit_its_config_is_not_saved(tmp_path: Path) -> None:
    model = moezoo.from_config(plain("qwen3_moe").config, dtype="float32", device="cpu")
    model.decoder.layers = model.decoder.layers[:-1]
    last = len(model.decoder.layers)
    message = rf"layers\.{last}\..* is absent in the model and of shape .* change model\.config"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "to")
    assert not (tmp_path / "to").exists()
    model.config.num_hidden_layers = last
    model.save_pretrained(tmp_path / "to")
    assert torch.equal(logits(moezoo.from_pretrained(tmp_path / "to", device="cpu")), logits(model))
