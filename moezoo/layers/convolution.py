"""A depthwise causal convolution that continues from the previous inputs.

Legend: B sequences, T new tokens, C channels, W width of the kernel.
"""

import torch
from torch import Tensor, nn

from moezoo.device import runs_kernels
from moezoo.layers.kernels.activations import ACTIVATIONS
from moezoo.layers.states import StateShape


class CausalConvolution(nn.Module):
    """y[t] = activation(sum_w weight[w] * x[t - W + 1 + w] + bias), channel by channel.

    weight is [C, 1, W], bias [C] or None. Without an activation y is the sum, which is fp32; y is
    rounded once.
    """

    def __init__(
        self, channels: int, width: int, activation: str | None = None, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.activation = activation

    @property
    def state_shape(self) -> StateShape:
        """Shape of a sequence's state: its newest W inputs, as transformers keeps them."""
        channels, _, width = self.weight.shape
        return StateShape((channels, width))

    def forward(self, x: Tensor, state: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve x [B, T, C], which follows the inputs in state [B, C, W]; return y [B, T, C] and
        the new state.

        Where `real` [B, T] is False x counts as 0, and the new state ends with the last real token.
        A single token on CUDA changes the state in place.
        """
        if x.shape[1] == 1 and runs_kernels(x, self.weight, self.bias):
            from moezoo.layers.kernels.convolution_step import convolution_step

            y = convolution_step(
                x[:, 0],
                state,
                self.weight[:, 0],
                bias=self.bias,
                activation=self.activation,
                used=None if real is None else real[:, 0],
            )
            return y[:, None], state
        y, state = self._in_torch(x, state, real)
        return (y if self.activation is None else ACTIVATIONS[self.activation](y)).to(
            x.dtype
        ), state

    def _in_torch(self, x: Tensor, state: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the fp32 sums [B, T, C], before the activation, and the new state."""
        width = state.shape[2]
        if real is not None:
            x = x.masked_fill(~real[..., None], 0)
        inputs = torch.cat((state.transpose(1, 2).to(x.dtype), x), 1)
        weight = self.weight[:, 0].float()
        y = inputs[:, 1 : 1 + x.shape[1]] * weight[:, 0]
        for w in range(1, width):
            y = torch.addcmul(y, inputs[:, 1 + w : 1 + w + x.shape[1]], weight[:, w])
        if self.bias is not None:
            y = y + self.bias.float()
        if real is None:
            return y, inputs[:, -width:].transpose(1, 2)
        places = torch.arange(1, real.shape[1] + 1, device=real.device)
        ends = (places * real).amax(1)
        window = ends[:, None] + torch.arange(width, device=real.device)
        kept = inputs.gather(1, window[..., None].expand(-1, -1, inputs.shape[2]))
        return y, kept.transpose(1, 2)
