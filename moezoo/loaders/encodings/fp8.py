"""quant_method "fp8": `X` in float8_e4m3fn beside its scales, of blocks of 128 x 128 or a matrix.

    `X_scale_inv`   fp32 or E8M0, [.., ceil(N / 128), ceil(K / 128)], or one number; `X_scale` too
    `M.input_scale` or `M.activation_scale`, of static activations: left out, they are dynamic here

X is multiplied by its scales whatever their name says. DeepSeek-V3's and Qwen3's checkpoints are in
blocks; transformers also writes stacked experts so, in the same names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from moezoo.layers.quant import BlockFp8, ChannelFp8
from moezoo.layers.quant.fp8 import BLOCK, scales_shape
from moezoo.layers.quant.kind import A_MATRIX, Kind
from moezoo.loaders.encodings.stored import (
    BLOCK_SCALE,
    FLOAT_SCALE,
    Encoding,
    Extra,
    Headers,
    Scheme,
    StoredWeight,
    as_it_is,
)
from moezoo.loaders.encodings.tables import Table, entry_above
from moezoo.loaders.mapping import TensorInfo

SCALES = "_scale_inv"
"""Suffix of a weight's name in the name of its scales."""

_DTYPES = (torch.float32, torch.float8_e8m0fnu, torch.bfloat16, torch.float16, torch.uint8)
_ACTIVATIONS = ("activation_scale", "input_scale")


@dataclass(frozen=True)
class HubFp8(Scheme):
    blocks: bool
    """Whether a scale belongs to a block of 128 x 128, rather than to a matrix or a row."""
    not_converted: frozenset[str] = frozenset()
    """Modules that are not quantised, with everything below them."""
    static: bool = False
    """Whether the config promises scales of activations that the checkpoint lacks."""

    @classmethod
    def of(cls, table: Table) -> "HubFp8":
        scheme = table.one_of("activation_scheme", "dynamic", "static", default="dynamic")
        table.one_of("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
        table.one_of("scale_fmt", "float", "ue8m0", default="float")
        table.one_of("expert_dtype", "fp8", default="fp8")
        table.one_of("dequantize", False, default=False)
        table.nothing("kv_cache_scheme")
        size = table.get("weight_block_size")
        if size is not None and size not in ([BLOCK, BLOCK], (BLOCK, BLOCK)):
            table.refuse("weight_block_size", f"[{BLOCK}, {BLOCK}] or none, a scale a matrix")
        skipped = [*table.names("modules_to_not_convert"), *table.names("ignored_layers")]
        table.refuse_unknown("modules_to_convert")  # more of them, such as embeddings
        return cls(size is not None, frozenset(skipped), static=scheme == "static")

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.static:
            return super().notes
        return (
            *super().notes,
            "quantization_config.activation_scheme is 'static', but the checkpoint has no scales "
            "of activations: they are quantised as they come, as they are where it has some",
        )

    def kind(self, weight: str, columns: int, dtype: torch.dtype) -> Kind | None:
        if entry_above(weight, self.not_converted) is not None:
            return None
        return Kind.of(BlockFp8 if self.blocks else ChannelFp8)

    def encoding(self, tensors: Mapping[str, TensorInfo], name: str) -> Encoding:
        headers = Headers(tensors, name)
        for weight, info in tensors.items():
            if info.dtype != torch.float8_e4m3fn:
                continue
            headers.refuse_kept(weight, entry_above(weight, self.not_converted))
            scales = weight + SCALES
            if not self.blocks and scales not in tensors:
                scales = f"{weight}_scale"
            headers.add(weight, fp8_weight(headers, weight, scales, blocks=self.blocks))
            module = weight.removesuffix("weight")
            for end in _ACTIVATIONS:
                headers.leave_out(module + end if module != weight else f"{weight}_{end}")
        for end in (SCALES, "weight_scale"):
            headers.refuse_alone(end, "weight" if end[0] == "w" else "", "float8_e4m3fn")
        return headers.encoding(replace(self, static=self.static and not headers.left_out))


def fp8_weight(headers: Headers, weight: str, scales: str, *, blocks: bool) -> StoredWeight:
    """A weight in float8_e4m3fn, with scales for blocks, or for each row or matrix."""
    info = headers.tensors[weight]
    *lead, n, _ = info.shape if len(info.shape) > 1 else (0, 0)
    if len(info.shape) < 2:
        shapes: list[Sequence[int]] = []
    elif blocks:
        shapes = [scales_shape(info.shape)]
    else:
        shapes = [(*lead, 1), (*lead, 1, 1), tuple(lead), (*lead, n), (*lead, n, 1)]
    found = headers.beside(scales, weight, shapes, _DTYPES)
    dtype = torch.float8_e8m0fnu if found.dtype == torch.uint8 else None
    if blocks:
        extra = Extra(scales, "scales", as_it_is, BLOCK_SCALE, dtype)
    else:  # one number or one a row
        extra = Extra(scales, "scales", torch.flatten, FLOAT_SCALE, dtype)
    kind = Kind.of(BlockFp8 if blocks else ChannelFp8)
    if not blocks and prod(found.shape) == prod(lead):
        kind = replace(kind, scale_layout=A_MATRIX)
    return StoredWeight(info.shape, kind, weight, as_it_is, (extra,), unit=BLOCK if blocks else 1)
