"""Gated DeltaNet (Yang et al., 2024) of Qwen3-Next: linear attention by the gated delta rule, with
a short convolution before it and a gated norm after it.

Legend: B sequences, T new tokens, H hidden, Hk key heads, Hv value heads, Dk and Dv their widths.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.device import runs_kernels
from moezoo.layers.context import Context
from moezoo.layers.convolution import CausalConvolution
from moezoo.layers.delta_rule import gated_delta_rule
from moezoo.layers.linear import FusedLinear, Linear
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.norm import NormOfSum, RMSNorm, input_for
from moezoo.layers.states import States, StateShape

Parts = tuple[Tensor, Tensor, Tensor, Tensor]
"""Concatenated queries, keys and values [B, T, 2 Hk Dk + Hv Dv], the output's gate z
[B, T, Hv, Dv], and b and a, each [B, T, Hv], which give beta and the decay."""


def by_kind(net: "GatedDeltaNet", qkvz: Tensor, ba: Tensor) -> Parts:
    """Split projections whose rows are all queries, then all keys, all values and all z; and all b,
    then all a."""
    mixed, z = qkvz.split_with_sizes((net.conv_dim, net.value_dim), -1)
    b, a = ba.chunk(2, -1)
    return mixed, z.unflatten(-1, (net.num_v_heads, -1)), b, a


def by_key_head(net: "GatedDeltaNet", qkvz: Tensor, ba: Tensor) -> Parts:
    """Split projections whose rows are grouped by key head: its query, key, values and z; its b and
    its a."""
    groups = net.num_v_heads // net.num_k_heads
    widths = (net.k_dim, net.k_dim, groups * net.v_dim, groups * net.v_dim)
    *qkv, z = qkvz.unflatten(-1, (net.num_k_heads, -1)).split_with_sizes(widths, -1)
    b, a = ba.unflatten(-1, (net.num_k_heads, 2, groups)).unbind(-2)
    mixed = torch.cat([x.flatten(2) for x in qkv], -1)
    return mixed, z.reshape(*z.shape[:2], net.num_v_heads, -1), b.flatten(2), a.flatten(2)


class GatedDeltaNet(SequenceMixer):
    """Linear attention with the output out(norm(delta_rule(convolution(q, k, v))) * silu(z)).

    `parts` splits the two input projections by the order of their rows: `by_kind` or `by_key_head`.
    The decay of a token is exp(-exp(A_log) * softplus(a + dt_bias)).
    """

    layer_type = "linear_attention"
    initial_values: ClassVar[dict[str, float]] = {"A_log": 0.0, "dt_bias": 1.0}

    def __init__(
        self,
        hidden_size: int,
        num_k_heads: int,
        num_v_heads: int,
        *,
        k_dim: int,
        v_dim: int,
        conv_width: int,
        activation: str,
        norm: RMSNorm,
        parts: Callable[["GatedDeltaNet", Tensor, Tensor], Parts],
    ) -> None:
        super().__init__()
        self.num_k_heads = num_k_heads
        self.num_v_heads = num_v_heads
        self.k_dim = k_dim
        self.v_dim = v_dim
        self.value_dim = num_v_heads * v_dim
        self.conv_dim = 2 * num_k_heads * k_dim + self.value_dim
        self.parts = parts
        self.qkvz = FusedLinear(hidden_size, (self.conv_dim, self.value_dim))
        self.ba = FusedLinear(hidden_size, (num_v_heads, num_v_heads))
        self.conv = CausalConvolution(self.conv_dim, conv_width, activation)
        self.A_log = nn.Parameter(torch.empty(num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_v_heads))
        self.norm = norm
        self.out = Linear(self.value_dim, hidden_size, bias=False)

    @property
    def state_shapes(self) -> tuple[StateShape, ...]:
        """Shapes of the convolution's state and of the delta rule's matrices."""
        matrices = StateShape((self.num_v_heads, self.k_dim, self.v_dim), torch.float32)
        return self.conv.state_shape, matrices

    def forward(self, x: Tensor | NormOfSum, context: Context, layer_idx: int) -> Tensor:
        """Map x [B, T, H] to [B, T, H], with the states of `layer_idx`."""
        inputs = self.qkvz(input_for(self.qkvz, x)), self.ba(input_for(self.ba, x))
        return self.out(context.recur(self, inputs, layer_idx))

    def mix(
        self, inputs: tuple[Tensor, ...], states: States, real: Tensor | None
    ) -> tuple[Tensor, States]:
        """Map the two projections [B, T, ..] to [B, T, Hv * Dv]; see `StateLayer.mix`."""
        mixed, z, b, a = self.parts(self, *inputs)
        window, matrices = states
        convolved, window = self.conv(mixed, window, real)
        if mixed.shape[1] == 1 and runs_kernels(mixed, self.A_log, self.dt_bias, self.norm.weight):
            from moezoo.layers.kernels.delta_step import delta_step

            matrices = matrices.contiguous()
            y = delta_step(
                convolved[:, 0],
                z[:, 0],
                b[:, 0],
                a[:, 0],
                matrices,
                A_log=self.A_log,
                dt_bias=self.dt_bias,
                norm_weight=self.norm.weight,
                eps=self.norm.eps,
                used=None if real is None else real[:, 0],
            )
            return y[:, None], (window, matrices)
        key_dim = self.num_k_heads * self.k_dim
        q, k, v = convolved.split_with_sizes((key_dim, key_dim, self.value_dim), -1)
        g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        beta = b.float().sigmoid()
        if real is not None:
            g, beta = (x.masked_fill(~real[..., None], 0) for x in (g, beta))
        y, matrices = gated_delta_rule(
            q.unflatten(-1, (-1, self.k_dim)),
            k.unflatten(-1, (-1, self.k_dim)),
            v.unflatten(-1, (-1, self.v_dim)),
            g=g[..., None],
            beta=beta,
            state=matrices,
        )
        y = self.norm(y.to(mixed.dtype)) * F.silu(z.float())
        return y.to(mixed.dtype).flatten(2), (window, matrices)
