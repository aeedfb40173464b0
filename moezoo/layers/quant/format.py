"""The base class of the formats that weights are stored in, and what they share.

Legend: N rows, K columns, G groups of columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moezoo.errors import QuantizationError

TINY = 1e-30
"""Least magnitude that scales are made for, so that a group of zeros has one too; fp16 scales have
its least number instead."""

_CHUNK = {"cpu": 2**18, "cuda": 2**24}
"""Values converted at a time by device: as many as caches hold, or as fill a GPU."""


@dataclass(frozen=True, eq=False)
class Format:
    """A weight [.., N, K] stored as `data`, `scales` and whatever else its format has. All tensors
    share the dimensions before N, which number matrices of their own: the experts of w13, its gate
    and up.

    `quantize` and `dequantize` are each format's definition. A constructor raises QuantizationError
    for shapes, dtypes or devices that do not belong together; it does not look at values. Two are
    equal if they are one, as tensors cannot say whether they are.
    """

    name: ClassVar[str]
    """Name of the format in options and tables."""

    unit: ClassVar[str]
    """What one scale belongs to, in error messages: a block, a row or a group."""

    scale_layout: ClassVar[str] = "with a scale a row"
    """How scales are laid out, for reports, unless options of the format say otherwise."""

    quantizes_activations: ClassVar[bool] = False
    """Whether activations are quantised to fp8 before they are multiplied by such weights."""

    rows_per_scale: ClassVar[int] = 1
    """Rows of data that share one row of scales."""

    columns_per_element: ClassVar[int] = 1
    """Columns of the weight that one element of data holds."""

    data: Tensor
    scales: Tensor

    @classmethod
    def quantize(cls, w: Tensor, **options: Any) -> Self:
        """Return w [.., N, K], of any floating dtype, in this format; options are those of
        `quantize_unchecked`.

        Raises QuantizationError where w holds NaN or Inf.
        """
        quantized = cls.quantize_unchecked(w, **options)
        try:
            quantized.check_values()
        except QuantizationError:
            wrong = (~w.isfinite()).nonzero()
            if not len(wrong):
                raise
            place = wrong[0].tolist()
            raise QuantizationError(
                f"the weight at {place} is {w[tuple(place)].item()}, which {cls.name} cannot hold; "
                "quantise finite weights"
            ) from None
        return quantized

    @classmethod
    def quantize_unchecked(cls, w: Tensor, *args: Any, **options: Any) -> Self:
        """Quantise as `quantize` does, but do not check the values: NaN and Inf in w are left to
        `check_values`."""
        raise NotImplementedError

    @classmethod
    def on_meta(cls, *shape: Any, **options: Any) -> Self:
        """Return weights of this shape [.., N, K] on the meta device, without memory or values."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [.., N, K]."""
        raise NotImplementedError

    def check_values(self, name: str = "weights") -> None:
        """Raises QuantizationError for a scale that is NaN, Inf, zero or negative, which finite
        weights do not lead to. (AutoRound writes negative ones, which loading takes.)

        It looks at the values, so on a GPU it waits for them.
        """
        wrong = self.wrong_scales(self.scales)
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            raise QuantizationError(
                f"{name}: the scale of {self.unit} {place} is {self.scales[tuple(place)].item()}, "
                "it must be finite and positive; quantise finite weights"
            )

    @staticmethod
    def wrong_scales(scales: Tensor) -> Tensor:
        """Return a mask of the scales that are NaN, Inf, zero or negative."""
        return ~((scales > 0) & scales.isfinite())

    @property
    def zeros(self) -> Tensor | None:
        """Zero points of the groups, None in formats without them."""
        return None

    @property
    def order(self) -> Tensor | None:
        """Order of the columns, see `Integers`; None where they are not reordered."""
        return None

    def tensors(self) -> dict[str, Tensor | None]:
        """Return the tensors by field name, None for those that are left out."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Return the format with fn applied to each tensor."""
        tensors: dict[str, Any] = {
            name: None if tensor is None else fn(tensor) for name, tensor in self.tensors().items()
        }
        return type(self)(**tensors)

    def __getitem__(self, index: int) -> Self:
        return self.map(lambda tensor: tensor[index])

    def rows(self, start: int, stop: int) -> Self:
        """Return rows start to stop of a matrix [N, K]. Where several rows share a scale, start is
        the first of such a block."""
        return self.map(lambda tensor: tensor[start:stop])

    def in_parts(self, parts: int) -> Self:
        """Return weights [.., parts * N, K] as [.., parts, N, K]."""
        dim = len(self.shape) - 2
        return self.map(lambda tensor: tensor.unflatten(dim, (parts, -1)))

    @property
    def shape(self) -> torch.Size:
        """Shape [.., N, K] of the weights."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def _require(
        self, field: str, shape: tuple[int, ...] | list[int], *dtypes: torch.dtype
    ) -> None:
        """Raises QuantizationError unless this tensor goes with `data`."""
        tensor, data = getattr(self, field), self.data
        if (
            list(tensor.shape) != list(shape)
            or tensor.dtype not in dtypes
            or tensor.device != data.device
        ):
            raise QuantizationError(
                f"{field} of data {list(data.shape)} must be {list(shape)} "
                f"{' or '.join(map(str, dtypes))} on {data.device}, got {list(tensor.shape)} "
                f"{tensor.dtype} on {tensor.device}"
            )


def require_data(data: Tensor, shape: str, dtype: torch.dtype) -> None:
    """Raises QuantizationError unless data are matrices of this dtype."""
    if data.dtype != dtype or data.ndim < 2:
        raise QuantizationError(
            f"data must be {shape} {str(dtype).removeprefix('torch.')}, "
            f"got {list(data.shape)} {data.dtype}"
        )


def require_weights(w: Tensor) -> None:
    """Raises QuantizationError unless w [.., N, K] can be quantised."""
    if not w.is_floating_point() or w.ndim < 2 or 0 in w.shape[-2:]:
        raise QuantizationError(
            "weights must be [.., N, K] floating point with N and K above 0, got "
            f"{list(w.shape)} {w.dtype}"
        )


def magnitudes(w: Tensor, dims: int | tuple[int, ...] = -1) -> Tensor:
    """Return the largest magnitude over `dims`, which stay with size 1, without a copy of w."""
    return torch.maximum(w.amax(dims, keepdim=True), -w.amin(dims, keepdim=True))


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales in the dtype that stores them, none of them rounded to zero."""
    return scales.clamp(min=2**-24 if dtype == torch.float16 else TINY).to(dtype)


def by_rows(fn: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Apply fn to all rows, some at a time, so that its temporary memory is bounded.

    tensors [.., N, *] of the same first dimensions; fn takes [rows, *] of each and returns tensors
    [rows, *]. The result is those as [.., N, *].
    """
    first = tensors[0]
    *leading, n, k = first.shape
    matrices = [t.reshape(-1, *t.shape[-2:]) for t in tensors]
    outputs: tuple[Tensor, ...] = ()
    done = 0
    for some, rows in rows_at_a_time(matrices[0]):
        results = fn(*(m[some, rows].flatten(0, 1) for m in matrices))
        if not outputs:
            total = first.numel() // k
            outputs = tuple(r.new_empty(total, *r.shape[1:]) for r in results)
        for output, result in zip(outputs, results, strict=True):
            output[done : done + len(result)] = result
        done += len(results[0])
    return tuple(output.view(*leading, n, *output.shape[1:]) for output in outputs)


def rows_at_a_time(matrices: Tensor, multiple: int = 1) -> Iterator[tuple[slice, slice]]:
    """Yield which of the matrices [M, N, K], and which of their rows, are converted at a time:
    `multiple` rows or several times as many, in the order of the rows."""
    count, n, k = matrices.shape
    fit = _CHUNK.get(matrices.device.type, 2**18) // k
    rows = max(1, fit // multiple) * multiple
    some = max(1, rows // n)
    for first in range(0, max(1, count), some):
        for start in range(0, n, rows):
            yield slice(first, first + some), slice(start, start + rows)
