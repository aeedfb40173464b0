"""The exceptions of moezoo. Arguments that none of them describes raise `ValueError`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class MoEZooError(Exception):
    """Base class of every error that moezoo raises on purpose."""


class CheckpointError(MoEZooError):
    """A checkpoint cannot be read or lacks what the model needs; names the file and the tensor."""


IN_TRANSFORMERS = (
    "transformers may run it, with moezoo's expert layers where they fit: "
    'AutoModelForCausalLM.from_pretrained(..., experts_implementation="moezoo")'
)
"""Advice in errors about models that moezoo does not run itself."""


class UnsupportedArchitectureError(MoEZooError):
    """The config names an architecture or a setting that moezoo does not do; names the field."""

    @classmethod
    def of_field(cls, config: Any, field: str, supported: str) -> "UnsupportedArchitectureError":
        """Make the error for a field of a transformers config: its value and what is supported."""
        value = getattr(config, field, None)
        # The configs of some architectures have other names for common fields.
        own_name = config.attribute_map.get(field)
        if own_name is not None:
            field = f"{field} ({own_name})"
        model = config.model_type
        if config.name_or_path:
            model = f"{config.name_or_path} ({model})"
        return cls(
            f"{model}: config.{field} is {value!r}; supported is {supported}. If the config is "
            f"right, {IN_TRANSFORMERS}"
        )


class ExpertMapError(MoEZooError):
    """The placement of experts over ranks contradicts itself or the model."""

    def __init__(self, message: str) -> None:
        super().__init__(f"Expert map mismatch: {message}")


class RankError(MoEZooError):
    """Another rank of the job died, hangs or failed; names it where that can be known."""

    def __init__(self, message: str) -> None:
        super().__init__(f"Expert parallelism stopped: {message}")


class QuantizationError(MoEZooError):
    """A quantisation scheme or a quantised tensor is wrong or not supported."""

    def __init__(self, message: str) -> None:
        super().__init__(f"Quantization error: {message}")


class AskedQuantizationError(QuantizationError, ValueError):
    """The `quantization` that the caller asked for does not fit the model or the checkpoint."""


class MoEOutOfMemoryError(MoEZooError):
    """A device has too little memory; says what was needed, what is free and what would fit."""

    def __init__(self, message: str) -> None:
        super().__init__(f"Out of memory during MoE: {message}")


class LoadImbalanceWarning(UserWarning):
    """Some ranks or experts get far more tokens than others."""

    def __init__(self, message: str) -> None:
        super().__init__(f"Load imbalance detected: {message}")


@contextmanager
def naming_file(file: str | os.PathLike[str]) -> Iterator[None]:
    """Set the file name of an `OSError` in the block that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(file)
        raise
