"""Greedy tokens of trained checkpoints on moezoo's engine, judged by transformers' logits.

    python benchmarks/greedy.py --model FOLDER [FOLDER ..] --prompts prompts.jsonl

Every prompt is completed alone, and once more in a batch with all the others. transformers' model
reads each text in one pass: where its first choice is the token that is there, all along, its own
greedy text is the same. Where it is another one, the gap between the two logits counts as rounding
if it is below NOISE times what the two libraries' logits differ by. In fp32 the batch has to give
the same tokens as the prompt alone. Writes greedy_<device>.json, and ends with status 1 where a
difference is more than rounding.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from correctness import NOISE, last_logits, relative
from machine import write_result
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import moezoo

COLUMNS = ("", "dtype", "tokens", "prompts that differ", "largest gap", "allowed", "alone = batch")


def completions(model: Any, prompts: list[torch.Tensor], new_tokens: int) -> list[list[int]]:
    """Return the tokens of each prompt [T] and its completion, each computed alone."""
    return [
        model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids[None]),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )[0].tolist()
        for ids in prompts
    ]


def together(model: Any, prompts: list[torch.Tensor], new_tokens: int) -> list[list[int]]:
    """Return the tokens of each prompt and its completion, all in one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(one, (width - len(one), 0)) for one in prompts])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(one), (width - len(one), 0)) for one in prompts]
    )
    written = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return [row[width - len(one) :].tolist() for row, one in zip(written, prompts, strict=True)]


def compare(folder: Path, texts: list[str], dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    model = moezoo.from_pretrained(str(folder), dtype=kind, device=args.device, progress=False)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).to(args.device).eval()
    for one in (model, peer):  # every text gets its full length
        one.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text, return_tensors="pt").input_ids[0].to(args.device) for text in texts]
    ours = completions(model, prompts, args.new_tokens)
    batched = together(model, prompts, args.new_tokens)
    different, largest, allowed = 0, 0.0, 0.0
    for mine, prompt in zip(ours, prompts, strict=True):
        expected = last_logits(peer, mine, args.new_tokens)
        noise = relative(last_logits(model, mine, args.new_tokens), expected)
        allowed = max(allowed, NOISE * noise + 1e-6)
        chosen = torch.tensor(mine[len(prompt) :], device=expected.device)[:, None]
        gaps = expected.max(1, keepdim=True).values - expected.gather(1, chosen)
        different += int(gaps.max() > 0)
        largest = max(largest, (gaps.max() / expected.pow(2).mean().sqrt()).item())
    same = sum(alone == batch for alone, batch in zip(ours, batched, strict=True))
    return {
        "model": folder.name,
        "dtype": dtype,
        "prompts": len(prompts),
        "tokens": len(prompts) * args.new_tokens,
        "different_prompts": different,
        "largest_gap": largest,
        "allowed_gap": allowed,
        "same_alone_and_in_the_batch": same,
        "right": largest <= allowed and (dtype != "float32" or same == len(prompts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a 'prompt'")
    parser.add_argument("--number", type=int, default=32, help="prompts, from the file's start")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    lines = args.prompts.read_text().splitlines()[: args.number]
    texts = [json.loads(line)["prompt"] for line in lines]
    rows = [compare(folder, texts, dtype, args) for folder in args.model for dtype in args.dtype]
    path = write_result("greedy", torch.device(args.device), {"rows": rows})
    shown = Table(*COLUMNS)
    for row in rows:
        shown.add_row(
            *(row["model"], row["dtype"], str(row["tokens"])),
            f"{row['different_prompts']} of {row['prompts']}",
            f"{row['largest_gap']:.1e}",
            f"{row['allowed_gap']:.1e}",
            f"{row['same_alone_and_in_the_batch']} of {row['prompts']}",
        )
    Console().print(shown, f"written to {path}")
    if not all(row["right"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
