"""Feed-forward layers of the sizes that a config names, dense ones and mixtures of experts."""

from collections.abc import Callable, Container
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.mlp import GatedMLP
from moezoo.layers.moe import BiasedRoute, FusedMoE
from moezoo.layers.moe.layer import Route
from moezoo.layers.moe.routing import grouped_topk, softmax_topk
from moezoo.models.fields import experts_per_token


def num_experts(config: PreTrainedConfig) -> int:
    """Configs have different names for it."""
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    number: int = next(getattr(config, name) for name in names if hasattr(config, name))
    return number


def mlp(config: PreTrainedConfig, width: int, *, bias: bool = False) -> GatedMLP:
    return GatedMLP(config.hidden_size, width, activation=config.hidden_act, bias=bias)


def mixture(
    config: PreTrainedConfig,
    width: int,
    route: Route,
    *,
    layer: Callable[..., FusedMoE] = FusedMoE,
    shared: nn.Module | None = None,
) -> FusedMoE:
    """A `layer` of as many experts as the config names, each `width` wide."""
    return layer(
        config.hidden_size,
        width,
        num_experts(config),
        route,
        activation=config.hidden_act,
        shared=shared,
    )


def check_groups(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedArchitectureError` for numbers of experts and groups that do not fit."""
    experts, groups, kept = num_experts(config), config.n_group, config.topk_group
    if (groups or 0) < 1 or experts % groups:
        raise UnsupportedArchitectureError.of_field(config, "n_group", f"a divisor of {experts}")
    if not 1 <= (kept or 0) <= groups:
        raise UnsupportedArchitectureError.of_field(config, "topk_group", f"1 to {groups}")
    experts_per_token(config, kept * experts // groups)


def softmax_route(config: PreTrainedConfig, *, renormalize: bool) -> partial[tuple[Tensor, Tensor]]:
    """`softmax_topk` of as many experts as the config says a token has."""
    k = experts_per_token(config, num_experts(config))
    return partial(softmax_topk, k=k, renormalize=renormalize)


def sigmoid_route(config: PreTrainedConfig) -> Callable[[], BiasedRoute]:
    """DeepSeek-V3's router, as often as it is asked for: sigmoid scores in groups, and a bias that
    steers the choice."""
    check_groups(config)
    if num_experts(config) // config.n_group < 2:
        raise UnsupportedArchitectureError.of_field(
            config, "n_group", "two experts a group or more"
        )
    route = partial(
        grouped_topk,
        k=config.num_experts_per_tok,
        num_groups=config.n_group,
        topk_groups=config.topk_group,
        scoring="sigmoid",
        renormalize=config.norm_topk_prob,
        scaling=config.routed_scaling_factor,
    )
    return partial(BiasedRoute, num_experts(config), route)


def ungrouped_sigmoid_route(config: PreTrainedConfig, scaling: float) -> Callable[[], BiasedRoute]:
    """The same without groups, always renormalised."""
    route = partial(
        grouped_topk,
        k=experts_per_token(config, num_experts(config)),
        num_groups=1,
        topk_groups=1,
        scoring="sigmoid",
        renormalize=True,
        scaling=scaling,
    )
    return partial(BiasedRoute, num_experts(config), route)


def first_layers(config: PreTrainedConfig) -> Container[int]:
    """The dense layers where `config.first_k_dense_replace` counts them."""
    return range(config.first_k_dense_replace)


def listed_layers(config: PreTrainedConfig) -> set[int]:
    """The dense layers where `config.mlp_layer_types` lists all.

    Raises `UnsupportedArchitectureError` for other kinds.
    """
    kinds = config.mlp_layer_types
    if set(kinds) - {"dense", "sparse"} or len(kinds) < config.num_hidden_layers:
        raise UnsupportedArchitectureError.of_field(
            config, "mlp_layer_types", "'dense' or 'sparse' for each layer"
        )
    return {layer_idx for layer_idx, kind in enumerate(kinds) if kind == "dense"}


def counted_layers(config: PreTrainedConfig) -> set[int]:
    """`listed_layers` where the hub's configs count them, and transformers does not read that.

    Raises `UnsupportedArchitectureError` where the two differ.
    """
    dense = listed_layers(config)
    count = getattr(config, "first_k_dense_replace", None)
    if count is not None and dense != set(range(count)):
        raise UnsupportedArchitectureError.of_field(
            config, "first_k_dense_replace", f"the layers {sorted(dense)}, as mlp_layer_types says"
        )
    return dense


def dense_or_mixture(
    config: PreTrainedConfig,
    route: Callable[[], Route],
    *,
    dense: Container[int],
    num_shared: int | None,
    bias: bool = False,
    layer: Callable[..., FusedMoE] = FusedMoE,
) -> Callable[[int], nn.Module]:
    """For `pre_norm_decoder`: the layers in `dense` are dense, the others a mixture, a `layer`.

    Their `num_shared` shared experts are one dense layer of as many times the width; `bias` is that
    of dense layers.
    """

    def feed_forward(layer_idx: int) -> nn.Module:
        if layer_idx in dense:
            return mlp(config, config.intermediate_size, bias=bias)
        width = config.moe_intermediate_size
        shared = None if num_shared is None else mlp(config, width * num_shared, bias=bias)
        return mixture(config, width, route(), layer=layer, shared=shared)

    return feed_forward
