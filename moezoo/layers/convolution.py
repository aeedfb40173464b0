"""A causal convolution of each channel for itself, which goes on from the inputs before.

Legend: B sequences, T new tokens, C channels, W width: the inputs that an output is made of.
"""

import torch
from torch import Tensor, nn

from moezoo.layers.states import StateShape


class CausalConvolution(nn.Module):
    """y[t] = sum_w weight[w] * x[t - W + 1 + w], channel by channel; weight [C, 1, W].

    The sum is fp32 and rounded once, by the caller.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    @property
    def state_shape(self) -> StateShape:
        """The newest W inputs of a sequence, as transformers keeps them."""
        channels, _, width = self.weight.shape
        return StateShape((channels, width))

    def forward(self, x: Tensor, state: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, C] after the inputs in state [B, C, W] -> y [B, T, C] fp32, the state after.

        Where `real` [B, T] is False x counts as 0, and the state ends with the last real token.
        """
        width = state.shape[2]
        if real is not None:
            x = x.masked_fill(~real[..., None], 0)
        inputs = torch.cat((state.transpose(1, 2).to(x.dtype), x), 1)
        weight = self.weight[:, 0].float()
        y = inputs[:, 1 : 1 + x.shape[1]] * weight[:, 0]
        for w in range(1, width):
            y = torch.addcmul(y, inputs[:, 1 + w : 1 + w + x.shape[1]], weight[:, w])
        if real is None:
            return y, inputs[:, -width:].transpose(1, 2)
        places = torch.arange(1, real.shape[1] + 1, device=real.device)
        ends = (places * real).amax(1)
        window = ends[:, None] + torch.arange(width, device=real.device)
        kept = inputs.gather(1, window[..., None].expand(-1, -1, inputs.shape[2]))
        return y, kept.transpose(1, 2)
