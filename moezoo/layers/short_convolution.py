"""The gated short convolution of LFM2 (Liquid AI, 2025).

Legend: B sequences, T new tokens, H hidden.
"""

from torch import Tensor

from moezoo.layers.context import Context
from moezoo.layers.convolution import CausalConvolution
from moezoo.layers.linear import FusedLinear, Linear
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.norm import NormOfSum, input_for
from moezoo.layers.states import States, StateShape


class ShortConvolution(SequenceMixer):
    """Layer with the output out(c * convolution(b * x)), where b, c and x are projections of the
    input."""

    layer_type = "conv"

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.bcx = FusedLinear(hidden_size, (hidden_size,) * 3)
        self.conv = CausalConvolution(hidden_size, width)
        self.out = Linear(hidden_size, hidden_size, bias=False)

    @property
    def state_shapes(self) -> tuple[StateShape, ...]:
        """Shape of the convolution's state."""
        return (self.conv.state_shape,)

    def forward(self, x: Tensor | NormOfSum, context: Context, layer_idx: int) -> Tensor:
        """Map x [B, T, H] to [B, T, H], with the state of `layer_idx`."""
        return self.out(context.recur(self, (self.bcx(input_for(self.bcx, x)),), layer_idx))

    def mix(
        self, inputs: tuple[Tensor, ...], states: States, real: Tensor | None
    ) -> tuple[Tensor, States]:
        """Map the projections [B, T, 3 H] to [B, T, H]; see `StateLayer.mix`."""
        b, c, x = inputs[0].chunk(3, -1)
        y, window = self.conv(b * x, states[0], real)
        return c * y, (window,)
