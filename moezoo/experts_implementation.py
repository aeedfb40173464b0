"""Registers `experts_implementation="moezoo"` with transformers when moezoo is imported.

transformers' registry is in a module that takes seconds to import, torch included. If that module
has not been imported yet, the entry is made as soon as it is.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REGISTRY = "transformers.integrations.moe"


def register() -> None:
    """Add "moezoo" to transformers' experts implementations, now or once they are imported."""
    if REGISTRY in sys.modules:
        _enter(sys.modules[REGISTRY])
    else:
        sys.meta_path.insert(0, _OnImport())


def _enter(registry: ModuleType) -> None:
    registry.ALL_EXPERTS_FUNCTIONS.register("moezoo", _experts_forward)


def _experts_forward(*args: Any, **kwargs: Any) -> Any:
    from moezoo.layers.moe.in_transformers import experts_forward

    return experts_forward(*args, **kwargs)


class _OnImport:
    """An import hook that adds "moezoo" to the registry after its module has been executed.

    The module itself is found by the other finders.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_enter(module: ModuleType) -> None:
                run(module)
                _enter(module)
                sys.meta_path.remove(self)

            spec.loader.exec_module = run_and_enter  # type: ignore[method-assign]
        return spec
