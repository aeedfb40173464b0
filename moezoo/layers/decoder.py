"""The decoder that every architecture is: embedding, layers, norm and head.

Legend: B batch, T new tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

from moezoo.device import device_made_current
from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import Context, DenseContext
from moezoo.layers.kernels.windows import Chunked
from moezoo.layers.linear import Linear, linear
from moezoo.layers.moe import Dispatcher, FusedMoE, RoutingRecorder
from moezoo.layers.norm import RMSNorm, handed_to
from moezoo.layers.quant import QuantizedWeights
from moezoo.layers.quantized_linear import quantized_linear
from moezoo.layers.rope import (
    NoRotation,
    RotaryEmbedding,
    RotaryEmbeddings,
    Rotation,
    whole_heads,
)


class DecoderLayer(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, attn_norm: RMSNorm, attn: nn.Module, *, mlp_norm: RMSNorm, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.attn_norm = attn_norm
        self.attn = attn
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(
        self, x: torch.Tensor, update: torch.Tensor | None, context: Context, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream x [B, T, H] and what is still to be added to it -> the same two after it.

        Each sum is made together with the norm that follows, at the latest by the layer it is for;
        without kernels there is nothing to be gained by waiting.
        """
        if not x.is_cuda:
            rows, x = self.attn_norm.add(x, update)
            rows, x = self.mlp_norm.add(x, self.attn(rows, context, layer_idx))
            return x, self.mlp(rows)
        normed = self.attn_norm.of_sum(x, update)
        update = self.attn(handed_to(self.attn, normed), context, layer_idx)
        normed = self.mlp_norm.of_sum(normed.sum, update)
        update = self.mlp(handed_to(self.mlp, normed))
        return normed.sum, update


class Balancer(Protocol):
    """What keeps the ranks evenly loaded that a decoder's experts are divided over."""

    def begin(self, real: torch.Tensor | None) -> None:
        """A step begins; real is bool [T], False at padding, or None without any."""
        ...

    def end_step(self, *, dummy: bool = False) -> None:
        """All that a step does is queued; `dummy` if this rank had no tokens in it."""
        ...

    def uncounted(self) -> AbstractContextManager[None]:
        """Steps within do nobody's work, and are not counted."""
        ...


class Turn(NamedTuple):
    """A forward pass that ranks make together."""

    goes_on: bool
    """False where none of them has anything to do: there is no such pass."""
    capacity: int | None
    """In a step of decoding the most tokens of a rank; None where one has a prompt."""
    tokens: Sequence[int]
    """Of each rank."""


class Peers(Protocol):
    """The other ranks that a decoder's experts are divided over, as generation sees them.

    Ranks make forward passes together. Each begins every one of them, and one that has no tokens
    goes through it without, until none has any.
    """

    same_tokens: bool
    """Whether all have the same tokens, and not each its own."""
    limit: int | None
    """The most tokens of a rank in a forward pass, where there is such a limit."""

    def begin(self, rows: int, prompts: Sequence[Sequence[int]] = ()) -> Turn:
        """Agree on the next pass: this rank has a token for each of so many rows, or pieces of
        prompts, or neither.

        Raises, on every rank, `ExpertMapError` where ranks that are alike have not the same, and
        `ValueError` where one has more tokens than the limit; `RankError` where one does not come.
        """
        ...

    def forward_pass(self, turn: Turn) -> AbstractContextManager[None]:
        """The block is that pass: layers need not agree again on what is known of it, and it can be
        captured if there is a capacity."""
        ...

    def step_without_tokens(self, decoder: "Decoder") -> None:
        """This rank's part in a pass for which it has nothing."""
        ...

    def chosen(self, tensor: torch.Tensor) -> torch.Tensor:
        """What was chosen for rows of this rank; that of the first one where all are alike."""
        ...

    def largest(self, *numbers: int) -> list[int]:
        """Each of these numbers where it is largest."""
        ...

    def same(self, **numbers: int) -> None:
        """Raise `ExpertMapError`, on every rank, unless all give the same numbers."""
        ...


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
        self.lm_head: nn.Linear | None = None
        if not tied:
            self.lm_head = Linear(hidden_size, vocab_size, bias=head_bias)
        self.recorder: RoutingRecorder | None = None
        """What counts the choices of the MoE layers, while somebody wants to know them."""
        self.dispatcher: Dispatcher | None = None
        """That of the MoE layers; None where this process has all the experts."""
        self.balancer: Balancer | None = None
        """None where there is nothing to balance."""
        self.peers: Peers | None = None
        """None where this process has all the experts."""
        self.stages: tuple[Stage, ...] = ()
        """Where layers are on several devices; all else is on one. See `find_stages`."""

    @property
    def moe_layers(self) -> dict[int, FusedMoE]:
        """The MoE layers, by their indices among `layers`."""
        return {i: x.mlp for i, x in enumerate(self.layers) if isinstance(x.mlp, FusedMoE)}

    def find_stages(self) -> None:
        """Look again at which devices the layers are on."""
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
        """Embeddings x [B, T, H] -> hidden states [B, T, H].

        The input of each layer, and last the result, are appended to `states`.
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
                    x, update, context = _moved(device, x, update, context)
                with device_made_current(x):
                    for layer_idx in layers:
                        if states is not None:
                            states.append(x if update is None else x + update)
                        x, update = modules[layer_idx](x, update, context, layer_idx)
            if home != x.device:
                x, update, _ = _moved(home, x, update, context)
            x, _ = self.norm.add(x, update)
        if states is not None:
            states.append(x)
        self.end_step()
        return x

    def forward_pass(self, num_tokens: int) -> AbstractContextManager[None]:
        """A forward pass over so many tokens, which other ranks that have experts make too."""
        if self.dispatcher is None:
            return nullcontext()
        return self.dispatcher.forward_pass(num_tokens)

    def end_step(self, *, dummy: bool = False) -> None:
        """A forward pass is queued, or a replay of one that was captured: experts may move."""
        if self.balancer is None:
            return
        if not (self.embed.weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.balancer.end_step(dummy=dummy)

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """Of tokens at positions int [B or 1, T], in the model's dtype."""
        rotation: Rotation = self.rope(positions, self.embed.weight.dtype)
        return rotation

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [.., H] -> logits [.., V] in the model's dtype."""
        head = self.embed if self.lm_head is None else self.lm_head
        bias = getattr(head, "bias", None)  # an embedding has none
        with device_made_current(x):
            if isinstance(head.weight, QuantizedWeights):
                return quantized_linear(x, head.weight(), bias)
            return linear(x, head.weight, bias)


def _moved(
    device: torch.device, x: torch.Tensor, update: torch.Tensor | None, context: Context
) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    assert isinstance(context, DenseContext), "an engine's cache is on one device"
    return x.to(device), None if update is None else update.to(device), context.to(device)


class ScaledDecoder(Decoder):
    """Embeddings are multiplied by `embedding_scale`, and logits by `logit_scale`."""

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


def _kind(window: int | None) -> str:
    if window is None:
        return "full_attention"
    return "chunked_attention" if isinstance(window, Chunked) else "sliding_attention"


def pre_norm_decoder(
    config: PreTrainedConfig,
    attention: Callable[[int], nn.Module],
    feed_forward: Callable[[int], nn.Module],
    *,
    rope: RotaryEmbedding | RotaryEmbeddings | NoRotation | None = None,
    norm: Callable[[int, Any], RMSNorm] = RMSNorm,
    layer: Callable[..., DecoderLayer] = DecoderLayer,
    decoder: Callable[..., Decoder] = Decoder,
) -> Decoder:
    """The usual decoder: an RMSNorm before `attention(layer_idx)` and `feed_forward(layer_idx)`.

    Without a `rope` all of each head is rotated, and a config that says otherwise is refused.
    Architectures that are unusual bring another `norm`, of the width and what is in
    `config.rms_norm_eps`, or classes derived from the `layer` and the
    `decoder` here.

    Raises `UnsupportedArchitectureError` where `config.layer_types` or `config.sliding_window` says
    other than the layers do: a cache keeps what the config says.
    """

    def new_norm() -> RMSNorm:
        return norm(config.hidden_size, getattr(config, "rms_norm_eps", None))

    layers = [
        layer(new_norm(), attention(layer_idx), mlp_norm=new_norm(), mlp=feed_forward(layer_idx))
        for layer_idx in range(config.num_hidden_layers)
    ]
    windows = [getattr(layer.attn, "window", None) for layer in layers]
    if any(window is not None and window < 1 for window in windows):
        raise UnsupportedArchitectureError.of_field(config, "sliding_window", "1 or more")
    kinds = [
        getattr(layer.attn, "kind", _kind(window))
        for layer, window in zip(layers, windows, strict=True)
    ]
    if getattr(config, "layer_types", None) is not None:
        if config.layer_types != kinds:
            raise UnsupportedArchitectureError.of_field(config, "layer_types", str(kinds))
        if not any("attention" in kind and kind != "linear_attention" for kind in kinds):
            # Nothing would know how long a sequence is.
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
        rope=rope or whole_heads(config),
        tied=config.tie_word_embeddings,
    )
