"""Inputs of a layer's two products for `tune`, and a call of them for each tile to try."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moezoo.layers.kernels.combine import combine
from moezoo.layers.kernels.down import down
from moezoo.layers.kernels.down_fp8 import down_fp8
from moezoo.layers.kernels.down_weight_only import down_weight_only
from moezoo.layers.kernels.gated_up import gated_up
from moezoo.layers.kernels.gated_up_fp8 import gated_up_fp8
from moezoo.layers.kernels.gated_up_weight_only import gated_up_weight_only
from moezoo.layers.kernels.interleave import padded
from moezoo.layers.kernels.packed_operand import ways
from moezoo.layers.kernels.permute import Permutation, permute
from moezoo.layers.kernels.tiles import Plan, Tile
from moezoo.layers.quant import Format, WeightOnly
from moezoo.layers.quant.fp8 import BlockFp8, Fp8Rows, quantize_rows
from moezoo.tools.layer_weights import Layer, QuantizedWeights, Weights
from moezoo.tools.tune_candidates import SEARCHES, Search

Call = Callable[[], Tensor]
Product = Callable[[Permutation], Tensor]
Candidate = tuple[Tile, list[Call]]
"""A tile and the calls to time for it."""

SETS = 4
"""Number of choices of experts that take turns, so that few rows do not find weights in L2."""


@dataclass(frozen=True)
class Case:
    """Inputs of the two products at one number of tokens.

    x [T, H] and h [S, I] in the form that the products read, see `rows_of_x` and `rows_of_h`;
    topk_weights [T, K]; for each m of a tile, a permutation for each choice of experts.
    """

    x: Tensor | Fp8Rows
    h: Tensor | Fp8Rows
    weights: Weights | QuantizedWeights
    topk_weights: Tensor
    permutations: dict[int, list[Permutation]]

    @classmethod
    def random(
        cls,
        layer: Layer,
        weights: Weights | QuantizedWeights,
        num_tokens: int,
        *,
        generator: torch.Generator,
    ) -> "Case":
        x = rows_of_x(num_tokens, weights.w13, generator)
        h = rows_of_h(num_tokens * layer.k, weights.w2, generator)
        device = generator.device
        choices = [
            torch.rand(num_tokens, layer.num_experts, device=device, generator=generator)
            .topk(layer.k, 1)
            .indices.int()
            for _ in range(SETS)
        ]
        topk_weights = torch.full((num_tokens, layer.k), 1 / layer.k, device=device)
        tiles = SEARCHES[weights.quantization].gated_up(num_tokens * layer.k / layer.num_experts)
        permutations = {
            m: [permute(ids, layer.num_experts, m) for ids in choices]
            for m in sorted({tile.m for tile in tiles})
        }
        return cls(x, h, weights, topk_weights, permutations)

    def gated_up_product(self, tile: Tile) -> Product:
        return gated_up_product(self.x, self.weights.w13, self.topk_weights.shape[1], tile)

    def down_product(self, tile: Tile) -> Product:
        return down_product(self.h, self.weights.w2, tile)

    def gated_up_candidates(self, m: int) -> Iterator[Candidate]:
        """Return calls of the first product with each candidate of `m` rows, for each choice."""
        tiles = self.search.gated_up(self.rows_per_expert)
        return self._candidates(m, tiles, self.weights.w13.shape[-1], self.gated_up_product)

    def down_candidates(self, m: int) -> Iterator[Candidate]:
        """Return calls of the second product with each candidate of `m` rows, for each choice."""
        tiles = self.search.down(self.rows_per_expert)
        return self._candidates(m, tiles, self.weights.w2.shape[-1], self.down_product)

    def _candidates(
        self, m: int, tiles: Iterator[Tile], length: int, product: Callable[[Tile], Product]
    ) -> Iterator[Candidate]:
        for tile in tiles:
            if tile.m == m and tile.k <= length:
                yield tile, [partial(product(tile), rows) for rows in self.permutations[m]]

    def calls(self, plan: Plan) -> list[Call]:
        """Return calls of both products and the sum, one for each choice of experts."""
        first, second = self.gated_up_product(plan.gated_up), self.down_product(plan.down)

        def call(rows: Permutation) -> Tensor:
            first(rows)
            return combine(second(rows), self.topk_weights, rows.positions)

        return [partial(call, rows) for rows in self.permutations[plan.gated_up.m]]

    @property
    def rows_per_expert(self) -> float:
        return self.topk_weights.numel() / self.weights.w2.shape[0]

    @property
    def search(self) -> Search:
        return SEARCHES[self.weights.quantization]


def rows_of_x(num_rows: int, w13: Tensor | Format, generator: torch.Generator) -> Tensor | Fp8Rows:
    """Return random rows in the form that the first product reads.

    They are padded as `interleave` does for weights of 4 and 8 bits, quantised for block fp8,
    otherwise bf16.
    """
    rows = _random_rows(num_rows, w13, generator)
    return quantize_rows(rows) if isinstance(w13, BlockFp8) else rows


def rows_of_h(num_rows: int, w2: Tensor | Format, generator: torch.Generator) -> Tensor | Fp8Rows:
    """Return random rows in the form that the second product reads, with scales by column."""
    rows = _random_rows(num_rows, w2, generator)
    if not isinstance(w2, BlockFp8):
        return rows
    data, scales = quantize_rows(rows)
    return Fp8Rows(data, scales.mT.contiguous().mT)


def _random_rows(num_rows: int, w: Tensor | Format, generator: torch.Generator) -> Tensor:
    width = w.shape[-1]
    if isinstance(w, WeightOnly):
        width = padded(width, ways(type(w), width))
    device = generator.device
    return torch.randn(num_rows, width, device=device, dtype=torch.bfloat16, generator=generator)


def gated_up_product(x: Tensor | Fp8Rows, w13: Tensor | Format, k: int, tile: Tile) -> Product:
    if isinstance(w13, BlockFp8):
        assert isinstance(x, Fp8Rows)
        fitted = tile.fitted(2, 1, w13.device)
        return lambda rows: gated_up_fp8(x, w13, rows, k=k, tile=fitted).data
    assert isinstance(x, Tensor)
    if isinstance(w13, WeightOnly):
        fitted = tile.fitted(2, 2, w13.device, bits=w13.bits)
        return lambda rows: gated_up_weight_only(x, w13, rows, k=k, tile=fitted)
    assert isinstance(w13, Tensor)
    fitted = tile.fitted(2, 2, w13.device)
    return lambda rows: gated_up(x, w13, rows, k=k, tile=fitted)


def down_product(h: Tensor | Fp8Rows, w2: Tensor | Format, tile: Tile) -> Product:
    if isinstance(w2, BlockFp8):
        assert isinstance(h, Fp8Rows)
        fitted = tile.fitted(1, 1, w2.device)
        return lambda rows: down_fp8(h, w2, rows, dtype=torch.bfloat16, tile=fitted)
    assert isinstance(h, Tensor)
    if isinstance(w2, WeightOnly):
        fitted = tile.fitted(1, 2, w2.device, bits=w2.bits)
        return lambda rows: down_weight_only(h, w2, rows, tile=fitted)
    assert isinstance(w2, Tensor)
    fitted = tile.fitted(1, 2, w2.device)
    return lambda rows: down(h, w2, rows, tile=fitted)
