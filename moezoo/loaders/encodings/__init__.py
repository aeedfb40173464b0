"""Quantised checkpoints of the hub: how their config and headers describe the weights, and how
tensors are unpacked, in a module per quant_method. Nothing here opens a file."""

from collections.abc import Callable, Mapping

from moezoo.errors import QuantizationError
from moezoo.loaders.encodings.awq import Awq
from moezoo.loaders.encodings.compressed_tensors import CompressedTensors
from moezoo.loaders.encodings.fp8 import HubFp8
from moezoo.loaders.encodings.gptq import Gptq
from moezoo.loaders.encodings.mxfp4 import HubMxfp4
from moezoo.loaders.encodings.stored import Encoding, Extra, Scheme, StoredWeight
from moezoo.loaders.encodings.tables import Table
from moezoo.loaders.mapping import TensorInfo

__all__ = ["Encoding", "Extra", "Scheme", "StoredWeight", "encoding_of", "hub_scheme"]

_METHODS: dict[str, Callable[[Table], Scheme]] = {
    "fp8": HubFp8.of,
    "compressed-tensors": CompressedTensors.of,
    "gptq": Gptq.of,
    "awq": Awq.of,
    "mxfp4": HubMxfp4.of,
}


def hub_scheme(quantization_config: object, name: str) -> Scheme | None:
    """Return the scheme that the quantization_config of `name` describes, None without one.

    Raises `QuantizationError` naming the field that moezoo does not do.
    """
    if quantization_config is None or quantization_config == {}:
        return None
    given = quantization_config
    if not isinstance(given, Mapping) and hasattr(given, "to_dict"):
        given = given.to_dict()
    if not isinstance(given, Mapping):
        raise QuantizationError(
            f"{name}: quantization_config is {given!r}, expected a table; get the config.json that "
            "belongs to these weights"
        )
    table = Table(given, name)
    method = table.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        table.refuse("quant_method", ", ".join(map(repr, _METHODS)))
    return _METHODS[method](table)


def encoding_of(
    quantization_config: object, tensors: Mapping[str, TensorInfo], name: str
) -> Encoding:
    """Return how the checkpoint `name` stores its weights, by its config and its headers.

    Raises `QuantizationError` naming the field that moezoo does not do, or the tensor and its file
    that contradict the config or one another.
    """
    scheme = hub_scheme(quantization_config, name)
    return Encoding(None, tensors, {}) if scheme is None else scheme.encoding(tensors, name)
