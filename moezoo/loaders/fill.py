"""Fill the tensors of a model from a checkpoint's files: the pieces that are read, and what is done
with each, quantised weights among them.

Scales, zero points and orders are read first, as the data need them; what is wrong in them ends the
load before the data are read. Weights are quantised and unpacked some rows at a time, on the device
where they belong, so that no more of them is there in another form.

Legend: N rows, K columns, G groups, R rows of a stored tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.errors import QuantizationError
from moezoo.layers.quant import Integers
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.checkpoint import Checkpoint, Location
from moezoo.loaders.encodings import Encoding, Extra, StoredWeight
from moezoo.loaders.encodings.stored import AGAIN
from moezoo.loaders.experts import has_gate_and_up, parts_index
from moezoo.loaders.mapping import Copy, Index, View, stored_order
from moezoo.loaders.quantization import Recipe
from moezoo.loaders.stream import Piece, PutRows, cut, cut_rows, read, stream

Fields = Mapping[str, Tensor]
"""Tensors of a format at one place, by field name."""


class _Check(NamedTuple):
    """Check of one matrix of an extra tensor; `wrong` is known when the GPU has come to it."""

    extra: Extra
    piece: Piece
    lead: list[int]
    wrong: Tensor


class Squares:
    """Sums of the squares of quantisation errors and of weights, which the reading threads add
    to."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._lock = Lock()

    def add(self, errors: Tensor, weights: Tensor) -> None:
        squares = torch.stack((errors.square().sum(), weights.square().sum()))
        with self._lock:
            self.sums += squares


class Filling:
    """The pieces of one load; `run` reads them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        encoding: Encoding,
        locations: Mapping[str, Location],
        device: torch.device,
    ) -> None:
        self.checkpoint = checkpoint
        self.encoding = encoding
        self.locations = locations
        self.device = device
        self.extra_pieces: list[Piece] = []
        self.data_pieces: list[Piece] = []
        self.checks: list[_Check] = []
        self.computed: list[tuple[str, Recipe, Tensor]] = []
        self.squares: Squares | None = None
        """Sums of squares of all quantised weights and their errors, if the caller wants them."""

    def copy(self, copy: Copy, target: Tensor) -> None:
        """Plan to copy a tensor that is not quantised and stays so."""
        place, dtype = self._place(copy.source, copy), self.checkpoint.tensors[copy.source].dtype
        ordered = stored_order(target[copy.target_index], copy.view)
        self.data_pieces.extend(cut(copy.source, place, dtype, ordered))

    def quantize(self, copy: Copy, weights: Fields, recipe: Recipe) -> None:
        """Plan to quantise a tensor into `weights`, the tensors of a format for all experts."""
        info = self.checkpoint.tensors[copy.source]
        index = parts_index(copy.target_index, weights["data"].shape)
        fields = {name: tensor[index] for name, tensor in weights.items()}
        *lead, n, packed = fields["data"].shape
        k = packed * recipe.kind.format.columns_per_element
        place, dtype = self._place(copy.source, copy), info.dtype
        both = has_gate_and_up(copy.target_index, weights["data"].shape)
        # A view moves elements within an expert, so that one is read as a whole.
        within = 1 if both and copy.view else 0
        matrix = (*lead[len(lead) - within :], n, k)
        for i, which in enumerate(product(*map(range, lead[: len(lead) - within]))):
            one = {name: tensor[which] for name, tensor in fields.items()}
            self.computed.append((copy.source, recipe, one["scales"]))
            start = place.offset + i * prod(matrix) * dtype.itemsize
            put = _Quantize(recipe, one, self.squares)
            there = Location(place.path, start)
            if copy.view:
                whole = partial(put.viewed, matrix, copy.view)
                self._cut(copy.source, there, dtype, (1, prod(matrix)), 1, whole)
            else:
                self._cut(copy.source, there, dtype, matrix, recipe.rows, put)

    def unpack(self, copy: Copy, weights: Fields) -> None:
        """Plan to unpack a quantised weight into `weights`, the tensors of its format for all
        experts or for a layer."""
        stored = self.encoding.weights[copy.source]
        both = has_gate_and_up(copy.target_index, weights["data"].shape)
        interleaved = "deinterleave" in copy.view
        fields = _part(weights, copy.target_index, stored.kind)
        for which, lead in self._matrices(copy, stored):
            one = {name: tensor[which] for name, tensor in fields.items()}
            if both:
                one |= {
                    name: _rows(tensor, interleaved)
                    for name, tensor in one.items()
                    if name != "order"
                }
            self._extras(stored, lead, one)
            put = _Unpack(stored, one, 2 if interleaved else 1)
            self._data(stored, lead, put, put.pairs)

    def dequantize(self, copy: Copy, target: Tensor) -> None:
        """Plan to dequantise a quantised weight into `target`."""
        stored = self.encoding.weights[copy.source]
        view = [step for step in copy.view if not (step == "transpose" and stored.transposed)]
        if "unflatten" in view:
            raise QuantizationError(
                f"{self.checkpoint.name}: {stored.data}"
                f"{self.checkpoint.tensors[stored.data].where} holds experts one below another, "
                "which this release does not unpack"
            )
        part = target[copy.target_index]
        if stored.transposed and "transpose" not in copy.view:
            part = part.mT
        shape = stored.shape[-2:]
        for which, lead in self._matrices(copy, stored):
            blank = stored.kind.on_meta(*shape).tensors()
            fields = {
                name: torch.empty_like(tensor, device=self.device)
                for name, tensor in blank.items()
                if tensor is not None and name != "data"
            }
            self._extras(stored, lead, fields)
            dense = stored_order(part[which], tuple(view))
            put = _Dequantize(stored, fields, dense)
            self._data(stored, lead, put, put.pairs)

    def run(self, *, progress: bool) -> None:
        if self.extra_pieces:
            stream(self.extra_pieces, self.device, progress=False)
            self._check_extras()
        stream(self.data_pieces, self.device, progress=progress)
        self._check_computed()

    def _place(self, tensor: str, copy: Copy) -> Location:
        stored = self.checkpoint.tensors[tensor]
        path, offset = self.locations[tensor]
        if copy.rows is not None:
            offset += copy.rows.start * prod(stored.shape[1:]) * stored.dtype.itemsize
        return Location(path, offset)

    def _matrices(
        self, copy: Copy, stored: StoredWeight
    ) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """Yield, for each matrix that is copied, its index in the target's part and in the stored
        tensor."""
        lead = stored.shape[:-2]
        if not lead:
            yield (), []
            return
        first = 0 if copy.rows is None else copy.rows.start
        count = lead[0] if copy.rows is None else copy.rows.stop - first
        for i in range(count):
            for rest in product(*map(range, lead[1:])):
                yield (i, *rest), [first + i, *rest]

    def _matrix(self, tensor: str, lead: Sequence[int]) -> tuple[Location, tuple[int, ...]]:
        """Return the location of one matrix of a stack, and its shape."""
        info = self.checkpoint.tensors[tensor]
        path, offset = self.locations[tensor]
        shape = info.shape[len(lead) :]
        index = 0
        for i, size in zip(lead, info.shape, strict=False):
            index = index * size + i
        return Location(path, offset + index * prod(shape) * info.dtype.itemsize), shape

    def _data(self, stored: StoredWeight, lead: Sequence[int], put: PutRows, pairs: int) -> None:
        place, shape = self._matrix(stored.data, lead)
        unit = None if stored.unit is None else stored.unit * pairs
        dtype = self.checkpoint.tensors[stored.data].dtype
        self._cut(stored.data, place, dtype, shape, unit, put)

    def _cut(
        self,
        source: str,
        place: Location,
        dtype: torch.dtype,
        shape: Sequence[int],
        unit: int | None,
        put: PutRows,
    ) -> None:
        self.data_pieces.extend(
            cut_rows(source, place, dtype, shape, unit=unit, device=self.device, put=put)
        )

    def _extras(self, stored: StoredWeight, lead: list[int], fields: Fields) -> None:
        for extra in stored.extras:
            place, shape = self._matrix(extra.tensor, lead)
            dtype = extra.dtype or self.checkpoint.tensors[extra.tensor].dtype
            piece = Piece(extra.tensor, *place, dtype, shape)
            target = None if extra.field is None else fields[extra.field]
            put = partial(self._put_extra, extra, piece, lead, target)
            self.extra_pieces.append(piece._replace(put=put))

    def _put_extra(
        self, extra: Extra, piece: Piece, lead: list[int], target: Tensor | None, stored: Tensor
    ) -> None:
        if extra.check is not None:
            self.checks.append(_Check(extra, piece, lead, extra.check.wrong(stored).any()))
        if target is not None:
            value = extra.read(stored)
            if extra.field == "order":
                target.copy_(value)
            else:
                _assign(target, slice(None), value)

    def _check_extras(self) -> None:
        """Raise `QuantizationError` for the first extra tensor that holds a wrong value."""
        if not self.checks or not torch.stack([check.wrong for check in self.checks]).any():
            return
        extra, piece, lead, _ = next(check for check in self.checks if check.wrong)
        assert extra.check is not None
        stored = read(piece)
        index = extra.check.wrong(stored).nonzero()[0].tolist()
        value = stored[tuple(index)]
        found = value.float().item() if value.is_floating_point() else value.item()
        problem = extra.check.problem.format(place=lead + index, value=found)
        where = self.checkpoint.tensors[extra.tensor].where
        raise QuantizationError(
            f"{self.checkpoint.name}: {extra.tensor}{where}: {problem}; {AGAIN}"
        )

    def _check_computed(self) -> None:
        """Raise `QuantizationError` for the first weight whose scales say that it holds NaN or Inf,
        or numbers too large."""
        # One wait for the GPU a thousand tensors; which of them is wrong matters only if one is.
        for start in range(0, len(self.computed), 1000):
            some = self.computed[start : start + 1000]
            format_ = some[0][1].kind.format
            together = torch.cat([scales.flatten() for *_, scales in some])
            if not format_.wrong_scales(together).any():
                continue
            for source, recipe, scales in some:
                wrong = recipe.kind.format.wrong_scales(scales)
                if wrong.any():
                    index = wrong.nonzero()[0].tolist()
                    raise QuantizationError(
                        f"{self.checkpoint.name}: {source}"
                        f"{self.checkpoint.tensors[source].where}: the weights of "
                        f"{_owner(recipe, scales, index)} are NaN or Inf, or too large for "
                        f"{recipe.kind.format.name}: their scale is {scales[tuple(index)].item()}; "
                        "get the checkpoint again"
                    )


def _owner(recipe: Recipe, scales: Tensor, index: list[int]) -> str:
    """Name what the scale at this index of a tensor belongs to."""
    if recipe.rows is None:
        return "the matrix"
    groups = issubclass(recipe.kind.format, Integers) and scales.shape[-1] == 1
    return f"row {index[:-1]}" if groups else f"{recipe.kind.format.unit} {index}"


def _part(weights: Fields, index: Index, kind: Kind) -> Fields:
    """Return the tensors of a format for parameter[index]: some rows of a matrix, or experts and
    parts."""
    if weights["data"].ndim > 2:
        places = parts_index(index, weights["data"].shape)
        return {name: tensor[places] for name, tensor in weights.items()}
    if not index:
        return weights
    (rows,) = index
    assert isinstance(rows, slice)
    part = kind.format(**weights).rows(rows.start, rows.stop)
    return {name: tensor for name, tensor in part.tensors().items() if tensor is not None}


def _rows(tensor: Tensor, interleaved: bool) -> Tensor:
    """Return a tensor [2, I, ..] as rows in their stored order: [2I, ..], or [I, 2, ..] where they
    alternate."""
    return tensor.transpose(0, 1) if interleaved else tensor.flatten(0, 1)


def _assign(target: Tensor, rows: slice, value: Tensor) -> None:
    """Copy value [n, ..], or one row for all, into these rows of target, which may be in pairs."""
    part = target[rows]
    if value.ndim == part.ndim:
        part.copy_(value)
    else:
        count = part.shape[0] * part.shape[1]
        part.copy_(value.expand(count, *value.shape[1:]).reshape(part.shape))


@dataclass(frozen=True)
class _Quantize:
    recipe: Recipe
    fields: Fields
    squares: Squares | None

    def __call__(self, rows: slice, stored: Tensor) -> None:
        self._put(self.fields, rows, stored)

    def _put(self, fields: Fields, rows: slice, w: Tensor) -> None:
        per = self.recipe.kind.format.rows_per_scale
        quantized = self.recipe.quantize(w)
        if self.squares is not None:
            wide = w.float()
            self.squares.add(quantized.dequantize() - wide, wide)
        for name, tensor in quantized.tensors().items():
            if tensor is not None:
                start = rows.start if name == "data" else rows.start // per
                fields[name][start : start + tensor.shape[0]].copy_(tensor)

    def viewed(self, shape: Sequence[int], view: Sequence[View], _: slice, stored: Tensor) -> None:
        """Quantise a whole expert [N, K] or [2, I, K] that is stored in another order."""
        w = stored.new_empty(prod(shape[:-1]), shape[-1])
        ordered = stored_order(w, view)
        ordered.copy_(stored.view(ordered.shape))
        if len(shape) == 2:
            self._put(self.fields, slice(0, len(w)), w)
            return
        for part, rows in enumerate(w.view(*shape)):
            one = {name: tensor[part] for name, tensor in self.fields.items()}
            self._put(one, slice(0, len(rows)), rows)


@dataclass(frozen=True)
class _Unpack:
    stored: StoredWeight
    fields: Fields
    pairs: int

    def __call__(self, rows: slice, stored: Tensor) -> None:
        order = self.fields.get("order")
        if order is not None and order.ndim > 1:
            order = order[0]  # gate and up in one matrix have one
        data, target = self.stored.unpack(stored, order), self.fields["data"]
        if self.stored.columns:
            start = rows.start * (data.shape[1] // (rows.stop - rows.start))
            target[:, start : start + data.shape[1]].copy_(data)
        else:
            _assign(target, slice(rows.start // self.pairs, rows.stop // self.pairs), data)


@dataclass(frozen=True)
class _Dequantize:
    stored: StoredWeight
    fields: Fields
    dense: Tensor

    @property
    def pairs(self) -> int:
        return 1 if self.dense.ndim == 2 else 2

    def __call__(self, rows: slice, stored: Tensor) -> None:
        kind, fields = self.stored.kind, dict(self.fields)
        k = self.stored.shape[-1]
        order = fields.pop("order", None)
        data = self.stored.unpack(stored, order)
        columns = data.shape[1] * kind.format.columns_per_element
        first = rows.start * (columns // (rows.stop - rows.start)) if self.stored.columns else 0
        parts = {}
        for name, tensor in fields.items():
            if not self.stored.columns:
                per = kind.format.rows_per_scale
                parts[name] = tensor[rows.start // per : -(-rows.stop // per)]
            else:
                groups = tensor.shape[1]
                parts[name] = tensor[:, first * groups // k : (first + columns) * groups // k]
        if order is not None:
            parts["order"] = order
        w = kind.format(data=data, **parts).dequantize()
        if self.stored.columns:
            self.dense[:, first : first + columns].copy_(w)
        else:
            _assign(self.dense, slice(rows.start // self.pairs, rows.stop // self.pairs), w)
