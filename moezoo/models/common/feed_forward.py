"""Feed-forward layers of the sizes that a config names: dense layers and MoE layers."""

from collections.abc import Callable, Container
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.mlp import GatedMLP
from moezoo.layers.moe import BiasedRoute, FusedMoE
from moezoo.layers.moe.layer import Route
from moezoo.layers.moe.routing import grouped_topk, softmax_topk
from moezoo.models.common.fields import experts_per_token


def num_experts(config: PreTrainedConfig) -> int:
    """Return the number of routed experts, for which configs have different names."""
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    number: int = next(getattr(config, name) for name in names if hasattr(config, name))
    return number


def mlp(config: PreTrainedConfig, width: int, *, bias: bool = False) -> GatedMLP:
    """Return a dense gated feed-forward layer of an intermediate size of `width`."""
    return GatedMLP(config.hidden_size, width, activation=config.hidden_act, bias=bias)


def moe_layer(
    config: PreTrainedConfig,
    width: int,
    route: Route,
    *,
    layer: Callable[..., FusedMoE] = FusedMoE,
    shared: nn.Module | None = None,
) -> FusedMoE:
    """Return a `layer` of all the config's experts, each of an intermediate size of `width`."""
    return layer(
        config.hidden_size,
        width,
        num_experts(config),
        route,
        activation=config.hidden_act,
        shared=shared,
    )


def check_groups(config: PreTrainedConfig) -> None:
    """Check `n_group`, `topk_group` and `num_experts_per_tok` against each other.

    Raises `UnsupportedArchitectureError` where groups do not divide the experts, or the groups that
    a token keeps have fewer experts than it chooses.
    """
    experts, groups, kept = num_experts(config), config.n_group, config.topk_group
    if (groups or 0) < 1 or experts % groups:
        raise UnsupportedArchitectureError.of_field(config, "n_group", f"a divisor of {experts}")
    if not 1 <= (kept or 0) <= groups:
        raise UnsupportedArchitectureError.of_field(config, "topk_group", f"1 to {groups}")
    experts_per_token(config, kept * experts // groups)


def softmax_route(config: PreTrainedConfig, *, renormalize: bool) -> partial[tuple[Tensor, Tensor]]:
    """Return the router `softmax_topk` with the config's number of experts per token."""
    k = experts_per_token(config, num_experts(config))
    return partial(softmax_topk, k=k, renormalize=renormalize)


def sigmoid_route(config: PreTrainedConfig) -> BiasedRoute:
    """Return DeepSeek-V3's router: sigmoid scores, groups, and a correction bias of its own."""
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
    return BiasedRoute(num_experts(config), route)


def ungrouped_sigmoid_route(config: PreTrainedConfig, *, scaling: float) -> BiasedRoute:
    """Return a router of sigmoid scores with a correction bias of its own: without groups, always
    renormalised, then multiplied by `scaling`."""
    route = partial(
        grouped_topk,
        k=experts_per_token(config, num_experts(config)),
        scoring="sigmoid",
        renormalize=True,
        scaling=scaling,
    )
    return BiasedRoute(num_experts(config), route)


def dense_by_count(config: PreTrainedConfig) -> Container[int]:
    """Return the dense layers where `config.first_k_dense_replace` counts them."""
    return range(config.first_k_dense_replace)


def dense_by_list(config: PreTrainedConfig) -> set[int]:
    """Return the dense layers where `config.mlp_layer_types` has "dense" or "sparse" for each.

    Raises `UnsupportedArchitectureError` for other kinds.
    """
    kinds = config.mlp_layer_types
    if set(kinds) - {"dense", "sparse"} or len(kinds) < config.num_hidden_layers:
        raise UnsupportedArchitectureError.of_field(
            config, "mlp_layer_types", "'dense' or 'sparse' for each layer"
        )
    return {layer_idx for layer_idx, kind in enumerate(kinds) if kind == "dense"}


def dense_by_list_and_count(config: PreTrainedConfig) -> set[int]:
    """Return `dense_by_list`, for architectures whose configs on the hub may count instead.

    transformers does not read the count: `UnsupportedArchitectureError` is raised where the two
    differ.
    """
    dense = dense_by_list(config)
    count = getattr(config, "first_k_dense_replace", None)
    if count is not None and dense != set(range(count)):
        raise UnsupportedArchitectureError.of_field(
            config, "first_k_dense_replace", f"the layers {sorted(dense)}, as mlp_layer_types says"
        )
    return dense


def dense_by_step(config: PreTrainedConfig) -> set[int]:
    """Return the dense layers where every `config.decoder_sparse_step`-th layer is an MoE layer.

    The layers in `config.mlp_only_layers` are dense too, and all layers if there are no experts.
    """
    return {
        layer_idx
        for layer_idx in range(config.num_hidden_layers)
        if layer_idx in config.mlp_only_layers
        or (layer_idx + 1) % config.decoder_sparse_step
        or config.num_experts == 0
    }


def dense_or_moe(
    config: PreTrainedConfig,
    route: Callable[[PreTrainedConfig], Route],
    *,
    dense: Container[int],
    num_shared: int | None,
    bias: bool = False,
    layer: Callable[..., FusedMoE] = FusedMoE,
) -> Callable[[int], nn.Module]:
    """Return the `feed_forward` of `pre_norm_decoder` for layers that are partly dense.

    The layers in `dense` are dense; each of the others is a `layer` with a router of its own,
    `route(config)`. Its `num_shared` shared experts are one dense layer, `num_shared` times as wide
    as an expert; None for a model without them. Dense layers have biases if `bias`.
    """

    def feed_forward(layer_idx: int) -> nn.Module:
        if layer_idx in dense:
            return mlp(config, config.intermediate_size, bias=bias)
        width = config.moe_intermediate_size
        shared = None if num_shared is None else mlp(config, width * num_shared, bias=bias)
        return moe_layer(config, width, route(config), layer=layer, shared=shared)

    return feed_forward
