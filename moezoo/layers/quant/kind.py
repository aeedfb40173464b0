"""A format with the options that decide the shapes and dtypes of its tensors."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from moezoo.layers.quant.format import Format
from moezoo.layers.quant.groups import PER_CHANNEL
from moezoo.layers.quant.integers import Integers

A_MATRIX = "with a scale a matrix"
"""The `scale_layout` of a kind whose rows have one scale, repeated for each of them."""


@dataclass(frozen=True)
class Kind:
    """A format and the options of its `on_meta`; weights of one kind can be stacked.

    `group_size` and `scale_layout` say what the tensors do not show, to reports, to configs and to
    requests that a checkpoint must meet. Kinds are compared without them.
    """

    format: type[Format]
    options: tuple[tuple[str, Any], ...] = ()
    group_size: int | None = field(default=None, compare=False)
    """Columns per group, None for a scale per row: tensors alone cannot tell that from a group as
    wide as a row."""

    scale_layout: str | None = field(default=None, compare=False)
    """How scales are laid out where the tensors do not show it: several rows share one."""

    @classmethod
    def of(cls, format: type[Format], **options: Any) -> "Kind":
        return cls(format, tuple(sorted(options.items())))

    @classmethod
    def integers(
        cls, format: type[Format], group_size: int, columns: int, **options: Any
    ) -> "Kind":
        """Return the kind for rows of `columns`; its `on_meta` makes one group of a group as wide.

        A group_size of -1 is a scale per row.
        """
        size = PER_CHANNEL if group_size == columns else group_size
        named = None if group_size == PER_CHANNEL else group_size
        return replace(cls.of(format, group_size=size, **options), group_size=named)

    @classmethod
    def of_weights(cls, weights: Format) -> "Kind":
        """Return the kind of these weights, one group in a row counting as a scale per row."""
        if not isinstance(weights, Integers):
            return cls.of(type(weights))
        return cls.integers(
            type(weights),
            PER_CHANNEL if weights.scales.shape[-1] == 1 else weights.group_size,
            weights.shape[-1],
            dtype=weights.scales.dtype,
            zeros=weights.zeros is not None,
            ordered=weights.order is not None,
        )

    def on_meta(self, *shape: int) -> Format:
        """Return a weight [.., N, K] of this kind on the meta device."""
        return self.format.on_meta(*shape, **dict(self.options))

    def quantize(self, w: Tensor) -> Format:
        """Return w [.., N, K] quantised to this kind; NaN and Inf are left to `check_values`."""
        options = dict(self.options)
        dtype = options.pop("dtype", w.dtype)
        options.pop("ordered", None)
        return self.format.quantize_unchecked(w.to(dtype), **options)

    @property
    def described(self) -> str:
        """Description for reports: the format and the layout of its scales."""
        options = dict(self.options)
        what = self.format.scale_layout
        if self.scale_layout is not None:
            what = self.scale_layout
        elif self.group_size is not None:
            what = f"in groups of {self.group_size}"
        return (
            f"{self.format.name} {what}"
            f"{', with zero points' * bool(options.get('zeros'))}"
            f"{', columns in an order of their own' * self.ordered}"
        )

    def unordered(self) -> "Kind":
        """Return the same kind without an order of the columns."""
        options = Kind.of(self.format, **dict(self.options) | {"ordered": False}).options
        return replace(self, options=options)

    @property
    def ordered(self) -> bool:
        """Whether columns have an order of their own, see `Integers`."""
        return bool(dict(self.options).get("ordered"))
