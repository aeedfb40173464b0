"""State dicts in the layout of the hub, as `save_pretrained` writes it or transformers has it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moezoo.layers.quant import QuantizedWeights
from moezoo.loaders.mapping import (
    Rule,
    Skip,
    TensorInfo,
    parameter_infos,
    stored_name,
    stored_order,
)
from moezoo.loaders.plan import plan


def load_hub_state(
    decoder: nn.Module, rules: Sequence[Rule | Skip], state: Mapping[str, Tensor]
) -> None:
    """Copy the tensors of `state`, which has the names of a checkpoint, into `decoder`.

    Raises `CheckpointError`, before anything is copied, unless every parameter gets its tensors and
    every tensor has its place; `ValueError` for a decoder with quantised weights.
    """
    if any(isinstance(module, QuantizedWeights) for module in decoder.modules()):
        raise ValueError(
            "a state dict in the hub's layout cannot be loaded into quantised weights; load it "
            "into the model in 16 or 32 bits, or save it and give from_pretrained a quantization"
        )
    parameters = decoder.state_dict(keep_vars=True)
    tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}
    head = stored_name(rules, "lm_head.weight", tensors)
    if "lm_head.weight" not in parameters and head in tensors:
        rules = (*rules, Skip(head, "tied to the embedding"))
    planned = plan(rules, tensors, parameter_infos(decoder), name="the state dict")
    with torch.no_grad():
        for copy in planned.copies:
            stored = state[copy.source]
            place = stored_order(parameters[copy.target][copy.target_index], copy.view)
            place.copy_((stored if copy.rows is None else stored[copy.rows]).reshape(place.shape))
