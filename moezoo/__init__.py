"""A zoo of Mixture-of-Experts language models.

    model = moezoo.from_pretrained("Qwen/Qwen3-30B-A3B")

The names below are the whole public interface; each is imported when it is first used. Importing
moezoo also registers `experts_implementation="moezoo"` with transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moezoo import experts_implementation
from moezoo.version import __version__ as __version__

if TYPE_CHECKING:
    from moezoo.generation.offline import generate
    from moezoo.generation.score import Score, score
    from moezoo.generation.texts import Completion, Prompt
    from moezoo.loaders.load import from_pretrained
    from moezoo.loaders.make import from_config
    from moezoo.loaders.quantization import Quantization
    from moezoo.parallel.eplb.options import EPLB
    from moezoo.parallel.mesh import Parallel
    from moezoo.registry import list_architectures
    from moezoo.tools.inspect import inspect
    from moezoo.tools.report import Report
    from moezoo.tools.routing import RoutingTrace, record_routing

__all__ = [
    "EPLB",
    "Completion",
    "Parallel",
    "Prompt",
    "Quantization",
    "Report",
    "RoutingTrace",
    "Score",
    "from_config",
    "from_pretrained",
    "generate",
    "inspect",
    "list_architectures",
    "record_routing",
    "score",
]

_HOMES = {
    "EPLB": "moezoo.parallel.eplb.options",
    "Completion": "moezoo.generation.texts",
    "Parallel": "moezoo.parallel.mesh",
    "Prompt": "moezoo.generation.texts",
    "Quantization": "moezoo.loaders.quantization",
    "Report": "moezoo.tools.report",
    "RoutingTrace": "moezoo.tools.routing",
    "Score": "moezoo.generation.score",
    "from_config": "moezoo.loaders.make",
    "from_pretrained": "moezoo.loaders.load",
    "generate": "moezoo.generation.offline",
    "inspect": "moezoo.tools.inspect",
    "list_architectures": "moezoo.registry",
    "record_routing": "moezoo.tools.routing",
    "score": "moezoo.generation.score",
}

experts_implementation.register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moezoo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
