"""Routing traces, which tell the experts that tokens go to: recording, saving and showing them.

Legend: T tokens, K experts per token, L MoE layers, E experts, S forward passes.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from moezoo.layers.decoder import decoder_of
from moezoo.layers.moe import FusedMoE, RoutingRecorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT, VERSION = "moezoo-routing", "1"

HISTORY = 1024
BINS = 50


@dataclass(frozen=True)
class LayerSummary:
    """Statistics of how one layer's tokens were spread over its experts."""

    layer: int
    tokens: int
    busiest: int
    """Index of the expert with most tokens."""
    imbalance: float
    """Tokens of the busiest expert over the mean of all experts; NaN without tokens."""
    entropy: float
    """Entropy in bits of the distribution of tokens over experts; log2(E) where all get as many."""
    dead: tuple[int, ...]
    """Number of experts without a token."""

    @property
    def effective_experts(self) -> float:
        """Number of evenly loaded experts that would have this entropy, 2^entropy."""
        return 2.0**self.entropy


class RoutingTrace:
    """The routing that `record_routing` records; inside its block, what was recorded so far.

    Reading from it waits for the work that is queued on the GPU.
    """

    def __init__(
        self, layers: tuple[int, ...], tensors: Mapping[str, Tensor], **about: Any
    ) -> None:
        self.layers = layers
        """Indices of the decoder's MoE layers, [L]."""
        self.about: dict[str, Any] = about
        """Facts about the model: its name `model`, `experts_per_token` (a list where layers
        differ) and `expert_bytes`, bytes of one expert in one layer."""
        self._tensors = tensors
        self._recorder: RoutingRecorder | None = None

    @property
    def model_name(self) -> str:
        """Return the model's hub id, or the last part of its folder's path."""
        name = str(self.about.get("model") or "a model")
        return os.path.basename(name.rstrip(os.sep)) if os.path.isabs(name) else name

    @property
    def expert_load(self) -> Tensor:
        """Number of tokens that went to each expert, int64 [L, E]."""
        return self._read()["expert_load"]

    @property
    def load_history(self) -> Tensor:
        """Tokens of each expert in each of the last forward passes, in order, int32 [S, L, E]."""
        return self._read()["load_history"]

    @property
    def score_histogram(self) -> Tensor:
        """Histogram of the chosen experts' shares of their token's weight, int64 [L, bins].

        The bins divide the range from 0 to 1 evenly.
        """
        return self._read()["score_histogram"]

    @property
    def topk_ids(self) -> tuple[Tensor, ...] | None:
        """Chosen experts, int32 [T, K] for each MoE layer, tokens in the order of computation.

        Recorded only with `choices=True`.
        """
        return self._choices("topk_ids")

    @property
    def topk_weights(self) -> tuple[Tensor, ...] | None:
        """Weights of chosen experts, fp32 [T, K] for each MoE layer; only with `choices=True`."""
        return self._choices("topk_weights")

    @property
    def imbalance(self) -> Tensor:
        """Tokens of the busiest expert over the mean, fp64 [L]; NaN without tokens."""
        load = self.expert_load.double()
        return load.amax(1) / load.mean(1)

    @property
    def coactivation(self) -> Tensor | None:
        """Number of tokens that chose both of two experts, int64 [L, E, E].

        The diagonal has the tokens of each expert. Only with `choices=True`.
        """
        if (chosen := self.topk_ids) is None:
            return None
        num_experts = self.expert_load.shape[1]
        pairs = []
        for ids in chosen:
            went = torch.zeros(len(ids), num_experts + 1, dtype=torch.float64)
            # -1, the id of no expert, is counted in a column of its own.
            went.scatter_(1, torch.where(ids < 0, num_experts, ids).long(), 1.0)
            pairs.append((went.T @ went)[:-1, :-1].long())
        return torch.stack(pairs)

    def summary(self) -> list[LayerSummary]:
        """Return each MoE layer's tokens, busiest expert, imbalance, entropy and dead experts."""
        load, imbalance = self.expert_load, self.imbalance
        share = load.double() / load.sum(1, keepdim=True)
        entropy = -(share * share.clamp(min=1e-300).log2()).sum(1)
        k = self.about.get("experts_per_token", 1)
        per_token = k if isinstance(k, list) else [k] * len(self.layers)
        return [
            LayerSummary(
                layer=layer,
                tokens=int(load[i].sum()) // per_token[i],
                busiest=int(load[i].argmax()),
                imbalance=float(imbalance[i]),
                entropy=float(entropy[i]),
                dead=tuple((load[i] == 0).nonzero().flatten().tolist()),
            )
            for i, layer in enumerate(self.layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return what `moezoo routing --json` prints: facts about the model, layers' summaries."""
        return {**self.about, "layers": [asdict(layer) for layer in self.summary()]}

    def html(self) -> str:
        """Return the trace as one self-contained page of HTML; see `moezoo.tools.routing_page`."""
        from moezoo.tools.routing_page import page

        return page(self)

    def _choices(self, name: str) -> tuple[Tensor, ...] | None:
        tensors = self._read()
        found = [tensors.get(f"{name}.{layer}") for layer in range(len(self.layers))]
        whole = tuple(tensor for tensor in found if tensor is not None)
        return whole if len(whole) == len(found) else None

    def _read(self) -> Mapping[str, Tensor]:
        return self._tensors if self._recorder is None else _tensors(self._recorder)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as safetensors, for `load`."""
        metadata = {"format": FORMAT, "version": VERSION}
        metadata |= {"layers": json.dumps(self.layers), "about": json.dumps(self.about)}
        # Not `save_file`, whose files only their owner can read.
        tensors = {name: tensor.contiguous() for name, tensor in self._read().items()}
        Path(path).write_bytes(save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RoutingTrace":
        """Read a trace that `save` wrote.

        Raises ValueError, naming the file, if it is not a trace, and OSError if there is no file.
        """
        with open(path, "rb"):
            pass  # safetensors tells less about a file that cannot be read
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a trace of moezoo routing")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{path} has version {metadata.get('version')}, and this moezoo reads {VERSION}; "
                "record it anew with moezoo routing"
            )
        about = json.loads(metadata["about"])
        return cls(tuple(json.loads(metadata["layers"])), tensors, **about)

    def plot(self) -> "Figure":
        """Return a matplotlib figure of the experts' loads and the imbalance of each layer."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        load = self.expert_load.double()
        figure = Figure(figsize=(10, 4), layout="constrained")
        heat, bars = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
        relative = (load / load.mean(1, keepdim=True)).numpy()
        image = heat.imshow(relative, aspect="auto", interpolation="nearest", cmap="viridis")
        heat.set(xlabel="expert", ylabel="layer", title="tokens, mean of a layer = 1")
        heat.yaxis.set_major_locator(MaxNLocator(12, integer=True))
        heat.yaxis.set_major_formatter(
            lambda at, _: str(self.layers[int(at)]) if 0 <= at < len(self.layers) else ""
        )
        figure.colorbar(image, ax=heat)
        bars.barh(range(len(self.layers)), self.imbalance.tolist())
        bars.set(xlabel="busiest expert over mean", title="imbalance")
        return figure

    def __rich__(self) -> Table:
        table = Table(title=Text(f"Routing of {self.model_name}", "table.title"))
        names = ("layer", "tokens", "busiest expert", "over mean", "entropy", "without a token")
        for name in names:
            table.add_column(name, justify="right")
        for layer in self.summary():
            table.add_row(
                str(layer.layer),
                f"{layer.tokens:,}",
                str(layer.busiest),
                f"{layer.imbalance:.2f}",
                f"{layer.entropy:.2f}",
                str(len(layer.dead)),
            )
        entropy = math.log2(self.expert_load.shape[1])
        table.caption = f"entropy in bits, {entropy:.2f} where every expert gets as many tokens"
        return table


def _tensors(recorder: RoutingRecorder) -> dict[str, Tensor]:
    passes = int(recorder.passes)
    history = recorder.history[..., :-1].cpu()
    size = len(history)
    order = [i % size for i in range(max(0, passes - size), passes)]
    tensors = {
        "expert_load": recorder.load[:, :-1].cpu(),
        "load_history": history[order],
        "score_histogram": recorder.scores[:, :-1].cpu(),
    }
    for layer, choices in enumerate(recorder.choices):
        if choices:
            ids, weights = zip(*choices, strict=True)
            tensors[f"topk_ids.{layer}"] = torch.cat(ids).cpu()
            tensors[f"topk_weights.{layer}"] = torch.cat(weights).cpu()
    return tensors


@contextmanager
def record_routing(
    model: PreTrainedModel, *, choices: bool = False, history: int = HISTORY
) -> Iterator[RoutingTrace]:
    """Record the routing of the tokens that the model computes within the block, padding excluded.

    Computation is counted, not text: a prefix that prompts share counts once, and the token after a
    sequence's last one counts where the engine is a step ahead. Generation has to begin and end
    within the block.

    Args:
        model: what `moezoo.from_pretrained` or `moezoo.from_config` returned.
        choices: keep `topk_ids` and `topk_weights` of each token too, on the model's device (8 K L
            bytes a token); steps then do not run as CUDA graphs.
        history: the last forward passes whose loads are kept one by one (4 L E bytes each).

    Raises:
        ValueError: it is not such a model, has no MoE layer, or is being recorded already.
    """
    if history < 1:
        raise ValueError(f"history must be at least 1, got {history}")
    decoder = decoder_of(model)
    if decoder.recorder is not None:
        raise ValueError("the model is being recorded already; one recording at a time")
    layers = decoder.moe_layers
    numbers = {len(layer.gate) for layer in layers.values()}
    if len(numbers) != 1:
        raise ValueError(
            f"its layers have {' and '.join(map(str, sorted(numbers))) or 'no'} experts; expected "
            "one number for all"
        )
    recorder = RoutingRecorder(
        len(layers),
        numbers.pop(),
        history=history,
        bins=BINS,
        keeps_choices=choices,
        device=decoder.embed.weight.device,
    )
    trace = RoutingTrace(
        tuple(layers),
        {},
        model=model.config.name_or_path,
        experts_per_token=_experts_per_token(layers.values()),
        expert_bytes=_nbytes(layers.values()),
    )
    trace._recorder = recorder
    decoder.recorder = recorder
    for i, layer in enumerate(layers.values()):
        layer.record = partial(recorder.add, i)
    try:
        yield trace
    finally:
        decoder.recorder = None
        for layer in layers.values():
            layer.record = None
        trace._tensors, trace._recorder = _tensors(recorder), None


def _experts_per_token(layers: Iterable[FusedMoE]) -> int | list[int]:
    """Return the layers' experts per token as routers are set now; one number if all agree."""
    numbers = [getattr(layer.reroute, "k", layer.router.keywords["k"]) for layer in layers]
    return numbers[0] if all(number == numbers[0] for number in numbers) else numbers


def _nbytes(layers: Iterable[FusedMoE]) -> int:
    """Return the stored bytes of an expert of the first layer with experts in this process."""
    held = (layer.expert_tensors() for layer in layers if layer.w2.shape[0])
    return sum(tensor[0].nbytes for tensor in next(held, []))
