"""The token loop of greedy search and sampling.

Legend: B batch, S tokens so far, T new tokens of a step, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from moezoo.layers.attention import CausalMask, DenseContext, visible_tokens
from moezoo.layers.decoder import Decoder
from moezoo.layers.linear import without_onednn


@dataclass
class Decoded:
    """`sequences` int64 [B, S], prompt included; `scores`, `logits` fp32 [B, V] a step, if kept."""

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
    visible = visible_tokens(attention_mask)
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
        with without_onednn() if one_row else nullcontext():
            context = DenseContext(decoder.rotation(positions), mask, cache)
            hidden = decoder(decoder.embed(new_ids), context)
            logits = decoder.logits(hidden[:, -1]).float()
        past += new_ids.shape[1]
        scores = logits
        # The list would inspect the signature of each at each token: 150 us, as long as a layer.
        for processor in logits_processor:
            scores = processor(sequences, scores)
        if generation_config.output_logits:
            result.logits.append(logits)
        if generation_config.output_scores:
            result.scores.append(scores)
        if generation_config.do_sample:
            next_ids = torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)
        else:
            next_ids = scores.argmax(-1)
        if stops_at_eos and len(sequences) > 1:  # one alone ends the loop when it ends
            next_ids = torch.where(unfinished, next_ids, generation_config._pad_token_tensor)
        if streamer is not None:
            streamer.put(next_ids.cpu())
        new_ids = next_ids[:, None]
        sequences = torch.cat((sequences, new_ids), 1)
        unfinished = unfinished & ~stopping_criteria(sequences, scores)
        if not unfinished.any():
            break
        positions = positions[:, -1:] + 1
        if visible is not None:
            visible = torch.cat((visible, visible.new_ones(len(visible), 1)), 1)

    if streamer is not None:
        streamer.end()
    result.sequences = sequences
    return result
