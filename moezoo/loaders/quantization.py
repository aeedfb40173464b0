"""The `quantization` option: experts that are quantised while a checkpoint loads, and how linear
layers that it has quantised are held."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.errors import AskedQuantizationError, QuantizationError
from moezoo.formats import FP8, INT4, INT8, MXFP4
from moezoo.layers.quant import BlockFp8, ChannelFp8, Format, Int4, Int8, Mxfp4
from moezoo.layers.quant.fp8 import BLOCK
from moezoo.layers.quant.groups import (
    GROUP_SIZES,
    PER_CHANNEL,
    SCALE_DTYPES,
    default_group_size,
)
from moezoo.layers.quant.kind import A_MATRIX, Kind
from moezoo.layers.quant.mxfp4 import GROUP

_FIELDS = {
    FP8: ("granularity", "block_size"),
    INT8: ("group_size", "per_channel"),
    INT4: ("group_size", "per_channel", "block_size", "symmetric"),
    MXFP4: (),
}
_DENSE = ("keep", "dequantize")


class Recipe(NamedTuple):
    """How to quantise matrices of one shape."""

    kind: Kind
    quantize: Callable[[Tensor], Format]
    """Quantises rows [n, K] that share no scales with others; NaN and Inf lead to wrong scales."""
    rows: int | None
    """Number of rows that are quantised together; None is all rows of a matrix."""


@dataclass(frozen=True)
class Quantization:
    """How weights are held. `type` is of the experts, None as the checkpoint stores them; it and
    what may be chosen with it:

    * "fp8_w8a8": `granularity` "block" (the default: a scale for 128 x 128 weights, which is
      `block_size`), "channel" or "tensor".
    * "int8_w8a16": a scale per output channel, or per `group_size` columns.
    * "int4_w4a16": a scale per `group_size` columns, by default the largest of 128, 64 and 32 that
      divides them; or `per_channel`; or `block_size` [n, g], a scale for g columns of n rows.
      `symmetric=False` gives each a zero point; None is True.
    * "mxfp4": nothing.

    Of a checkpoint whose experts are quantised, what is given must be what it has.

    `dense` is what becomes of linear layers that the checkpoint stores quantised (attention, shared
    experts, dense layers, the head): "keep" runs them so, "dequantize" loads them in the model's
    dtype.

    Raises `ValueError` for what there is not, or not together.
    """

    type: str | None = None
    granularity: str | None = None
    block_size: Sequence[int] | None = None
    group_size: int | None = None
    per_channel: bool = False
    symmetric: bool | None = None
    dense: str = "keep"

    def __post_init__(self) -> None:
        if self.dense not in _DENSE:
            known = " or ".join(map(repr, _DENSE))
            raise ValueError(f"dense is {self.dense!r}, expected {known}")
        if self.type is not None and (not isinstance(self.type, str) or self.type not in _FIELDS):
            known = ", ".join(map(repr, _FIELDS))
            raise ValueError(f"quantization type is {self.type!r}, expected one of {known}")
        choices = () if self.type is None else _FIELDS[self.type]
        for field in fields(self)[1:-1]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in choices:
                if self.type is None:
                    raise ValueError(f"{field.name}={value!r} needs a type, such as {INT4!r}")
                raise ValueError(
                    f"{field.name}={value!r} is not for {self.type}, which has "
                    f"{' and '.join(choices) or 'no choices'}"
                )
        for name in ("per_channel", "symmetric"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (name == "per_channel" or value is not None):
                raise ValueError(f"{name} is {value!r}, expected True or False")
        self._check_sizes()
        if self.type == FP8:
            self._check_fp8()
        given = [n for n in ("group_size", "per_channel", "block_size") if getattr(self, n)]
        if self.type != FP8 and len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: give one")

    def _check_sizes(self) -> None:
        block, group = self.block_size, self.group_size
        if group is not None and (type(group) is not int or group not in GROUP_SIZES):
            raise ValueError(
                f"group_size is {group!r}, expected one of {list(GROUP_SIZES)}, or per_channel=True"
            )
        if block is None:
            return
        if (
            not isinstance(block, Sequence)
            or len(block) != 2
            or not all(type(n) is int and n > 0 for n in block)
        ):
            raise ValueError(f"block_size is {block!r}, expected two sizes such as [128, 128]")
        if self.type == INT4 and block[1] not in GROUP_SIZES:
            raise ValueError(
                f"block_size is {list(block)}, expected [n, g] with g one of {list(GROUP_SIZES)}"
            )
        object.__setattr__(self, "block_size", tuple(block))

    def _check_fp8(self) -> None:
        chosen = self.granularity or "block"
        if chosen not in ("block", "channel", "tensor"):
            raise ValueError(
                f"granularity is {self.granularity!r}, expected 'block', 'channel' or 'tensor'"
            )
        if chosen != "block" and self.block_size is not None:
            raise ValueError(f"granularity {chosen!r} and block_size contradict each other")
        if self.block_size not in (None, (BLOCK, BLOCK)):
            raise ValueError(
                f"block_size is {list(self.block_size)}, expected [{BLOCK}, {BLOCK}] for {FP8}"
            )

    @classmethod
    def of(cls, value: object) -> "Quantization | None":
        """Return the `Quantization` of a name, a dict or a `Quantization`; None stays None."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise ValueError(
                f"quantization is {value!r}, expected None, a name such as {FP8!r}, a dict or"
                " a moezoo.Quantization"
            )
        given = dict(value)
        if given.get("type") is None and "dense" not in given:
            raise ValueError(f"quantization {value!r} has no 'type', such as {FP8!r}")
        if "block_shape" in given:
            if "block_size" in given:
                raise ValueError(f"quantization {value!r} has block_shape and block_size: give one")
            given["block_size"] = given.pop("block_shape")
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(
                    f"quantization has an unknown key {key!r}; known are {', '.join(known)}"
                )
        return cls(**given)

    def contradicted(self, kind: Kind, columns: int) -> str | None:
        """Return the field that contradicts this kind of `type`, which a checkpoint has, or
        None."""
        options = dict(kind.options)
        group = options.get("group_size", PER_CHANNEL)
        group = columns if group == PER_CHANNEL else group
        blocks = kind.format is BlockFp8
        granularity = (
            "block" if blocks else "tensor" if kind.scale_layout == A_MATRIX else "channel"
        )
        if self.granularity not in (None, granularity):
            return "granularity"
        if self.block_size is not None and (
            not blocks if self.type == FP8 else self.block_size != (1, group)
        ):
            return "block_size"
        if self.group_size not in (None, group):
            return "group_size"
        if self.per_channel and group != columns:
            return "per_channel"
        if self.symmetric is not None and self.symmetric == options.get("zeros", False):
            return "symmetric"
        return None

    def recipe(self, name: str, columns: int, dtype: torch.dtype) -> Recipe:
        """Return the recipe for matrices of `name` with so many columns and weights of `dtype`.

        Raises `AskedQuantizationError` naming them where the format has no such columns.
        """
        scales = dtype if dtype in SCALE_DTYPES else torch.float32
        if self.type == FP8 and self.granularity in (None, "block"):
            return _recipe(Kind.of(BlockFp8), BLOCK)
        if self.type == FP8:
            if self.granularity == "channel":
                return _recipe(Kind.of(ChannelFp8))
            quantize = partial(ChannelFp8.quantize_unchecked, granularity="tensor")
            kind = replace(Kind.of(ChannelFp8), scale_layout=A_MATRIX)
            return Recipe(kind, quantize, None)
        if self.type == MXFP4:
            self._require(name, columns, GROUP)
            return _recipe(Kind.of(Mxfp4))
        group, zeros = self._group_size(name, columns), self.symmetric is False
        integers = Int8 if self.type == INT8 else Int4
        kind = Kind.integers(integers, group, columns, dtype=scales, zeros=zeros, ordered=False)
        if self.block_size is None:
            return _recipe(kind)
        n = self.block_size[0]
        kind = replace(kind, scale_layout=f"in blocks of {n} x {group}")
        return Recipe(kind, partial(_in_blocks, kind=kind, rows=n, group=group), n)

    def require_rows(self, name: str, rows: int) -> None:
        """Raise `AskedQuantizationError` where blocks of int4 do not divide a matrix's rows."""
        if self.type == INT4 and self.block_size is not None and rows % self.block_size[0]:
            raise AskedQuantizationError(
                f"{name}: blocks of {' x '.join(map(str, self.block_size))} do not divide its "
                f"{rows} rows; give a block_size [n, g] with n a divisor of them"
            )

    def _group_size(self, name: str, columns: int) -> int:
        if self.type == INT4 and columns % 2:
            raise AskedQuantizationError(
                f"{name}: {self.type} has two columns in a byte, and there are {columns}, which is "
                f"odd; {INT8!r} takes any number of them"
            )
        chosen = self.block_size[1] if self.block_size is not None else self.group_size
        if chosen is not None:
            self._require(name, columns, chosen)
            return chosen
        if self.per_channel or self.type == INT8:
            return PER_CHANNEL
        try:
            return default_group_size(columns)
        except QuantizationError:
            raise AskedQuantizationError(
                f"{name}: none of the group sizes {list(GROUP_SIZES)} divides its {columns} "
                f"columns; {{'type': {self.type!r}, 'per_channel': True}} has one scale a row"
            ) from None

    def _require(self, name: str, columns: int, group: int) -> None:
        if columns % group:
            fits = [size for size in GROUP_SIZES if columns % size == 0]
            advice = f"{INT8!r} takes any number of them"
            if self.type == INT8:
                advice = "without group_size there is a scale a row, of any number of them"
            if fits:
                advice = f"groups of {fits[0]} do"
            chosen = self.type
            for field in ("group_size", "block_size"):
                if getattr(self, field) is not None:
                    chosen = f"{field}={getattr(self, field)!r}"
            raise AskedQuantizationError(
                f"{name}: quantization asks for {chosen}, and groups of {group} do not divide its "
                f"{columns} columns; {advice}"
            )


def _recipe(kind: Kind, rows: int = 1) -> Recipe:
    return Recipe(kind, kind.quantize, rows)


def _in_blocks(w: Tensor, *, kind: Kind, rows: int, group: int) -> Int4:
    """Quantise w [N, K] to Int4 with one scale and zero point per block of `rows` rows and `group`
    columns, which divide N and K."""
    options = dict(kind.options)
    tiles = w.to(options["dtype"]).unflatten(0, (-1, rows)).unflatten(-1, (-1, group))
    flat = Int4.quantize_unchecked(
        tiles.transpose(1, 2).flatten(-2), group_size=PER_CHANNEL, zeros=options["zeros"]
    )
    data = flat.data.unflatten(-1, (rows, -1)).transpose(1, 2).reshape(len(w), -1)
    scales, zeros = (
        None if t is None else t.squeeze(-1).repeat_interleave(rows, 0)
        for t in (flat.scales, flat.zeros)
    )
    assert scales is not None
    return Int4(data, scales, zeros)
