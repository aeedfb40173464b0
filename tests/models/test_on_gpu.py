"""Every architecture on a GPU, through the loader and the Triton kernels, against transformers."""

from pathlib import Path

import pytest
import torch
from configurations import CONFIGURATIONS, reference
from test_oracle import CASES, assert_close, load, padded, token_ids, write
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moezoo.assets import tiny_model

pytestmark = pytest.mark.gpu

NEW_TOKENS = 60


@pytest.mark.parametrize(("model_type", "name"), CASES, ids=[f"{m}-{n}" for m, n in CASES])
def test_logits_and_greedy_tokens(model_type: str, name: str, tmp_path: Path) -> None:
    theirs = reference(model_type, CONFIGURATIONS[model_type][name])
    write(model_type, theirs, tmp_path)
    ours = load(tmp_path, device="cuda")
    inputs = padded("left")
    on_gpu = {key: value.cuda() for key, value in inputs.items()}
    kept = inputs["attention_mask"].bool()
    with torch.inference_mode():
        assert_close(ours(token_ids(2, 13).cuda()).logits.cpu(), theirs(token_ids(2, 13)).logits)
        assert_close(ours(**on_gpu).logits.cpu()[kept], theirs(**inputs).logits[kept])
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(**inputs, **options)
    assert ours.generate(**on_gpu, **options).cpu().equal(expected)


def test_the_shipped_model_writes_what_transformers_writes() -> None:
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).cuda().eval()
    ours = load(tiny_model(), dtype=torch.float32, device="cuda")
    assert story(ours).equal(story(theirs))


def test_in_bf16_it_is_as_close_to_fp32_as_transformers_is() -> None:
    exact = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).cuda().eval()
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.bfloat16).cuda().eval()
    ours = load(tiny_model(), dtype=torch.bfloat16, device="cuda")
    tokens = story(ours)
    with torch.inference_mode():
        expected = exact(tokens).logits
        our_error, their_error = (m(tokens).logits.float() - expected for m in (ours, theirs))
    assert our_error.norm() <= 1.1 * their_error.norm()
    # Each token is the best one, or the best lies no further above it than the two are off.
    chosen = expected[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
    gap = (expected[:, :-1].amax(2) - chosen)[:, -NEW_TOKENS:]
    assert gap.max() <= 2 * their_error.abs().max()


def story(model: PreTrainedModel) -> torch.Tensor:
    """The prompt and NEW_TOKENS greedy tokens, [1, S]."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    inputs = tokenizer("One day, a little dog", return_tensors="pt").to("cuda")
    return model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
