"""Token loops for greedy search and sampling: on any transformers cache, and on the engine.

Legend: B batch, S tokens so far, T new tokens of a step, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from moezoo.device import HostCopies
from moezoo.generation.engine import Engine
from moezoo.generation.pages import num_pages
from moezoo.generation.turns import chosen, joint_pass, largest, make_remaining_passes
from moezoo.layers.context import DenseContext
from moezoo.layers.decoder import Decoder
from moezoo.layers.mask import CausalMask, visible_tokens
from moezoo.layers.onednn import without_onednn


@dataclass
class Decoded:
    """The result of a token loop.

    `sequences` is int64 [B, S], prompt included; `scores` and `logits`, fp32 [B, V] per step, are
    filled only if the generation config asks for them.
    """

    sequences: torch.Tensor
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


@torch.inference_mode()
def decode(
    decoder: Decoder,
    input_ids: torch.Tensor,
    cache: Cache,
    *,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
) -> Decoded:
    """Extend input_ids int64 [B, S], token by token, until each meets a stopping criterion.

    `cache` holds the first tokens already, or nothing. attention_mask [B, S] is 0 at padding;
    position_ids [B, S] defaults to counting from 0. A finished sequence is continued with the
    padding token. The processors and criteria are called as transformers' own loop calls them.
    """
    device = decoder.embed.weight.device
    sequences = input_ids.to(device)
    past = int(cache.get_seq_length())
    visible = visible_tokens(attention_mask, *sequences.shape)
    if visible is not None:
        visible = visible.to(device)
    if position_ids is None:
        positions = torch.arange(sequences.shape[1], device=device)[None]
    else:
        positions = position_ids.to(device)
    new_ids, positions = sequences[:, past:], positions[:, past:]
    unfinished = torch.ones(len(sequences), dtype=torch.bool, device=device)
    stops_at_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    result = Decoded(sequences)

    on_cpu_in_16_bit = device.type == "cpu" and decoder.embed.weight.dtype.itemsize == 2

    while True:
        mask = CausalMask(past, new_ids.shape[1], device, visible)
        one_row = on_cpu_in_16_bit and new_ids.numel() == 1
        with joint_pass(decoder, new_ids), without_onednn() if one_row else nullcontext():
            context = DenseContext(decoder.rotation(positions), mask, cache)
            hidden = decoder(decoder.embed(new_ids), context)
            logits = decoder.logits(hidden[:, -1]).float()
        past += new_ids.shape[1]
        next_ids, scores = _choose(logits, sequences, logits_processor, generation_config, result)
        next_ids = chosen(decoder, next_ids)
        if stops_at_eos and len(sequences) > 1:  # one alone ends the loop when it ends
            # Private, but what `generate` hands to `_sample`: the public field may be None.
            next_ids = torch.where(unfinished, next_ids, generation_config._pad_token_tensor)
        if streamer is not None:
            streamer.put(next_ids.cpu())
        new_ids = next_ids[:, None]
        sequences = torch.cat((sequences, new_ids), 1)
        unfinished = chosen(decoder, unfinished & ~stopping_criteria(sequences, scores))
        if not unfinished.any():
            break
        positions = positions[:, -1:] + 1
        if visible is not None:
            visible = torch.cat((visible, visible.new_ones(len(visible), 1)), 1)

    make_remaining_passes(decoder)
    if streamer is not None:
        streamer.end()
    result.sequences = sequences
    return result


def _choose(
    logits: torch.Tensor,
    sequences: torch.Tensor,
    logits_processor: LogitsProcessorList,
    generation_config: GenerationConfig,
    result: Decoded,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next tokens [B] of sequences [B, S], and the scores [B, V] they were chosen by.

    Appends logits [B, V] and scores to `result` if the config asks for them.
    """
    scores = logits
    # Calling the list itself would inspect each processor's signature at every token, which takes
    # 150 us, as long as a layer.
    for processor in logits_processor:
        scores = processor(sequences, scores)
    if generation_config.output_logits:
        result.logits.append(logits)
    if generation_config.output_scores:
        result.scores.append(scores)
    if generation_config.do_sample:
        return torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1), scores
    return scores.argmax(-1), scores


@torch.inference_mode()
def decode_paged(
    engine: Engine,
    prompts: list[list[int]],
    input_ids: torch.Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
) -> Decoded:
    """Do what `decode` does, on an engine all of whose rows are free.

    `prompts` are input_ids [B, S] without padding. The host reads a step's tokens while the next
    step runs.
    """
    batch, length = input_ids.shape
    pad = generation_config._pad_token_tensor  # as in `decode`
    longest = stopping_criteria.max_length or generation_config.max_length
    kept = num_pages(longest)
    for row in range(batch):
        engine.assign(row, range(row * kept, (row + 1) * kept))
    keeps = generation_config.output_logits or generation_config.output_scores
    # All ranks must run their steps with the same sampler; a rank without rows asks this as well.
    (needs_logits,) = largest(
        engine.decoder, bool(len(logits_processor) or generation_config.do_sample or keeps)
    )
    logits = engine.prefill_all(prompts)
    sequences = torch.zeros(batch, longest, dtype=input_ids.dtype, device=engine.device)
    sequences[:, :length] = input_ids
    unfinished = torch.ones(batch, dtype=torch.bool, device=engine.device)
    stops_at_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    result = Decoded(sequences)
    greedy = not needs_logits
    sampler = engine.greedy if greedy else None
    started = False
    while True:
        if greedy and started:
            next_ids, scores = engine.ids[:batch], logits[:batch]
        else:
            logits = logits[:batch].float()
            if keeps:
                logits = logits.clone()  # the engine's are overwritten by the next step
            next_ids, scores = _choose(
                logits, sequences[:, :length], logits_processor, generation_config, result
            )
            next_ids = chosen(engine.decoder, next_ids)
        if stops_at_eos and batch > 1:
            next_ids = torch.where(unfinished, next_ids, pad)
        if started:
            engine.ids[:batch] = next_ids
        else:
            engine.start(range(batch), [len(prompt) for prompt in prompts], next_ids)
            started = True
        sequences[:, length] = next_ids
        length += 1
        ended = stopping_criteria(sequences[:, :length], scores)
        unfinished = chosen(engine.decoder, unfinished & ~ended)
        seen = HostCopies(unfinished.any(), *([] if streamer is None else [next_ids]))
        if length < longest:
            logits = engine.step(engine.num_rows, sampler)
        goes_on, *new_ids = seen.wait()
        if streamer is not None:
            streamer.put(*new_ids)
        if not goes_on or length == longest:
            break
    if streamer is not None:
        streamer.end()
    engine.finish(sampler)
    engine.stop(range(engine.num_rows))
    result.sequences = sequences[:, :length]
    return result


def unpadded(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> list[list[int]] | None:
    """Return the tokens of each row of input_ids [B, S] without its padding on the left.

    Returns None where the mask hides more than that, or positions do not count from the first
    token.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        return None
    mask = mask.long().cpu()
    counted = mask.cumsum(1)
    if position_ids is not None:
        expected = (counted - 1).clamp(min=0)
        given = position_ids.cpu().expand_as(expected)
        if not torch.equal(given * mask, expected * mask):
            return None
    if not torch.equal(mask, mask.cummax(1).values) or not mask[:, -1].all():
        return None
    return [
        ids[len(ids) - number :]
        for ids, number in zip(input_ids.tolist(), counted[:, -1].tolist(), strict=True)
    ]
