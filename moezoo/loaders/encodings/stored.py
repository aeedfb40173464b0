"""How one quantised weight of a checkpoint is stored, and what the schemes share to describe it.

A weight is a tensor with the data and some that go with it. A scheme says of each what is taken
from the bytes, as functions over tensors; `loaders.fill` calls them as it reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.errors import QuantizationError
from moezoo.layers.quant.groups import PER_CHANNEL
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.mapping import TensorInfo

AGAIN = "get the checkpoint again, or the config.json that belongs to it"
"""Advice for tensors that contradict one another or the config."""


class Check(NamedTuple):
    """Check of a stored tensor: `wrong` masks values that must not be there, `problem` is the
    message with their `place` and `value`."""

    wrong: Callable[[Tensor], Tensor]
    problem: str


def as_it_is(stored: Tensor, *_: object) -> Tensor:
    return stored


@dataclass(frozen=True)
class Extra:
    """A tensor beside the data of a weight: `read` converts one matrix of it to `field` of the
    format; without a field it is only checked.

    Both `read` and `check` get it as `dtype` where that is given, such as E8M0, whose bytes may be
    stored as uint8.
    """

    tensor: str
    field: str | None = None
    read: Callable[[Tensor], Tensor] = as_it_is
    check: Check | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class StoredWeight:
    """A weight [.., N, K] that becomes `kind`. `unpack` converts some rows of the tensor `data`,
    given the order of the columns if there is one, to those rows or columns of the format's data.

    `columns` says that rows of `data` run along K; `unit` of them are unpacked together, all where
    None. The tensor that the plan sees is [.., K, N] where `transposed`. Where up to `padding` of
    the columns may fill the last word, `of_columns` is the weight of fewer.
    """

    shape: tuple[int, ...]
    kind: Kind
    data: str
    unpack: Callable[[Tensor, Tensor | None], Tensor]
    extras: tuple[Extra, ...]
    columns: bool = False
    unit: int | None = 1
    transposed: bool = False
    padding: int = 0
    of_columns: "Callable[[int], StoredWeight] | None" = None

    def unordered(self) -> "StoredWeight":
        """Return the weight without its order, which moves no column."""
        extras = (
            replace(extra, field=None) if extra.field == "order" else extra for extra in self.extras
        )
        return replace(self, kind=self.kind.unordered(), extras=tuple(extras))


@dataclass(frozen=True)
class Encoding:
    """How a checkpoint stores its weights: `tensors` as if none was quantised, the quantised
    `weights`, and the left-out tensors of activation scales."""

    scheme: "Scheme | None"
    tensors: Mapping[str, TensorInfo]
    weights: Mapping[str, StoredWeight]
    left_out: Sequence[str] = ()

    def unpadded(self, columns: Mapping[str, int]) -> "Encoding":
        """Return the encoding with so many columns of these weights, the rest being padding."""
        weights = dict(self.weights)
        for name, k in columns.items():
            stored = weights.get(name)
            if stored is not None and stored.of_columns is not None and k < stored.shape[-1]:
                weights[name] = stored.of_columns(k)
        return replace(self, weights=weights)


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """The relevant part of a hub quantization_config.

    `unknown` are the fields of it that no reader here knows.
    """

    unknown: tuple[str, ...] = ()

    @abstractmethod
    def encoding(self, tensors: Mapping[str, TensorInfo], name: str) -> Encoding:
        """Return how the checkpoint `name` with these tensors stores its weights.

        Raises `QuantizationError` naming the tensor and its file for what contradicts itself or the
        config.
        """

    @abstractmethod
    def kind(self, weight: str, columns: int, dtype: torch.dtype) -> Kind | None:
        """Return the kind that an expert's weight of this name with so many columns is held in,
        None if it is not quantised; `dtype` is the model's.

        Raises `QuantizationError` for columns that there are no such groups of.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the report of a load on what may be computed otherwise than the config says."""
        if not self.unknown:
            return ()
        fields = ", ".join(f"quantization_config.{field}" for field in self.unknown)
        return (f"{fields}: not known to this release, which loads the weights as if not there",)


class Headers:
    """The tensors of a checkpoint while a scheme claims them one by one."""

    def __init__(self, tensors: Mapping[str, TensorInfo], name: str) -> None:
        self.tensors = tensors
        self.name = name
        self.plain = dict(tensors)
        self.weights: dict[str, StoredWeight] = {}
        self.left_out: list[str] = []

    def add(self, weight: str, stored: StoredWeight) -> None:
        """Add the weight in place of the tensors that it is stored in; raises `QuantizationError`
        if it is there a second time, unquantised."""
        info = self.tensors[stored.data]
        if weight != stored.data and weight in self.plain:
            raise self.error(
                f"{stored.data}{info.where} holds {weight}, which is also in the checkpoint as it "
                f"is{self.tensors[weight].where}; {AGAIN}"
            )
        for extra in stored.extras:
            del self.plain[extra.tensor]
        del self.plain[stored.data]
        *lead, n, k = stored.shape
        shape = (*lead, k, n) if stored.transposed else (*lead, n, k)
        # Of a dtype that any parameter takes: what is stored is not looked at any more.
        self.plain[weight] = replace(
            info, shape=shape, dtype=torch.bfloat16, padding=stored.padding, data=stored.data
        )
        self.weights[weight] = stored

    def leave_out(self, tensor: str) -> None:
        """Leave out a scale of activations, if the checkpoint has it."""
        if tensor in self.plain:
            del self.plain[tensor]
            self.left_out.append(tensor)

    def drop(self, tensor: str) -> None:
        """Drop a tensor that tells nothing new."""
        del self.plain[tensor]

    def matrix(self, data: str, dtype: torch.dtype) -> tuple[int, int]:
        """Return the shape of data that are a matrix of this dtype; raises `QuantizationError` if
        they are not."""
        info = self.tensors[data]
        if len(info.shape) != 2 or info.dtype != dtype:
            raise self.unexpected(data, f"a matrix of {str(dtype).removeprefix('torch.')}")
        rows, columns = info.shape
        return rows, columns

    def unexpected(self, tensor: str, expected: str) -> QuantizationError:
        info = self.tensors[tensor]
        return self.error(
            f"{tensor} is {list(info.shape)} {dtype_of(info)}{info.where}, expected {expected}; "
            f"{AGAIN}"
        )

    def indivisible(self, tensor: str, group_size: int, columns: int) -> QuantizationError:
        info = self.tensors[tensor]
        return self.error(
            f"{tensor} {list(info.shape)}{info.where} has {_indivisible(group_size, columns)}; "
            "take another checkpoint of the model"
        )

    def not_full(
        self, data: str, scales: str, axis: int, group_size: int, columns: int
    ) -> QuantizationError:
        """Return the error for columns that groups do not divide, where the scales, whose groups
        are on this axis, tell of other columns."""
        info, found = self.tensors[data], self.tensors.get(scales)
        if found is None or len(found.shape) != 2:
            return self.indivisible(data, group_size, columns)
        groups = found.shape[axis]
        return self.error(
            f"{data} is {list(info.shape)}{info.where}, which is {columns} columns, but {scales} "
            f"{list(found.shape)}{found.where} has the scales of {groups} groups of {group_size}, "
            f"which are {groups * group_size}: one of them is cut off, or the last group is "
            f"smaller than the others, which this release does not load; {AGAIN}"
        )

    def beside(
        self,
        tensor: str,
        weight: str,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[torch.dtype],
    ) -> TensorInfo:
        """Return the tensor that goes with `weight`, of one of these shapes and dtypes.

        Raises `QuantizationError` if it is not there or is another.
        """
        info = self.tensors[weight]
        if tensor not in self.tensors:
            raise self.error(
                f"{weight} is {dtype_of(info)}{info.where} and there is no {tensor}; {AGAIN}"
            )
        found = self.tensors[tensor]
        if found.shape not in [tuple(shape) for shape in shapes]:
            wanted = " or ".join(str(list(shape)) for shape in shapes) or "none"
            raise self.error(
                f"{tensor} is {list(found.shape)}{found.where}, {weight} {list(info.shape)} takes "
                f"{wanted} with the bits and groups of the quantization_config; {AGAIN}"
            )
        if found.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.error(
                f"{tensor} is {dtype_of(found)}{found.where}, expected {wanted}; {AGAIN}"
            )
        return found

    def refuse_alone(self, end: str, weight_end: str, expected: str) -> None:
        """Raise `QuantizationError` for tensors with this suffix that no weight has claimed."""
        alone = next((tensor for tensor in self.plain if tensor.endswith(end)), None)
        if alone is not None:
            weight = alone.removesuffix(end) + weight_end
            there = weight in self.tensors
            what = f"is {dtype_of(self.tensors[weight])}" if there else "is not there"
            raise self.error(
                f"{alone}{self.tensors[alone].where} holds scales of {weight}, which {what}, "
                f"expected {expected}; {AGAIN}"
            )

    def refuse_kept(self, tensor: str, entry: str | None) -> None:
        """Raise `QuantizationError` for a quantised tensor that the config declares unquantised."""
        if entry is not None:
            info = self.tensors[tensor]
            raise self.error(
                f"{tensor} is {dtype_of(info)}{info.where}, but the quantization_config says that "
                f"{entry} is not quantised; get the config.json that belongs to these weights"
            )

    def error(self, message: str) -> QuantizationError:
        return QuantizationError(f"{self.name}: {message}")

    def encoding(self, scheme: Scheme) -> Encoding:
        return Encoding(scheme, self.plain, self.weights, self.left_out)


def divided(kind: Kind | None, weight: str, group_size: int, columns: int) -> Kind:
    """Return the kind that `integer_kind` found for a weight; raises `QuantizationError` where it
    is None."""
    if kind is None:
        raise QuantizationError(
            f"{weight} has {_indivisible(group_size, columns)}; change "
            f"{'bits' if _a_row(group_size, columns) else 'group_size'} in the quantization_config"
        )
    return kind


def _a_row(group_size: int, columns: int) -> bool:
    """Return whether a group is all columns of a row, which fails only for an odd number of columns
    in int4."""
    return group_size in (PER_CHANNEL, columns)


def _indivisible(group_size: int, columns: int) -> str:
    if _a_row(group_size, columns):
        return (
            f"{columns} columns, which is odd, and a scale a row; int4 has two columns in a byte, "
            "int8 takes any number of them"
        )
    return (
        f"{columns} columns, which cannot be held in groups of {group_size}; groups of 32, 64, 128 "
        "and multiples of them can be, if they divide them, and a scale a row, of an even number "
        "where two share a byte"
    )


def dtype_of(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def not_a_scale(scales: Tensor) -> Tensor:
    """Mask values that integers cannot be multiplied by. Negative scales are valid, as AutoRound
    writes them: of an even number of codes there is one more below zero, which it turns to where
    weights are largest."""
    return ~(scales.isfinite() & (scales != 0))


def not_positive(scales: Tensor) -> Tensor:
    scales = scales.float()
    return ~(scales.isfinite() & (scales > 0))


BLOCK_SCALE = Check(
    not_positive, "the scale of block {place} is {value}; it must be finite and positive"
)
FLOAT_SCALE = Check(not_positive, "the scale at {place} is {value}; it must be finite and positive")
INTEGER_SCALE = Check(
    not_a_scale, "the scale at {place} is {value}; it must be finite and not zero"
)
