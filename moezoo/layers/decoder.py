"""The decoder of every architecture: embedding, layers, norm and head.

Legend: B batch, T new tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from moezoo.device import device_made_current
from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.context import Context, DenseContext
from moezoo.layers.linear import Linear, linear
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.moe import Dispatcher, FusedMoE, RoutingRecorder
from moezoo.layers.norm import RMSNorm, input_for, is_hooked
from moezoo.layers.peers import Balancer, Peers
from moezoo.layers.rope import (
    NoRotation,
    RotaryEmbedding,
    RotaryEmbeddings,
    Rotation,
    rope_of_whole_heads,
)


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


class DecoderLayer(nn.Module):
    """x + after_attn(attn(norm(x))), then x + after_mlp(mlp(norm(x))).

    `after_attn` and `after_mlp` are functions or modules, such as a second norm or a factor.
    """

    def __init__(
        self,
        attn_norm: RMSNorm,
        attn: SequenceMixer,
        *,
        mlp_norm: RMSNorm,
        mlp: nn.Module,
        after_attn: Callable[[torch.Tensor], torch.Tensor] = _unchanged,
        after_mlp: Callable[[torch.Tensor], torch.Tensor] = _unchanged,
    ) -> None:
        super().__init__()
        self.attn_norm = attn_norm
        self.attn = attn
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.after_attn = after_attn
        self.after_mlp = after_mlp

    def forward(
        self, x: torch.Tensor, update: torch.Tensor | None, context: Context, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual stream x [B, T, H] and the update, [B, T, H], that is still to be
        added to it, from those of the layer before; the first layer's `update` is None.

        The next norm adds the update, in its own kernel on CUDA. On a CPU nothing is gained by
        handing on a norm before it is computed.
        """
        if not x.is_cuda:
            rows, x = self.attn_norm.add(x, update)
            rows, x = self.mlp_norm.add(x, self.after_attn(self.attn(rows, context, layer_idx)))
            return x, self.after_mlp(self.mlp(rows))
        normed = self.attn_norm.of_sum(x, update)
        update = self.after_attn(self.attn(input_for(self.attn, normed), context, layer_idx))
        normed = self.mlp_norm.of_sum(normed.sum, update)
        return normed.sum, self.after_mlp(self.mlp(input_for(self.mlp, normed)))


class Stage(NamedTuple):
    """Consecutive layers on one device."""

    device: torch.device
    layers: range


class Decoder(nn.Module):
    """Token ids or embeddings to hidden states, and hidden states to logits.

    `tied` uses the embedding as the head: there is then no parameter `lm_head.weight`, nor a bias.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        layers: Sequence[nn.Module],
        *,
        norm: RMSNorm,
        rope: RotaryEmbedding | RotaryEmbeddings | NoRotation,
        tied: bool,
        head_bias: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rope = rope
        self.lm_head: nn.Module | None = None
        if not tied:
            self.lm_head = Linear(hidden_size, vocab_size, bias=head_bias)
        self.recorder: RoutingRecorder | None = None
        """Counter of the MoE layers' choices while they are recorded, else None."""
        self.dispatcher: Dispatcher | None = None
        """Dispatcher of the MoE layers; None where this process has all the experts."""
        self.balancer: Balancer | None = None
        """Balancer of the ranks' load; None where there is nothing to balance."""
        self.peers: Peers | None = None
        """The other ranks; None where this process has all the experts."""
        self.stages: tuple[Stage, ...] = ()
        """The layers on each device, set by `find_stages`; empty where all are on one device."""

    @property
    def moe_layers(self) -> dict[int, FusedMoE]:
        """The MoE layers, by their indices among `layers`."""
        return {i: x.mlp for i, x in enumerate(self.layers) if isinstance(x.mlp, FusedMoE)}

    def find_stages(self) -> None:
        """Set `stages` by the devices that the layers are on now."""
        places = [next(layer.parameters()).device for layer in self.layers]
        starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1]]
        ends = [*starts[1:], len(places)]
        stages = [Stage(places[i], range(i, end)) for i, end in zip(starts, ends, strict=True)]
        together = all(stage.device == self.embed.weight.device for stage in stages)
        self.stages = () if together else tuple(stages)

    def forward(
        self,
        x: torch.Tensor,
        context: Context,
        *,
        states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Compute the hidden states [B, T, H] of embeddings x [B, T, H].

        The input of each layer, and last the result, are appended to `states`, if given.
        """
        update: torch.Tensor | None = None
        if self.recorder is not None:
            self.recorder.begin(context.real_tokens())
        if self.balancer is not None:
            self.balancer.begin(context.real_tokens())
        home, modules = x.device, list(self.layers)
        with self.forward_pass(x.shape[0] * x.shape[1]), device_made_current(x):
            for device, layers in self.stages or (Stage(home, range(len(modules))),):
                if device != x.device:
                    x, update, context = _to_device(device, x, update, context)
                with device_made_current(x):
                    for layer_idx in layers:
                        if states is not None:
                            states.append(x if update is None else x + update)
                        x, update = modules[layer_idx](x, update, context, layer_idx)
            if home != x.device:
                x, update, _ = _to_device(home, x, update, context)
            x, _ = self.norm.add(x, update)
        if states is not None:
            states.append(x)
        self.end_step()
        return x

    def forward_pass(self, num_tokens: int) -> AbstractContextManager[None]:
        """Return the context of a forward pass over `num_tokens` tokens, which other ranks that
        hold experts make too."""
        return (
            nullcontext() if self.dispatcher is None else self.dispatcher.forward_pass(num_tokens)
        )

    def end_step(self, *, dummy: bool = False) -> None:
        """Let experts move after a forward pass is queued, or a replay of a captured one; `dummy`
        if this rank had no tokens in it."""
        if self.balancer is None:
            return
        if not (self.embed.weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.balancer.end_step(dummy=dummy)

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """Return the rotation of tokens at positions int [B or 1, T], in the model's dtype."""
        rotation: Rotation = self.rope(positions, self.embed.weight.dtype)
        return rotation

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits [.., V] of hidden states [.., H] in the model's dtype."""
        head = self.lm_head
        with device_made_current(x):
            if head is None:
                return linear(x, self.embed.weight)
            if type(head) is nn.Linear and not is_hooked(head):
                return linear(x, head.weight, head.bias)  # as a head of our own does
            logits: torch.Tensor = head(x)
            return logits


def _to_device(
    device: torch.device, x: torch.Tensor, update: torch.Tensor | None, context: Context
) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    """Move what a layer takes to its device."""
    assert isinstance(context, DenseContext), "an engine's cache is on one device"
    return x.to(device), None if update is None else update.to(device), context.to(device)


class ScaledDecoder(Decoder):
    """A decoder that multiplies embeddings by `embedding_scale` and logits by `logit_scale`."""

    def __init__(
        self, *args: Any, embedding_scale: float = 1.0, logit_scale: float = 1.0, **modules: Any
    ) -> None:
        super().__init__(*args, **modules)
        self.embedding_scale = embedding_scale
        self.logit_scale = logit_scale

    def forward(
        self, x: torch.Tensor, context: Context, *, states: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        return super().forward(x * self.embedding_scale, context, states=states)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return super().logits(x) * self.logit_scale


def pre_norm_decoder(
    config: PreTrainedConfig,
    attention: Callable[[int], SequenceMixer],
    feed_forward: Callable[[int], nn.Module],
    *,
    rope: RotaryEmbedding | RotaryEmbeddings | NoRotation | None = None,
    norm: Callable[[int, Any], RMSNorm] = RMSNorm,
    layer: Callable[..., DecoderLayer] = DecoderLayer,
    decoder: Callable[..., Decoder] = Decoder,
) -> Decoder:
    """Build the usual decoder: an RMSNorm before `attention(layer_idx)` and before
    `feed_forward(layer_idx)`.

    Without a `rope` all of each head is rotated, and a config that says otherwise is refused.
    Unusual architectures pass another `norm`, which is called with the width and
    `config.rms_norm_eps`, or classes derived from `layer` and `decoder`.

    Raises `UnsupportedArchitectureError` where `config.layer_types` or `config.sliding_window`
    contradicts the layers: transformers' caches go by the config.
    """

    def new_norm() -> RMSNorm:
        return norm(config.hidden_size, getattr(config, "rms_norm_eps", None))

    layers = [
        layer(new_norm(), attention(layer_idx), mlp_norm=new_norm(), mlp=feed_forward(layer_idx))
        for layer_idx in range(config.num_hidden_layers)
    ]
    windows = [layer.attn.window for layer in layers]
    if any(window is not None and window < 1 for window in windows):
        raise UnsupportedArchitectureError.of_field(config, "sliding_window", "1 or more")
    kinds = [layer.attn.layer_type for layer in layers]
    if getattr(config, "layer_types", None) is not None:
        if config.layer_types != kinds:
            raise UnsupportedArchitectureError.of_field(config, "layer_types", str(kinds))
        if not any("attention" in kind and kind != "linear_attention" for kind in kinds):
            # transformers' cache would not know the length of a sequence.
            raise UnsupportedArchitectureError.of_field(
                config, "layer_types", "a layer of attention or more"
            )
    elif getattr(config, "sliding_window", None) is not None and None in windows:
        raise UnsupportedArchitectureError.of_field(config, "sliding_window", "None")

    return decoder(
        config.vocab_size,
        config.hidden_size,
        layers,
        norm=new_norm(),
        rope=rope or rope_of_whole_heads(config),
        tied=config.tie_word_embeddings,
    )


def decoder_of(model: object) -> Decoder:
    """Return the decoder of a `MoECausalLM`; raise ValueError for another model."""
    decoder = getattr(model, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise ValueError(
            f"{type(model).__name__} is not a model of moezoo; load it with moezoo.from_pretrained"
        )
    return decoder
