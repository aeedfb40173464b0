"""Files of a module's weights, without a model and its config."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from moezoo.loaders.hub_layout import WritePlan
from moezoo.loaders.mapping import Rule, Skip
from moezoo.loaders.save import write_tensors


def write_weights(
    module: nn.Module,
    rules: Sequence[Rule | Skip],
    folder: Path,
    *,
    max_shard_size: int | str = "5GB",
) -> int:
    """Write the parameters and persistent buffers of `module` as safetensors; the bytes of all."""
    return write_tensors(
        WritePlan(module, rules).tensors(module.state_dict()),
        folder,
        max_shard_size=max_shard_size,
        tensor_of=lambda tensor: tensor.make(),
    )
