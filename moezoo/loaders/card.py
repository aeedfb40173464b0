"""The section of a model card that says how the weights beside it are quantised.

It stands between two comments, so that it can be replaced, and nothing else of a card is touched.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moezoo.errors import naming_file
from moezoo.loaders.hub_layout import experts_and_linears
from moezoo.loaders.plan import dtype_name
from moezoo.version import __version__

CARD = "README.md"
_START, _END = "<!-- moezoo: quantisation -->", "<!-- moezoo: end -->"
_SECTION = re.compile(rf"(?:\r?\n)*{_START}\r?\n.*?{_END}(?:\r?\n)?", re.DOTALL)


@dataclass(frozen=True)
class Measured:
    """Held-out loss of a text in nats per token, in windows of `length` tokens, each read alone."""

    text: str
    num_tokens: int
    length: int
    before: float
    after: float


@dataclass(frozen=True)
class Section:
    """Facts on how weights were quantised; None stands for what was not measured.

    `experts` and `linears` describe their kinds. `weight_error` is the root mean square of what
    quantising changed in the experts' weights, over that of these weights.
    """

    source: str
    experts: tuple[str, ...]
    linears: tuple[str, ...]
    dtype: torch.dtype
    bytes_after: int
    bytes_before: int | None = None
    weight_error: float | None = None
    measured: Measured | None = None

    def __str__(self) -> str:
        rows = {"experts": f"in {' and '.join(self.experts)}" if self.experts else "not quantised"}
        if self.linears:
            rows["linear layers"] = f"some in {' and '.join(self.linears)}"
        rows["all else"] = dtype_name(self.dtype)
        size = f"{self.bytes_after:,}"
        if self.bytes_before is not None:
            rows["bytes of weights before"] = f"{self.bytes_before:,}"
            size += f" ({self.bytes_after / max(1, self.bytes_before):.1%})"
        rows["bytes of weights"] = size
        if self.weight_error is not None:
            rows["error of the experts' weights, relative"] = f"{self.weight_error:.2%}"
        loss = "The loss on a held-out text was not measured; `moezoo convert --measure` does it."
        if (measured := self.measured) is not None:
            rows["loss before, nats a token"] = f"{measured.before:.4f}"
            change = measured.after - measured.before
            rows["loss, nats a token"] = f"{measured.after:.4f} ({change:+.4f})"
            loss = (
                f"The loss is of {measured.num_tokens:,} tokens of {measured.text}, in windows of "
                f"{measured.length}, each read alone."
            )
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        return (
            f"{_START}\n## Quantisation\n\nWritten by moezoo {__version__} from {self.source}.\n\n"
            f"| | |\n|---|---|\n{table}\n\n{loss}\n{_END}\n"
        )


def formats_held(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return how a module's quantised experts are stored, and its quantised linear layers."""
    of_experts, of_others = (
        tuple(sorted({weights.kind.described for weights in some}))
        for some in experts_and_linears(module)
    )
    return of_experts, of_others


def with_section(card: str, section: Section | None) -> str:
    """Return the card with this section in place of an earlier one, or at its end, and without one
    where nothing is quantised."""
    if section is None or not (section.experts or section.linears):
        return _SECTION.sub("", card)
    text = f"\n\n{section}"
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: text, card, count=1).lstrip("\n")
    return f"{card.rstrip()}{text}".lstrip("\n")


def write_card(folder: Path, before: Path | None, section: Section | None) -> None:
    """Write the card `before`, if there is one, with the section into `folder`; write nothing where
    the card would be empty."""
    path = folder / CARD
    with naming_file(path):
        card = "" if before is None else before.read_bytes().decode("utf-8", "surrogateescape")
        lines = "\r\n" if 0 < card.count("\r\n") == card.count("\n") else "\n"
        card = with_section(card.replace(lines, "\n"), section).replace("\n", lines)
        if card:
            path.write_bytes(card.encode("utf-8", "surrogateescape"))
