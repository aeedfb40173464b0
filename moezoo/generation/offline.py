"""Offline generation: many prompts in, one completion each out.

A moezoo model uses continuous batching where its engine supports the settings. Other models and
other settings go through `model.generate`, one batch after the other.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from moezoo.generation.engine import CHUNK_TOKENS, supports
from moezoo.generation.in_batches import BatchGenerator
from moezoo.generation.on_engine import ContinuousGenerator
from moezoo.generation.sampling import Sampler
from moezoo.generation.settings import is_integer, resolve
from moezoo.generation.texts import Completion, Prompt, Texts, as_prompt, refuse_single
from moezoo.generation.turns import limited
from moezoo.layers.decoder import Decoder

DEFAULT_BATCH_SIZE = 8

_IN_ENGINE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_strings")


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str | Mapping[str, Any] | Prompt],
    *,
    generation_config: GenerationConfig | None = None,
    batch_size: int | None = None,
    batch_tokens: int = CHUNK_TOKENS,
    cache_bytes: int | None = None,
    seed: int | None = None,
    chat: bool = False,
    streamer: BaseStreamer | None = None,
    **overrides: Any,
) -> Iterator[Completion]:
    """Complete every prompt and yield the results as they finish, in whatever order.

    Prompts are read as they are needed. A prompt that cannot be completed (longer than the model's
    context or the whole KV cache, empty without a token to begin with, refused by the chat
    template, with a token outside the model's vocabulary) gives a completion with
    `finish_reason="error"`; the others go on. Prompts that begin with the same tokens compute them
    once.

    A model of moezoo runs with continuous batching: greedy or sampled, with `temperature`, `top_k`,
    `top_p`, `min_p`, `repetition_penalty` and `stop_strings`. Other settings, other models and
    streamers go through `model.generate`, batch by batch in the order of the prompts.

    Where experts are divided over ranks, every rank calls this and takes all completions. With
    dispatch="all_gather" ranks have the same prompts and get the same completions, those that the
    first one draws; with "all_to_all" each has prompts of its own, perhaps none, and its iterator
    ends when those of all have.

    Args:
        model: any transformers causal language model.
        tokenizer: its tokenizer.
        prompts: texts, records as `Prompt.from_record` reads them (the position is the default
            id), or `Prompt`s. Messages go through the tokenizer's chat template.
        generation_config: as in transformers; what it leaves unset comes from
            `model.generation_config`. `max_new_tokens` is 256 where neither sets it.
        batch_size: the most prompts at once; by default 256 on a GPU and 8 on a CPU or where
            batches go through `model.generate`.
        batch_tokens: the most prompt tokens in one forward pass; longer prompts take several.
        cache_bytes: memory of the KV cache; by default what is free on a GPU but for room for a
            forward pass, and 4 GiB at most on a CPU.
        seed: makes sampling repeatable: each prompt draws from its own stream of random numbers,
            which depends on the seed and the prompt's id alone, not on the batch it is in. (The
            logits themselves may differ in the last bit between batches, which can tip a draw.)
            None samples from torch's global random state.
        chat: wrap texts as the user's message of a chat.
        streamer: receives tokens as they come; needs `batch_size=1`.
        **overrides: fields of `GenerationConfig`, such as `max_new_tokens`, `do_sample`,
            `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `stop_strings`.

    Raises:
        ValueError: an option is unknown, out of range or contradicts another, `prompts` is a
            single prompt rather than several, a prompt is malformed or has the id of another, or
            `chat` is asked of a tokenizer without a chat template.
        ExpertMapError: ranks that have to have the same prompts have not.
        RankError: another rank died, hangs or failed.
        MoEOutOfMemoryError: one prompt alone does not fit the device; says what needs less.
    """
    refuse_single("prompts", prompts)
    for name, value in (
        ("batch_size", batch_size),
        ("batch_tokens", batch_tokens),
        ("cache_bytes", cache_bytes),
    ):
        if value is not None and (not is_integer(value) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if seed is not None and not is_integer(seed):
        raise ValueError(f"seed must be an integer, or None to draw anew each time, got {seed!r}")
    if streamer is not None and batch_size != 1:
        raise ValueError(f"a streamer needs batch_size=1, got batch_size={batch_size}")
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {model.config.name_or_path!r} has no chat template; "
            "leave chat off, or set tokenizer.chat_template"
        )
    config = resolve(model, tokenizer, generation_config, overrides)
    if seed is not None and config.do_sample and config.num_beams > 1:
        raise ValueError(f"seed needs num_beams=1, got num_beams={config.num_beams}")
    texts = Texts(model, tokenizer, config, chat)
    given = _with_own_ids(as_prompt(item, index) for index, item in enumerate(prompts))
    if isinstance(prompts, list | tuple):
        given = iter(list(given))  # what is wrong with one is an error now, not when it is read
    if streamer is None and _in_engine(model, config):
        rows = batch_size or (256 if model.device.type == "cuda" else DEFAULT_BATCH_SIZE)
        if isinstance(prompts, Sized):
            rows = max(1, min(rows, len(prompts)))
        rows = limited(model.decoder, rows)
        batch_tokens = limited(model.decoder, batch_tokens)
        continuous = ContinuousGenerator(texts, seed, rows, batch_tokens, cache_bytes)
        return continuous.run(given)
    peers = getattr(getattr(model, "decoder", None), "peers", None)
    if peers is not None and not peers.same_tokens:
        raise ValueError(
            "a streamer, and settings that moezoo's engine does not do (it has greedy search and "
            f"sampling with {', '.join(_IN_ENGINE)}), need one process, or dispatch='all_gather': "
            "with 'all_to_all' each rank has prompts of its own"
        )
    batches = BatchGenerator(texts, seed, streamer)
    return batches.run(given, batch_size or DEFAULT_BATCH_SIZE)


def _with_own_ids(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """Raise ValueError for an id that a prompt before has, as completions are told apart by it."""
    places: dict[int | str, int] = {}
    for place, prompt in enumerate(prompts):
        if prompt.id in places:
            raise ValueError(
                f"prompts {places[prompt.id]} and {place} have the same id, {prompt.id!r}; give "
                "each one of its own (a prompt without one has its position)"
            )
        places[prompt.id] = place
        yield prompt


def _in_engine(model: PreTrainedModel, config: GenerationConfig) -> bool:
    """Whether the engine supports this model and all of these settings."""
    decoder = getattr(model, "decoder", None)
    if not isinstance(decoder, Decoder) or not supports(decoder) or config.num_beams != 1:
        return False
    if config.max_time is not None or config.cache_implementation not in (None, "dynamic"):
        return False
    generation_mode = config.get_generation_mode()
    if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return False
    # Only transformers knows which processors a config asks for, those of later versions included;
    # a list of fields here would miss new ones without a word. Nothing public tells it. Some are
    # made only where there are end-of-text tokens, or a prompt.
    config = copy.deepcopy(config)
    model._prepare_special_tokens(config, device="cpu")
    processors = model._get_logits_processor(
        config, input_ids_seq_length=1, encoder_input_ids=torch.zeros(1, 1).long(), device="cpu"
    )
    return {type(processor) for processor in processors} <= set(Sampler.PROCESSORS)
