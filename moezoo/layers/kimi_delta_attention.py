"""Kimi Delta Attention (Kimi Team, 2025): a gated delta net in which each channel of a key has its
own decay.

Legend: B sequences, T new tokens, H hidden, N heads, D their width.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.layers.context import Context
from moezoo.layers.convolution import CausalConvolution
from moezoo.layers.delta_rule import gated_delta_rule
from moezoo.layers.linear import FusedLinear, Linear
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.norm import NormOfSum, RMSNorm, input_for
from moezoo.layers.states import States, StateShape


class KimiDeltaAttention(SequenceMixer):
    """Linear attention with the output o(norm(delta_rule(convolution(q, k, v))) * sigmoid(z)).

    `x_proj` computes all projections of the input in one product: q, k and v [N D] each, D numbers
    that `decay` projects to all channels, D that `z` projects to the output's gate, and b [N],
    whose sigmoid is beta. The decay of a token is exp(-exp(A_log) * softplus(decay + dt_bias)).
    """

    layer_type = "linear_attention"
    initial_values: ClassVar[dict[str, float]] = {"A_log": 0.0, "dt_bias": 1.0}

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        conv: CausalConvolution,
        norm: RMSNorm,
    ) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.x_proj = FusedLinear(hidden_size, (*[width] * 3, *[head_dim] * 2, num_heads))
        self.conv = conv
        self.decay = Linear(head_dim, width, bias=False)
        self.z = Linear(head_dim, width, bias=False)
        self.A_log = nn.Parameter(torch.empty(1, 1, num_heads, 1))
        self.dt_bias = nn.Parameter(torch.empty(width))
        self.norm = norm
        self.o = Linear(width, hidden_size, bias=False)

    @property
    def state_shapes(self) -> tuple[StateShape, ...]:
        """Shapes of the convolution's state and of the delta rule's matrices."""
        matrices = StateShape((self.num_heads, self.head_dim, self.head_dim), torch.float32)
        return self.conv.state_shape, matrices

    def forward(self, x: Tensor | NormOfSum, context: Context, layer_idx: int) -> Tensor:
        """Map x [B, T, H] to [B, T, H], with the states of `layer_idx`."""
        widths = (3 * self.num_heads * self.head_dim, self.head_dim, self.head_dim, self.num_heads)
        product = self.x_proj(input_for(self.x_proj, x))
        qkv, decay, z, b = product.split_with_sizes(widths, -1)
        inputs = qkv, self.decay(decay), self.z(z), b
        return self.o(context.recur(self, inputs, layer_idx))

    def mix(
        self, inputs: tuple[Tensor, ...], states: States, real: Tensor | None
    ) -> tuple[Tensor, States]:
        """Map qkv [B, T, 3 N D], the decay and z [B, T, N D] and b [B, T, N] to [B, T, N D]; see
        `StateLayer.mix`."""
        qkv, decay, z, b = inputs
        convolved, window = self.conv(qkv, states[0], real)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in convolved.chunk(3, -1))
        steps = F.softplus(decay.float() + self.dt_bias.float()).unflatten(-1, (self.num_heads, -1))
        g = -self.A_log.float().exp() * steps
        beta = b.float().sigmoid()
        if real is not None:
            g = g.masked_fill(~real[..., None, None], 0)
            beta = beta.masked_fill(~real[..., None], 0)
        y, matrices = gated_delta_rule(q, k, v, g=g, beta=beta, state=states[1])
        # The norm is computed in fp32, whatever the dtype of its weight.
        y = F.rms_norm(y, (self.head_dim,), self.norm.weight.float(), self.norm.eps)
        return (y.flatten(2) * z.float().sigmoid()).to(qkv.dtype), (window, matrices)
