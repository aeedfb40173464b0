"""A format of quantised weights with the choices that decide the shapes of its tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from moezoo.layers.quant import Format, Integers, QuantizedWeights
from moezoo.layers.quant.groups import PER_CHANNEL


@dataclass(frozen=True)
class Kind:
    """A format and the options of its `on_meta`; weights of one kind can be stacked."""

    format: type[Format]
    options: tuple[tuple[str, Any], ...] = ()
    group_size: int | None = field(default=None, compare=False)
    """The columns of a group for a report, where groups are meant, be one as wide as a row."""

    scaled: str | None = field(default=None, compare=False)
    """What has a scale, for a report, where the tensors do not say: several rows share one."""

    @classmethod
    def of(cls, format: type[Format], **options: Any) -> "Kind":
        return cls(format, tuple(sorted(options.items())))

    @classmethod
    def integers(
        cls, format: type[Format], group_size: int, columns: int, **options: Any
    ) -> "Kind":
        """Of rows of so many columns; one group of all of them is a scale a row."""
        size = PER_CHANNEL if group_size == columns else group_size
        named = None if group_size == PER_CHANNEL else group_size
        return replace(cls.of(format, group_size=size, **options), group_size=named)

    @classmethod
    def of_weights(cls, held: QuantizedWeights) -> "Kind":
        weights = held()
        if not isinstance(weights, Integers):
            return replace(cls.of(held.format), scaled=held.scaled)
        row = weights.scales.shape[-1] == 1 and not held.grouped
        size = PER_CHANNEL if row else weights.group_size
        options = {
            "dtype": weights.scales.dtype,
            "zeros": weights.zeros is not None,
            "ordered": weights.order is not None,
        }
        kind = cls.integers(type(weights), size, weights.shape[-1], **options)
        return replace(kind, scaled=held.scaled)

    def on_meta(self, *shape: int) -> Format:
        """A weight [.., N, K] of this kind, without memory or values."""
        make: Callable[..., Format] = self.format.on_meta  # type: ignore[attr-defined]
        weight = make(*shape, **dict(self.options))
        return weight

    def quantize(self, w: Tensor) -> Format:
        """w [.., N, K] quantised so; NaN and Inf are left to `Format.check_values`."""
        options = dict(self.options)
        dtype = options.pop("dtype", w.dtype)
        options.pop("ordered", None)
        weight: Format = self.format.quantize_unchecked(w.to(dtype), **options)
        return weight

    @property
    def described(self) -> str:
        """The format and what has a scale, for a report."""
        options = dict(self.options)
        what = self.format.scale_layout
        if self.scaled is not None:
            what = self.scaled
        elif self.group_size is not None:
            what = f"in groups of {self.group_size}"
        return (
            f"{self.format.name} {what}"
            f"{', with zero points' * bool(options.get('zeros'))}"
            f"{', columns in an order of their own' * self.ordered}"
        )

    def unordered(self) -> "Kind":
        options = Kind.of(self.format, **dict(self.options) | {"ordered": False}).options
        return replace(self, options=options)

    @property
    def ordered(self) -> bool:
        return bool(dict(self.options).get("ordered"))
