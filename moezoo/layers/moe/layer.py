"""The MoE layer: a gate, the stacked experts, and what runs beside them.

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.device import runs_kernels
from moezoo.layers.kernels.activations import Gating
from moezoo.layers.moe.experts import fused_experts
from moezoo.layers.moe.ranges import verb
from moezoo.layers.norm import NormOfSum, is_hooked, normed
from moezoo.layers.quant import Format, QuantizedWeights

NORM_TOKENS = 8
"""For up to this many tokens the router's kernel computes the norm of x as well."""

SHARED_TOKENS = 1
"""For up to this many tokens the shared experts are computed in the launches of the routed ones:
for more, their weights would come from L2 once for each."""

Route = Callable[[Tensor], tuple[Tensor, Tensor]]
Record = Callable[[Tensor, Tensor], None]


class Arrival(NamedTuple):
    """Tokens that this rank works on: x [T', H], topk_weights fp32 and rows int32 [T', K], the row
    of each chosen expert in this rank's w13 and w2, or -1 where another rank has it."""

    x: Tensor
    topk_weights: Tensor
    rows: Tensor


class Flight(Protocol):
    """The tokens of one layer on their way to the experts and back."""

    def arrivals(self) -> Iterator[Arrival]:
        """The tokens that come to this rank, in parts. Each is answered before the next is taken,
        while that travels."""

    def answer(self, y: Tensor) -> None:
        """y [T', H]: what this rank's experts make of the last arrival, weighted and summed."""

    def combine(self) -> Tensor:
        """[T, H] of this rank's tokens: all answers to each, summed in fp32 and rounded once."""


class Dispatcher(Protocol):
    """Carries tokens to the ranks that hold their experts, and their outputs back."""

    def forward_pass(self, num_tokens: int) -> AbstractContextManager[None]:
        """The block is a forward pass over so many tokens of this rank, or none. Every rank begins
        it at the same time; what they agree on then they need not in each layer."""

    def dispatch(self, x: Tensor, topk_weights: Tensor, slots: Tensor) -> Flight:
        """x [T, H], topk_weights fp32 [T, K], slots int32 [T, K]: physical experts, counted over
        all ranks. Every rank has to call it for every layer, with no tokens if need be."""


class BiasedRoute(nn.Module):
    """A route with a correction bias: `fn(logits, correction_bias=self.correction_bias)`.

    The bias [E] stays fp32 whatever the model's dtype: its steps are finer than 16 bit resolve.
    """

    keep_dtype: ClassVar[tuple[str, ...]] = ("correction_bias",)

    def __init__(self, num_experts: int, fn: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.fn = fn
        self.correction_bias = nn.Parameter(
            torch.empty(num_experts, dtype=torch.float32), requires_grad=False
        )

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.correction_bias)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.fn(logits, correction_bias=self.correction_bias)


class BiasedLogits(nn.Module):
    """A route for a gate with a bias [E]: `fn(logits, bias=self.bias)`."""

    def __init__(self, num_experts: int, fn: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.fn = fn
        self.bias = nn.Parameter(torch.empty(num_experts))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.fn(logits, bias=self.bias)


def _weights(held: nn.Parameter | QuantizedWeights) -> Tensor | Format:
    return held() if isinstance(held, QuantizedWeights) else held


class FusedMoE(nn.Module):
    """K of E gated experts for each token, plus `shared`, if there is one, for every token.

    Parameters: gate [E, H]; w13 [E, 2I, H], gate rows then up rows; w2 [E, H, I]; with `bias` also
    bias13 [E, 2I] and bias2 [E, H] of the experts. Quantised, w13 [E, 2, I, H] and w2 are modules
    with parameters of their own, see `quantize_`.

    `route` maps fp32 logits [T, E] to (topk_weights [T, K] fp32, topk_ids [T, K] int32): a partial
    of a function in `moezoo.layers.moe.routing`, or a module where the router has parameters.
    `shared` is a module [T, H] -> [T, H] whose output is added; one with a true attribute `adds`
    takes what it is added to as its second argument, which it may overwrite, and has `activation`
    and `as_shared_expert` as `GatedMLP` has them.

    Where experts are divided over ranks, w13 and w2 hold those of this rank, in its slots, and
    `dispatcher` carries the tokens; it is None where this process holds all the experts.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        route: Route,
        *,
        activation: str | Gating = "silu",
        bias: bool = False,
        shared: nn.Module | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.route = route
        self.shared = shared
        self.dispatcher = dispatcher
        self.reroute: Route | None = None
        """Called in the place of `route`, while somebody experiments with it."""
        self.record: Record | None = None
        """Called with topk_weights and topk_ids [T, K] of each forward pass."""
        self.physical_ids: Callable[[Tensor], Tensor] | None = None
        """topk_ids [T, K] -> the slots int32 [T, K] of these experts; None where expert e is in
        slot e."""
        self.gate = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.w13: nn.Parameter | QuantizedWeights = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.w2: nn.Parameter | QuantizedWeights = nn.Parameter(
            torch.empty(num_experts, hidden_size, intermediate_size)
        )
        self.bias13: nn.Parameter | None = None
        self.bias2: nn.Parameter | None = None
        if bias:
            self.bias13 = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size))
            self.bias2 = nn.Parameter(torch.empty(num_experts, hidden_size))

    def reset_parameters(self) -> None:
        for parameter in (self.gate, self.w13, self.w2):
            if isinstance(parameter, QuantizedWeights):
                raise ValueError("quantised experts are not reset; build the layer anew")
            nn.init.normal_(parameter, std=0.02)
        for bias in (self.bias13, self.bias2):
            if bias is not None:
                nn.init.zeros_(bias)

    def quantize_(self, w13: Format, w2: Format) -> None:
        """Put w13 [E, 2, I, H] and w2 [E, H, I], both of one format, in the place of the experts'
        parameters. They need no gradient, and none comes through them.

            layer.quantize_(
                Int8.quantize(layer.w13.unflatten(1, (2, -1))), Int8.quantize(layer.w2)
            )

        Raises ValueError for other shapes, two formats, or what is none.
        """
        for name, given in (("w13", w13), ("w2", w2)):
            if not isinstance(given, Format):
                raise ValueError(
                    f"{name} is a {type(given).__name__}, expected weights of a format, such as "
                    "Int8.quantize(w) makes them"
                )
        num_experts, hidden_size, intermediate_size = self.w2.shape
        expected = (num_experts, 2, intermediate_size, hidden_size), tuple(self.w2.shape)
        if (tuple(w13.shape), tuple(w2.shape)) != expected:
            raise ValueError(
                f"w13 and w2 must be {list(expected[0])} and {list(expected[1])}, got "
                f"{list(w13.shape)} and {list(w2.shape)}"
            )
        if type(w13) is not type(w2):
            raise ValueError(
                f"w13 and w2 must be of one format, got {type(w13).__name__} and "
                f"{type(w2).__name__}"
            )
        del self.w13, self.w2
        self.w13, self.w2 = QuantizedWeights(w13), QuantizedWeights(w2)

    @property
    def num_experts(self) -> int:
        """Those of all ranks that a token can choose from."""
        return self.gate.shape[0]

    @property
    def router(self) -> partial[tuple[Tensor, Tensor]]:
        """The function that `route` is made of, with its settings; k is one of them."""
        function = self.route.fn if isinstance(self.route, nn.Module) else self.route
        assert isinstance(function, partial), "routes are partial(function, k=..., ...)"
        return function

    def expert_tensors(self) -> list[Tensor]:
        """All that the experts of this process consist of: parameters [E', ..], a row for each."""
        return [
            tensor
            for w in (self.w13, self.w2, self.bias13, self.bias2)
            if w is not None
            for tensor in (w.parameters() if isinstance(w, QuantizedWeights) else [w])
        ]

    @property
    def quantized(self) -> type[Format] | None:
        """The format of the experts' weights; None where they are parameters of 16 or 32 bits."""
        return self.w13.format if isinstance(self.w13, QuantizedWeights) else None

    def forward(self, x: Tensor | NormOfSum) -> Tensor:
        """x [..., H] -> [..., H] of the same dtype."""
        with verb("route"):
            logits = self.router_logits(x)
            topk_weights, topk_ids = (self.reroute or self.route)(logits)
        x = normed(x)
        tokens = x.reshape(-1, x.shape[-1])
        if self.record is not None:
            self.record(topk_weights, topk_ids)
        return self.routed(tokens, topk_weights, topk_ids).view(x.shape)

    def routed(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """The weighted sum of the chosen experts, and of the shared ones: x [T, H] -> [T, H].

        An id of -1 is no expert.
        """
        if self.physical_ids is not None:
            topk_ids = self.physical_ids(topk_ids)
        if self.dispatcher is not None:
            return self.dispatched(x, topk_weights, topk_ids, beside=self.shared)
        shared = self.shared  # a module looks it up anew each time
        if shared is None:
            return self.experts(x, topk_weights, topk_ids)
        adds = getattr(shared, "adds", False) and not is_hooked(shared)
        if adds and x.is_cuda:
            y = self._with_shared(x, topk_weights, topk_ids, shared)
            if y is not None:
                return y
        y = self.experts(x, topk_weights, topk_ids)
        return shared(x, y) if adds else y + shared(x)

    def _with_shared(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared: Any
    ) -> Tensor | None:
        """Routed and shared experts in the same launches, where tokens are so few that launches
        count; None where this does not go."""
        w13, w2, bias13, bias2 = self.w13, self.w2, self.bias13, self.bias2
        if (
            len(x) > SHARED_TOKENS
            or isinstance(w13, QuantizedWeights)
            or isinstance(w2, QuantizedWeights)
            or shared.activation != self.activation
            or type(self).experts is not FusedMoE.experts
            or not runs_kernels(x, topk_weights, w13, w2, bias13, bias2, *shared.parameters())
        ):
            return None
        expert = shared.as_shared_expert(x)
        if expert is None:
            return None
        from moezoo.layers.kernels.few_tokens import few_tokens

        with verb("experts"), torch.cuda.device_of(x):
            return few_tokens(
                *(x, w13, w2),
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                activation=self.activation,
                bias13=bias13,
                bias2=bias2,
                shared=expert,
            )

    def router_logits(self, x: Tensor | NormOfSum) -> Tensor:
        """x [.., H] -> [T, E] fp32, computed in fp32: 16-bit logits would swap close experts."""
        if isinstance(x, NormOfSum):
            arguments = x.kernel_arguments(NORM_TOKENS, self.gate)
            if arguments is not None:
                from moezoo.layers.kernels.router_logits import add_norm_router_logits

                logits, rows, total = add_norm_router_logits(gate=self.gate, **arguments)
                x.store(total, rows)
                return logits
            x = x.normed
        x, gate = x.reshape(-1, x.shape[-1]), self.gate
        if runs_kernels(x, gate):
            from moezoo.layers.kernels.router_logits import FEW_TOKENS, router_logits

            if len(x) <= FEW_TOKENS:
                return router_logits(x, gate)
            return torch.mm(x, gate.T, out_dtype=torch.float32)
        return F.linear(x.float(), gate.float())

    def experts(self, x: Tensor, topk_weights: Tensor, rows: Tensor) -> Tensor:
        """The weighted sum of experts of this process, by their rows in w13 and w2:
        x [T, H] -> [T, H]."""
        w13, w2 = _weights(self.w13), _weights(self.w2)
        if w2.shape[0] == 0:
            return torch.zeros_like(x)
        bias13 = self.bias13
        if bias13 is not None and self.quantized is not None:
            bias13 = bias13.unflatten(1, (2, -1))
        with verb("experts"):
            return fused_experts(
                *(x, w13, w2, topk_weights, rows),
                activation=self.activation,
                bias13=bias13,
                bias2=self.bias2,
            )

    def dispatched(
        self,
        x: Tensor,
        topk_weights: Tensor,
        slots: Tensor,
        *,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The same over the experts of all ranks, by their slots, plus beside(x), which is computed
        while their last outputs travel."""
        assert self.dispatcher is not None
        flight = self.dispatcher.dispatch(x, topk_weights, slots)
        for arrival in flight.arrivals():
            flight.answer(self.experts(*arrival))
        addend = None if beside is None else beside(x)
        y = flight.combine()
        return y if addend is None else y + addend

    def extra_repr(self) -> str:
        num_experts, hidden_size, intermediate_size = self.w2.shape
        sizes = f"H={hidden_size}, I={intermediate_size}, E={num_experts}, {self.activation}"
        return sizes if self.quantized is None else f"{sizes}, {self.quantized.name}"
