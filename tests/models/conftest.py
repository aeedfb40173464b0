"""What only the first configuration of an architecture is for."""

import pytest
from configurations import CONFIGURATIONS

FIRST = {(model_type, next(iter(cases))) for model_type, cases in CONFIGURATIONS.items()}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def again(item: pytest.Item) -> bool:
        params = getattr(item, "callspec", None)
        return (
            "first_configuration" in item.keywords
            and params is not None
            and params.params.get("pair") not in FIRST
        )

    repeated = [item for item in items if again(item)]
    config.hook.pytest_deselected(items=repeated)
    items[:] = [item for item in items if not again(item)]
