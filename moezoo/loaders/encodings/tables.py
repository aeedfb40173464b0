"""Read a quantization_config: take known fields, and refuse unknown ones."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from moezoo.errors import QuantizationError


class Table:
    """The quantization_config of the checkpoint `name`, or a table in it."""

    def __init__(self, given: Mapping[str, Any], name: str, path: str = "") -> None:
        self.given = given
        self.name = name
        self.path = path
        self._asked: set[str] = set()
        self._tables: list[Table] = []

    def get(self, field: str) -> Any:
        self._asked.add(field)
        return self.given.get(field)

    def unknown(self, *harmless: str) -> tuple[str, ...]:
        """Return the fields with a value, here and in tables below, that nobody has read and that
        are not among these names."""
        own = (
            f"{self.path}{field}"
            for field, value in self.given.items()
            if value and field not in self._asked and field not in harmless
        )
        return (*own, *(field for table in self._tables for field in table.unknown(*harmless)))

    def refuse_unknown(self, *harmless: str) -> None:
        """Raise `QuantizationError` for the fields that `unknown` finds."""
        for field in self.unknown(*harmless):
            self.refuse(field.removeprefix(self.path), "none of that name")

    def refuse(self, field: str, expected: str) -> NoReturn:
        """Raise `QuantizationError` that names the field, what it is and what is loaded."""
        raise QuantizationError(
            f"{self.name}: quantization_config.{self.path}{field} is {self.given.get(field)!r}; "
            f"this release loads {expected}; take another checkpoint of the model"
        )

    def one_of(self, field: str, *known: object, default: object = None) -> Any:
        """Return the value of a field, refused if it is none of these; None is the default."""
        value = self.get(field)
        value = default if value is None else value
        if value not in known:
            self.refuse(field, " or ".join(repr(k) for k in known))
        return known[known.index(value)]  # 4 for 4.0

    def nothing(self, *fields: str) -> None:
        """Refuse these fields where they have a value."""
        for field in fields:
            if self.get(field):
                self.refuse(field, "none")

    def names(self, field: str) -> list[str]:
        """Return names, also out of lists of names as GPTQ has them."""
        names = self.get(field)
        names = [] if names is None else names
        if not isinstance(names, (list, tuple, set)):
            self.refuse(field, "a list of names")
        each = [name for part in names for name in (part if isinstance(part, list) else [part])]
        if not all(isinstance(name, str) for name in each):
            self.refuse(field, "a list of names")
        return each

    def patterns(self, field: str) -> list[str]:
        """Return names, and regular expressions after "re:"."""
        names = self.names(field)
        for name in names:
            try:
                re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
            except re.error as error:
                self.refuse(field, f"names and patterns, and {name!r} is no pattern ({error})")
        return names

    def table(self, field: str) -> "Table":
        value = self.get(field)
        if not isinstance(value, Mapping):
            self.refuse(field, "a table there")
        self._tables.append(Table(value, self.name, f"{self.path}{field}."))
        return self._tables[-1]

    def size(self, field: str) -> int:
        """Return a number of columns, -1 for all of them."""
        value = self.get(field)
        if type(value) is not int or value == 0 or value < -1:
            self.refuse(field, "a number of columns, or -1 for all")
        return value


def entry_above(tensor: str, modules: Iterable[str]) -> str | None:
    """Return the one of these modules that `tensor` is in, or is."""
    kept = modules if isinstance(modules, (set, frozenset)) else set(modules)
    parts = tensor.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((module for module in above if module in kept), None)


def entry_within(tensor: str, entries: Iterable[str]) -> str | None:
    """Return the one of these entries that is part of the tensor's name, in whole words between
    dots."""
    name = f".{tensor}."
    return next((entry for entry in entries if f".{entry.strip('.')}." in name), None)
