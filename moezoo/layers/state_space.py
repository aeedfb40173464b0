"""The state space model of Mamba-2 (Dao and Gu, 2024): each head has a matrix S that decays and is
added to.

    S = S * exp(dt[t] * rate) + dt[t] * x[t] b[t]^T
    y[t] = S c[t]

All heads share b and c. Many tokens are computed in chunks, and only the states of successive
chunks depend on each other. All of it is in fp32.

Legend: B sequences, T new tokens, H hidden, D inner width, Hs heads of width P, N state width.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.layers.context import Context
from moezoo.layers.convolution import CausalConvolution
from moezoo.layers.linear import FusedLinear, Linear
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.norm import NormOfSum, RMSNorm, input_for
from moezoo.layers.states import States, StateShape

CHUNK = 64


def state_space(
    x: Tensor, b: Tensor, c: Tensor, *, dt: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply the recurrence to T tokens; return y fp32 [B, T, Hs, P] and the state after the last
    token.

    x is [B, T, Hs, P], b and c [B, T, N], dt fp32 [B, T, Hs], rate fp32 [Hs] and negative, state
    fp32 [B, Hs, P, N]. A token whose dt is 0 leaves the state as it is.
    """
    b, c = b.float()[:, :, None], c.float()[:, :, None]
    x = x.float() * dt[..., None]
    length = x.shape[1]
    size = min(CHUNK, length)
    padding = -length % size

    def in_chunks(z: Tensor) -> Tensor:
        z = F.pad(z, (*(0,) * (2 * (z.dim() - 2)), 0, padding))
        return z.transpose(1, 2).unflatten(2, (-1, size))

    decay = in_chunks(dt * rate).cumsum(-1)  # [B, Hs, chunks, C]
    x, b, c = (in_chunks(z) for z in (x, b, c))
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, -torch.inf).exp()
    within = (c @ b.mT * between) @ x
    reads = c * decay.exp()[..., None]
    writes = x.mT @ (b * (decay[..., -1:] - decay).exp()[..., None])
    kept = decay[..., -1].exp()[..., None, None]
    outputs = []
    for n in range(x.shape[2]):
        outputs.append(within[:, :, n] + reads[:, :, n] @ state.mT)
        state = state * kept[:, :, n] + writes[:, :, n]
    y = torch.stack(outputs, 2).flatten(2, 3)[:, :, :length]
    return y.transpose(1, 2), state


class StateSpace(SequenceMixer):
    """Layer with the output out(norm((y + D x) * silu(z))), where y is the `state_space` of x, b
    and c.

    The rows of `zxbcdt` are z, then x, b and c, which go through the convolution, then dt. A
    token's time step is softplus(dt + dt_bias), the rate of decay -exp(A_log).
    """

    layer_type = "linear_attention"
    initial_values: ClassVar[dict[str, float]] = {"A_log": 0.0, "dt_bias": 1.0, "D": 1.0}

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        state_dim: int,
        conv: CausalConvolution,
        norm: RMSNorm,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.state_dim = state_dim
        dim = num_heads * head_dim
        self._sizes = (dim, dim + 2 * state_dim, num_heads)
        self.zxbcdt = FusedLinear(hidden_size, self._sizes)
        self.conv = conv
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.empty(num_heads))
        self.norm = norm
        self.out = Linear(dim, hidden_size, bias=False)

    @property
    def state_shapes(self) -> tuple[StateShape, ...]:
        """Shapes of the convolution's state and of the heads' matrices."""
        matrices = StateShape((self.num_heads, self.head_dim, self.state_dim), torch.float32)
        return self.conv.state_shape, matrices

    def forward(self, x: Tensor | NormOfSum, context: Context, layer_idx: int) -> Tensor:
        """Map x [B, T, H] to [B, T, H], with the states of `layer_idx`."""
        inputs = (self.zxbcdt(input_for(self.zxbcdt, x)),)
        return self.out(context.recur(self, inputs, layer_idx))

    def mix(
        self, inputs: tuple[Tensor, ...], states: States, real: Tensor | None
    ) -> tuple[Tensor, States]:
        """Map the projections [B, T, ..] to [B, T, D]; see `StateLayer.mix`."""
        z, xbc, dt = inputs[0].split_with_sizes(self._sizes, -1)
        xbc, window = self.conv(xbc, states[0], real)
        dim = self.num_heads * self.head_dim
        x, b, c = xbc.split_with_sizes((dim, self.state_dim, self.state_dim), -1)
        steps = F.softplus(dt.float() + self.dt_bias.float())
        if real is not None:
            steps = steps.masked_fill(~real[..., None], 0)
        x = x.unflatten(-1, (self.num_heads, -1))
        y, matrices = state_space(
            x,
            b,
            c,
            dt=steps,
            rate=-self.A_log.float().exp(),
            state=states[1],
        )
        y = (y + x.float() * self.D.float()[:, None]).flatten(2) * F.silu(z.float())
        # The norm is computed in fp32, whatever the dtype of its weight.
        y = F.rms_norm(y, (self.norm.dim,), self.norm.weight.float(), self.norm.eps)
        return y.to(z.dtype), (window, matrices)
