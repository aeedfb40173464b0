"""`MoECausalLM`: a decoder as a causal language model of transformers."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moezoo import registry
from moezoo.generation.cache import growing_cache
from moezoo.generation.decode import decode, decode_paged, unpadded
from moezoo.generation.engine import supports
from moezoo.generation.keeper import EngineKeeper
from moezoo.generation.paged import counts_padding, row_state_bytes, windows
from moezoo.generation.turns import largest, make_remaining_passes
from moezoo.layers.context import DenseContext
from moezoo.layers.decoder import Decoder
from moezoo.layers.linear import Linear
from moezoo.layers.mask import CausalMask, packed_positions, visible_tokens
from moezoo.layers.moe import OverriddenRouting, routing_overrides
from moezoo.layers.quant import QuantizedWeights
from moezoo.loaders.hub_layout import set_quantization_config
from moezoo.loaders.hub_state import load_hub_state
from moezoo.loaders.save import save_pretrained
from moezoo.parallel.gather import SAVING
from moezoo.parallel.mesh import Mesh

ENGINE_KWARGS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
}


IGNORED_KWARGS = ("cache_position", "tokenizer", "assistant_tokenizer", "token_type_ids")
"""Arguments that `generate` and tokenizers pass to `forward` and that no decoder uses."""


SAVE_DEFAULTS = {
    "state_dict": None,
    "push_to_hub": False,
    "safe_serialization": True,
    "variant": None,
    "token": None,
    "save_peft_format": True,
    "save_original_format": True,
    "distributed_checkpoint": False,
}
"""Arguments of transformers' `save_pretrained` for which ours takes only these values."""


class MoECausalLM(PreTrainedModel, GenerationMixin):
    """A `transformers` causal language model with moezoo's layers; `decoder` holds the weights.

    Greedy search and sampling run on moezoo's token loop, other ways to generate on transformers'.
    Each instance is of a subclass with the name of transformers' class for the config, which
    pipelines and other tools look at.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ("DecoderLayer",)

    def __new__(cls, config: PreTrainedConfig | None = None, *args: Any) -> "MoECausalLM":
        if cls is MoECausalLM and config is not None:
            config_class: Any = type(config)
            cls = _class_of(config.model_type, config_class)
        model: MoECausalLM = super().__new__(cls)
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        # The class has no name in a module, by which pickle would find it.
        return _without_state, (self.config.model_type, type(self.config)), self.__dict__

    def __init__(self, config: PreTrainedConfig, decoder: Decoder) -> None:
        super().__init__(config)
        self.decoder = decoder
        self.vocab_size = config.vocab_size
        self.loss_type = "ForCausalLM"
        self._engines = EngineKeeper()
        # HY 3's config says so. Elsewhere, and where it is set later, it is refused.
        self._released_for_router_logits = getattr(config, "output_router_logits", False)
        # transformers reads this before it removes tokens from a cache, as assisted decoding does.
        self._is_stateful = row_state_bytes(decoder) > 0
        self.mesh: Mesh | None = None
        """The process groups of the job, where experts are divided over ranks; else None."""
        self._generates = False
        self.all_tied_weights_keys: dict[str, str] = {}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("load models with moezoo.from_pretrained(...)")

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict with this model's names, or one in the layout of the hub.

        That is what `save_pretrained` writes and Trainer resumes from, and what a model of
        transformers has; it is loaded only whole, whatever `strict` says. Raises `CheckpointError`
        that names its tensors which are missing, unknown or of another shape, and `ValueError`
        where weights are quantised.
        """
        names = self.state_dict(keep_vars=True).keys()
        if not state_dict or not names.isdisjoint(state_dict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        rules = registry.architecture(self.config.model_type).CHECKPOINT
        load_hub_state(self.decoder, rules, state_dict)
        return super().load_state_dict({}, strict=False)._replace(missing_keys=[])

    def requires_grad_(self, requires_grad: bool = True) -> "MoECausalLM":
        """Set whether parameters get gradients; quantised weights never do."""
        quantized = (m for m in self.modules() if isinstance(m, QuantizedWeights))
        without = {id(parameter) for module in quantized for parameter in module.parameters()}
        for parameter in self.parameters():
            if id(parameter) not in without:
                parameter.requires_grad_(requires_grad)
        return self

    def find_devices(self) -> None:
        """Update the decoder's stages, and `hf_device_map` where they are on several devices."""
        decoder = self.decoder
        decoder.find_stages()
        self.__dict__.pop("hf_device_map", None)
        if decoder.stages:
            home = decoder.embed.weight.device
            names = ("embed", "rope", *(() if decoder.lm_head is None else ("lm_head",)), "norm")
            self.hf_device_map = {f"decoder.{name}": home for name in names}
            for device, layers in decoder.stages:
                self.hf_device_map |= {f"decoder.layers.{layer}": device for layer in layers}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # `to`, `cuda` and `cpu` call this.
        super()._apply(fn, recurse)
        if self.decoder.stages:
            self.find_devices()
        return self

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # The config of a model of transformers has theirs, which do not run here.
        return "eager"

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.decoder.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head or self.decoder.embed

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        # transformers resizes a tied head as well, which is the embedding.
        self.decoder.lm_head = None if new_embeddings is self.decoder.embed else new_embeddings

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "transformers' paged cache does not fit moezoo's layers; use moezoo.generate(...)"
        )

    def set_routing(
        self,
        *,
        force: Collection[int] = (),
        ban: Collection[int] = (),
        bias: Mapping[int, float] | None = None,
        k: int | None = None,
        layers: Collection[int] | None = None,
    ) -> OverriddenRouting:
        """Change which experts tokens go to, until `undo()` or the end of a `with` block.

            with model.set_routing(ban=[3], k=2):
                model.generate(...)

        Generation has to begin and end on the same side of the change. Where experts are divided
        over ranks, every rank has to make the same one.

        Args:
            force: experts that every token goes to, each with the weight of the token's first
                choice; the rest of its k experts are its own choice.
            ban: experts that no token goes to.
            bias: numbers that are added to the router's logits, by expert.
            k: experts per token.
            layers: indices of the decoder's layers that are changed; by default all MoE layers.

        Raises:
            ValueError: an argument is of another type, there is no such expert or layer, too few
                are left, or a change is in force.
        """
        moe_layers = self.decoder.moe_layers
        overrides = routing_overrides(moe_layers, layers, force=force, ban=ban, bias=bias, k=k)
        # CUDA graphs captured before route as they did when they were captured.
        return OverriddenRouting(overrides, changed=self.release_engine)

    def dequantize(self) -> "MoECausalLM":
        """Make all quantised weights plain ones of the model's dtype, and return the model.

        A layer at a time is in memory twice. Weights get no gradient until `requires_grad_(True)`.
        Raises `ValueError` where experts are divided over ranks.
        """
        self.release_engine()
        linears = [module for module in self.decoder.modules() if isinstance(module, Linear)]
        for moe in self.decoder.moe_layers.values():
            moe.dequantize_(self.dtype)
        for linear in linears:
            linear.dequantize_(self.dtype)
        rules = registry.architecture(self.config.model_type).CHECKPOINT
        set_quantization_config(self.config, self.decoder, rules)
        return self

    def release_engine(self) -> None:
        """Free what `generate` keeps on a GPU for its next call: a KV cache and CUDA graphs.

        The cache takes up to 4 GiB. torch keeps the memory for tensors to come;
        `torch.cuda.empty_cache()` then gives it back to the GPU. The next call of `generate` makes
        a cache and graphs anew. A call that another thread is in keeps its own.
        """
        self._engines.release()

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`. Where experts are divided over ranks, all of them call it.

        With dispatch="all_gather" they give the same arguments and get the same tokens. With
        "all_to_all" each gives rows of its own, with equal settings; one that has none gives
        input_ids [0, T], and gets them back when the others are done.
        """
        peers = self.decoder.peers
        if peers is None:
            return super().generate(inputs, *args, **kwargs)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if not peers.same_tokens and ids is not None and len(ids) == 0:
            self._sample_without_rows()
            return self._without_rows(ids, *args, **kwargs)
        if peers.same_tokens:
            self._draw_alike()
        self._generates = True
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            self._generates = False

    def _without_rows(
        self,
        ids: torch.Tensor,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """Return the result of `generate` for ids [0, T]."""
        config, _ = self._prepare_generation_config(generation_config, **kwargs)
        if not config.return_dict_in_generate:
            return ids
        cache = growing_cache(self.config)
        return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache)

    def _draw_alike(self) -> None:
        """Set the state of torch's random generators to that of the first rank's."""
        assert self.decoder.peers is not None
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        states = [self.decoder.peers.chosen(state.to(self.device)).cpu() for state in states]
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)

    def _sample_without_rows(self) -> None:
        """Make the forward passes of `_sample` as a rank without rows."""
        rows, longest = self._largest(0, 0)
        (grows,) = largest(self.decoder, not self._has_pages(rows, longest))
        if grows:
            make_remaining_passes(self.decoder)
            return
        with self._engines.engine(self.decoder, rows, longest) as engine:
            (needs_logits,) = largest(self.decoder, False)
            engine.finish(None if needs_logits else engine.greedy)

    def _largest(self, rows: int, longest: int, *, on_own_loop: bool = True) -> list[int]:
        """Return the largest number of rows and the largest length of all ranks.

        Raises ValueError, on every rank, where one of them runs on a loop of transformers.
        """
        *sizes, refused = largest(self.decoder, rows, longest, not on_own_loop)
        if refused:
            raise ValueError(
                "beams, assisted decoding and whatever else runs on transformers' own loops need "
                "one process, or dispatch='all_gather': with 'all_to_all' each rank has tokens of "
                "its own"
            )
        return sizes

    def _has_pages(self, rows: int, longest: int) -> bool:
        """Whether the engine can run `rows` rows of up to `longest` tokens."""
        return (
            self.device.type == "cuda"
            and supports(self.decoder)
            and self._engines.has_room(self.decoder, rows, longest)
        )

    @staticmethod
    def create_masks_for_generate(
        *, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """Return the mask as it is, for `generate` with static caches: layers make their own."""
        return attention_mask

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """Write config, generation config and weights in the hub's layout; see `loaders.save`.

        Takes the arguments of transformers' method, and raises `ValueError` for values that ask
        for anything else. Where the experts are divided over ranks, all of them call this, and the
        first one writes.
        """
        asked = {"state_dict": state_dict, "push_to_hub": push_to_hub} | kwargs
        for name, value in asked.items():
            if name not in SAVE_DEFAULTS:
                raise TypeError(f"save_pretrained() got an unexpected argument {name!r}")
            if value is not None and value != SAVE_DEFAULTS[name]:
                raise ValueError(
                    f"{name}={value!r}: moezoo writes its own weights as safetensors in the hub's"
                    f" layout, to a folder; leave {name} out"
                )
        if self.mesh is not None and self.mesh.ep_size > 1:
            with self.mesh.together(SAVING):
                save_pretrained(self, save_directory, max_shard_size=max_shard_size, mesh=self.mesh)
        elif is_main_process:
            save_pretrained(self, save_directory, max_shard_size=max_shard_size)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """Return logits [B, T, V] for input_ids int [B, T] or inputs_embeds [B, T, H].

        attention_mask is [B, past + T], 0 at padding on either side, or a 4-D mask. position_ids
        [B, T] default to counting on from the cache; with neither mask nor cache, texts packed into
        a row are kept apart where positions start anew. `logits_to_keep` keeps the last n positions
        (0: all), those of a 1-D index tensor, those of each row [B, n] int, or, flattened to
        [n, V], where [B, T] bool is true. Raises `ValueError` for no row or no token, for a mask of
        another shape, and for what the layers do not return: attentions and router logits.
        """
        wants_router_logits = not self._released_for_router_logits and getattr(
            self.config, "output_router_logits", False
        )
        defaults = {"output_attentions": False, "output_router_logits": wants_router_logits}
        for option, default in defaults.items():
            if kwargs.pop(option, default):
                raise ValueError(f"{option}=True: moezoo's layers do not return them")
        for option in IGNORED_KWARGS:
            kwargs.pop(option, None)
        peers = self.decoder.peers if self._generates else None
        if peers is not None and not peers.same_tokens:
            self._largest(0, 0, on_own_loop=False)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            _check_ids(input_ids)
        x = self.decoder.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dim() != 3 or 0 in x.shape:
            raise ValueError(
                f"inputs_embeds is {list(x.shape)}, expected [B, T, H], none of them 0"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        packed = None
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        elif attention_mask is None and past_key_values is None:
            packed = packed_positions(position_ids)
        states: list[torch.Tensor] | None = [] if output_hidden_states else None
        batch, length, _ = x.shape
        visible = visible_tokens(attention_mask, batch, past + length)
        mask = CausalMask(past, length, x.device, visible, packed)
        context = DenseContext(self.decoder.rotation(position_ids), mask, past_key_values)
        joint: AbstractContextManager[None] = nullcontext()
        if peers is not None:
            turn = peers.begin(0, [] if input_ids is None else input_ids.tolist())
            if input_ids is not None:
                joint = peers.forward_pass(turn)
        with joint:
            hidden = self.decoder(x, context, states=states)
        logits = self.decoder.logits(_kept(hidden, logits_to_keep))
        if peers is not None:
            logits = peers.chosen(logits)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.vocab_size, **kwargs)
        elif unexpected := kwargs.keys() - {"num_items_in_batch"}:
            # Trainer gives the number to functions of its own as well, which compute the loss.
            raise TypeError(f"forward() got unexpected arguments: {', '.join(sorted(unexpected))}")
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=None if states is None else tuple(states),
        )
        return output if return_dict else output.to_tuple()

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """Run greedy search or sampling, on moezoo's loops where they can; `generate` calls it.

        transformers' public way, `custom_generate`, leaves out the streamer.
        """
        for option in IGNORED_KWARGS:
            model_kwargs.pop(option, None)
        cache = model_kwargs.get("past_key_values")
        attention_mask = model_kwargs.get("attention_mask")
        length = input_ids.shape[1]
        if attention_mask is None:  # `generate` drops a mask that hides nothing
            mask_length = getattr(generation_config, "_mask_length", length)
        else:
            mask_length = attention_mask.shape[1]
        needs_other_loop = (
            synced_gpus
            or mask_length != length  # the caller leaves out the tokens in the cache
            or set(model_kwargs) - ENGINE_KWARGS
            or not isinstance(cache, DynamicCache)
            or generation_config.cache_implementation not in (None, "dynamic")
            or generation_config.is_assistant
            or generation_config.output_attentions
            or generation_config.output_hidden_states
            or generation_config.prefill_chunk_size
        )
        if needs_other_loop:
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        assert cache is not None, "a DynamicCache, or it would have asked for more"
        _check_ids(input_ids)
        # Private, and the only sign by which `generate` tells the caller's cache from its own.
        own_cache = cache.get_seq_length() == 0 and not getattr(cache, "_is_user_defined", False)
        position_ids = model_kwargs.get("position_ids")
        prompts = None
        returns_cache = generation_config.return_dict_in_generate
        # The pages of a sliding window hold fewer tokens than transformers' cache would, and a
        # state may include a token that is dropped.
        in_pages = own_cache and not (
            returns_cache and (any(windows(self.decoder)) or self._is_stateful)
        )
        longest = stopping_criteria.max_length or generation_config.max_length
        rows, longest = self._largest(len(input_ids), longest)
        # The engine reserves pages for the longest allowed sequence; a growing cache does not.
        if in_pages and self._has_pages(rows, longest):
            prompts = unpadded(input_ids, attention_mask, position_ids)
            if counts_padding(self.decoder) and {*map(len, prompts or ())} != {input_ids.shape[1]}:
                prompts = None
        (grows,) = largest(self.decoder, prompts is None)
        if prompts is not None and not grows:
            with self._engines.engine(self.decoder, rows, longest) as engine:
                decoded = decode_paged(
                    engine,
                    prompts,
                    input_ids,
                    logits_processor=logits_processor,
                    stopping_criteria=stopping_criteria,
                    generation_config=generation_config,
                    streamer=streamer,
                )
                if returns_cache:
                    # The last token is not in the cache yet.
                    new = decoded.sequences.shape[1] - input_ids.shape[1] - 1
                    lengths = [len(prompt) + new for prompt in prompts]
                    cache = engine.cache.dense(self.config, engine.tables[None], lengths)
        else:
            if own_cache:
                cache = growing_cache(self.config)
            decoded = decode(
                self.decoder,
                input_ids,
                cache,
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=streamer,
            )
        # Tensors made in inference mode cannot be changed in place outside it: return copies.
        sequences = decoded.sequences.clone()
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(scores.clone() for scores in decoded.scores) or None,
            logits=tuple(logits.clone() for logits in decoded.logits) or None,
            past_key_values=cache,
        )


def _check_ids(input_ids: torch.Tensor) -> None:
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids is {list(input_ids.shape)}, expected [B, T] with a row and a token or more"
        )


def _kept(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states [B, T, H] at the positions that `forward` describes."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:]
    if logits_to_keep.dim() == 1:
        return hidden[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    return hidden.take_along_dim(logits_to_keep[..., None], 1)


@cache
def _class_of(model_type: str, config_class: type[PreTrainedConfig]) -> type[MoECausalLM]:
    """Return the class with the name of transformers' for models of this type."""
    usual = f"{config_class.__name__.removesuffix('Config')}ForCausalLM"
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, usual)
    return type(name, (MoECausalLM,), {"__module__": __name__, "config_class": config_class})


def _without_state(model_type: str, config_class: Any) -> MoECausalLM:
    """Return a model that pickle or copy fills."""
    cls = _class_of(model_type, config_class)
    return cls.__new__(cls)
