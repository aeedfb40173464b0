"""Random initial weights, the same on every device and for any number of ranks.

Each tensor has a seed of its own, and so has each expert, whichever rank makes it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.experts import experts_of, parts_shape
from moezoo.loaders.mapping import ParameterInfo


@torch.no_grad()
def initialise(
    module: nn.Module,
    infos: Mapping[str, ParameterInfo],
    tensors: Mapping[str, Tensor],
    quantized: Mapping[str, Kind],
    *,
    held: Mapping[FusedMoE, Sequence[int]],
    deviation: float,
    seed: int,
) -> None:
    """Fill `tensors`, those of `module` with some weights quantised: matrices from a normal
    distribution with this deviation, norms with ones, biases with zeros, others as their module's
    `initial_values` say.

    `infos` are the parameters as if none was quantised; `held` are the experts in the rows of a
    layer, all of them where it is not there.
    """
    owners = experts_of(module)
    seeds = torch.Generator("cpu").manual_seed(seed)
    for name, info in infos.items():
        if name not in owners:
            (own,) = _draw(seeds, 1)
            _fill(module, name, tensors[name], deviation=deviation, seed=own)
            continue
        layer, kind = owners[name], quantized.get(name)
        of_experts = _draw(seeds, layer.num_experts)
        for row, expert in enumerate(held.get(layer, range(layer.num_experts))):
            if kind is None:
                _normal(tensors[name][row], deviation, of_experts[expert])
                continue
            whole = torch.empty(
                parts_shape(layer, name)[1:],
                dtype=info.dtype,
                device=tensors[f"{name}.data"].device,
            )
            _normal(whole, deviation, of_experts[expert])
            for field, part in kind.quantize(whole).tensors().items():
                if part is not None:
                    tensors[f"{name}.{field}"][row].copy_(part)


def _draw(seeds: torch.Generator, count: int) -> list[int]:
    drawn: list[int] = torch.randint(2**62, (count,), generator=seeds, device="cpu").tolist()
    return drawn


def _fill(module: nn.Module, name: str, tensor: Tensor, *, deviation: float, seed: int) -> None:
    owner, _, attribute = name.rpartition(".")
    own = getattr(module.get_submodule(owner), "initial_values", {})
    if attribute in own:
        tensor.fill_(own[attribute])
    elif "bias" in attribute:
        tensor.zero_()
    elif tensor.dim() == 1 and attribute != "sinks":
        tensor.fill_(1)  # a norm's weight
    else:
        _normal(tensor, deviation, seed)


def _normal(tensor: Tensor, deviation: float, seed: int) -> None:
    tensor.normal_(std=deviation, generator=torch.Generator(tensor.device).manual_seed(seed))
