"""Grouped-query attention with an output gate (Qiu et al., 2025).

Legend: B batch, T new tokens, H hidden, Hq query heads, Hk key heads, D head width.
"""

from typing import Any

import torch

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.context import Context
from moezoo.layers.linear import FusedLinear
from moezoo.layers.norm import NormOfSum, input_for


class GatedAttention(GroupedQueryAttention):
    """Attention with the output o(attention * sigmoid(gate)), with D gates for each query head.

    The rows of `qkv` are D of the query and D of the gate for each query head, then keys and
    values.
    """

    def __init__(
        self, hidden_size: int, *num_heads: int, qkv_bias: bool = False, **options: Any
    ) -> None:
        super().__init__(hidden_size, *num_heads, **options)
        q_size, *kv_sizes = self.sizes
        self.qkv = FusedLinear(hidden_size, (2 * q_size, *kv_sizes), qkv_bias)

    def forward(
        self, x: torch.Tensor | NormOfSum, context: Context, layer_idx: int
    ) -> torch.Tensor:
        q_size, *kv_sizes = self.sizes
        qkv = self.qkv(input_for(self.qkv, x))
        heads, kv = qkv.split_with_sizes((2 * q_size, sum(kv_sizes)), -1)
        q, gate = heads.unflatten(-1, (self.num_heads, 2, -1)).unbind(-2)
        out = self.attended(torch.cat((q.flatten(2), kv), -1), context, layer_idx)
        return self.o((out * gate.sigmoid()).flatten(2))
