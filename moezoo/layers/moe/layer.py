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
from moezoo.layers.moe.ranges import profiler_range
from moezoo.layers.norm import NormOfSum, is_hooked, normed
from moezoo.layers.quant import Format, QuantizedWeights

NORM_TOKENS = 8
"""Largest number of tokens for which the router's kernel computes the norm of x as well."""

SHARED_TOKENS = 1
"""Largest number of tokens for which shared experts are computed in the launches of the routed
ones: with more, their weights would be read from L2 once for each token."""

Route = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function from logits [T, E] to topk_weights [T, K] fp32 and topk_ids [T, K] int32, from 0 to
E-1, or -1 for no expert."""

Record = Callable[[Tensor, Tensor], None]
"""A function that is called with topk_weights and topk_ids [T, K]."""


class Arrival(NamedTuple):
    """Tokens that have arrived at this rank: x [T', H], topk_weights fp32 [T', K], and rows int32
    [T', K], those of the chosen experts in this rank's w13 and w2, -1 where another rank has one.
    """

    x: Tensor
    topk_weights: Tensor
    rows: Tensor


class Flight(Protocol):
    """The tokens of one layer on their way to the experts and back."""

    def arrivals(self) -> Iterator[Arrival]:
        """Yield the tokens that come to this rank, in parts. Each part is answered before the next
        is taken, which travels meanwhile."""

    def answer(self, y: Tensor) -> None:
        """Send back y [T', H], the weighted sums of this rank's experts for the last arrival."""

    def combine(self) -> Tensor:
        """Return the outputs [T, H] of this rank's tokens, the sums of all ranks' answers in fp32,
        rounded once."""


class Dispatcher(Protocol):
    """Carries tokens to the ranks that hold their experts, and their outputs back."""

    def forward_pass(self, num_tokens: int) -> AbstractContextManager[None]:
        """Return the context of a forward pass over `num_tokens` tokens of this rank, perhaps 0.
        All ranks enter it together, and agree once on what each layer would ask."""

    def dispatch(self, x: Tensor, topk_weights: Tensor, slots: Tensor) -> Flight:
        """Send x [T, H] and topk_weights fp32 [T, K] to the ranks of the slots int32 [T, K], which
        are numbered over all ranks. Every rank has to call it for every layer, also without tokens.
        """


class BiasedRoute(nn.Module):
    """A route with a correction bias [E], which takes part in the choice of experts but not in
    their weights: `fn(logits, correction_bias=self.correction_bias)`.

    The bias stays fp32 whatever the model's dtype: 16 bits are too coarse for its steps.
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
    """A route for a gate whose linear layer has a bias [E]: `fn(logits, bias=self.bias)`."""

    def __init__(self, num_experts: int, fn: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.fn = fn
        self.bias = nn.Parameter(torch.empty(num_experts))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.fn(logits, bias=self.bias)


def _weights(held: nn.Parameter | QuantizedWeights) -> Tensor | Format:
    """Return what `fused_experts` takes for a layer's w13 or w2."""
    return held() if isinstance(held, QuantizedWeights) else held


class FusedMoE(nn.Module):
    """Mixture of gated experts: each token goes to K of E, and all go to `shared`, if there is one.

    Parameters: gate [E, H]; w13 [E, 2I, H], gate rows then up rows; w2 [E, H, I]; with `bias` also
    the experts' bias13 [E, 2I] and bias2 [E, H]. If they are quantised, w13 [E, 2, I, H] and w2 are
    modules with parameters of their own, see `quantize_`.

    `route` maps fp32 logits [T, E] to (topk_weights [T, K] fp32, topk_ids [T, K] int32): a partial
    of a function in `moezoo.layers.moe.routing`, or a module where the router has parameters.
    `shared` is a module [T, H] -> [T, H] whose output is added. If it has a true attribute `adds`,
    it is called with the routed experts' output as its second argument and returns the sum, perhaps
    in that tensor, and it has `activation` and `as_shared_expert` as `GatedMLP` has them.

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
        """Function that is called instead of `route` while routing is overridden, else None."""
        self.record: Record | None = None
        """Function that is called with topk_weights and topk_ids [T, K] in each forward pass."""
        self.physical_ids: Callable[[Tensor], Tensor] | None = None
        """A function from topk_ids [T, K] to the slots int32 [T, K] of these experts; None where
        expert e is in slot e."""
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
        """Replace the experts' parameters by w13 [E, 2, I, H] and w2 [E, H, I] of one format; there
        is no gradient through them.

            layer.quantize_(
                Int8.quantize(layer.w13.unflatten(1, (2, -1))), Int8.quantize(layer.w2)
            )

        Raises ValueError if a shape differs, or they are not of one `Format`.
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

    def dequantize_(self, dtype: torch.dtype) -> None:
        """Make quantised experts parameters of `dtype` again, which get no gradient until they are
        asked to. Raises ValueError where experts are divided over ranks, which may be moving them.
        """
        if not isinstance(self.w13, QuantizedWeights) or not isinstance(self.w2, QuantizedWeights):
            return
        if self.dispatcher is not None:
            raise ValueError(
                "experts that are divided over ranks stay quantised; load the model without "
                "parallel, or from a checkpoint that is not quantised"
            )
        w13, w2 = self.w13.dequantize(dtype).flatten(1, 2), self.w2.dequantize(dtype)
        del self.w13, self.w2
        self.w13 = nn.Parameter(w13, requires_grad=False)
        self.w2 = nn.Parameter(w2, requires_grad=False)

    @property
    def num_experts(self) -> int:
        """Number of routed experts that a token can choose from, those of other ranks included."""
        return self.gate.shape[0]

    @property
    def router(self) -> partial[tuple[Tensor, Tensor]]:
        """The routing function of `route` with its settings, k among them."""
        function = self.route.fn if isinstance(self.route, nn.Module) else self.route
        assert isinstance(function, partial), "routes are partial(function, k=..., ...)"
        return function

    def expert_tensors(self) -> list[Tensor]:
        """Return the parameters [E', ..] of this process' experts, which have a row for each."""
        return [
            tensor
            for w in (self.w13, self.w2, self.bias13, self.bias2)
            if w is not None
            for tensor in (w.parameters() if isinstance(w, QuantizedWeights) else [w])
        ]

    @property
    def quantized(self) -> type[Format] | None:
        """The format of the experts' weights; None where they are parameters of 16 or 32 bits."""
        return self.w13.kind.format if isinstance(self.w13, QuantizedWeights) else None

    def __setattr__(self, name: str, value: Any) -> None:
        # A function takes the place of a router that is a module, which torch's modules refuse.
        if name == "route" and not isinstance(value, nn.Module):
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    def forward(self, x: Tensor | NormOfSum) -> Tensor:
        """x [..., H] -> [..., H] of the same dtype."""
        with profiler_range("route"):
            logits = self.router_logits(x)
            topk_weights, topk_ids = (self.reroute or self.route)(logits)
        x = normed(x)
        tokens = x.reshape(-1, x.shape[-1])
        if self.record is not None:
            self.record(topk_weights, topk_ids)
        return self.routed(tokens, topk_weights, topk_ids).view(x.shape)

    def routed(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts plus the shared ones, x [T, H] -> [T, H].

        An id of -1 stands for no expert.
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
        """Compute routed and shared experts in the same launches, where tokens are so few that
        launches count; return None where no kernel does."""
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

        with profiler_range("experts"), torch.cuda.device_of(x):
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
        """Return the gate's logits [T, E] of x [.., H], computed in fp32: 16-bit logits would swap
        close experts."""
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
        """Return the weighted sum of this process' experts, x [T, H] -> [T, H]; `rows` [T, K] are
        rows of w13 and w2, or -1."""
        w13, w2 = _weights(self.w13), _weights(self.w2)
        if w2.shape[0] == 0:
            return torch.zeros_like(x)
        bias13 = self.bias13
        if bias13 is not None and self.quantized is not None:
            bias13 = bias13.unflatten(1, (2, -1))
        with profiler_range("experts"):
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
        """Return the weighted sum of the experts in `slots` [T, K] of all ranks, plus beside(x),
        which is computed while the experts' last outputs travel."""
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
