"""Tables of checkpoint names that many architectures share, for a page's `CHECKPOINT`."""

from collections.abc import Sequence

from moezoo.loaders.mapping import Rule, Skip

AROUND_LAYERS = (
    Rule("embed.weight", "model.embed_tokens.weight"),
    Rule("norm.weight", "model.norm.weight"),
    Rule("lm_head.weight", "lm_head.weight"),
    Rule("lm_head.bias", "lm_head.bias"),
    Skip("model.layers.{L}.self_attn.rotary_emb.inv_freq", "computed from the config"),
    Skip("model.rotary_emb.inv_freq", "computed from the config"),
)

DECODER = (
    *AROUND_LAYERS,
    Rule("layers.{L}.attn_norm.weight", "model.layers.{L}.input_layernorm.weight"),
    Rule("layers.{L}.mlp_norm.weight", "model.layers.{L}.post_attention_layernorm.weight"),
)

ATTENTION = (
    Rule(
        "layers.{L}.attn.qkv.weight",
        "model.layers.{L}.self_attn.q_proj.weight",
        "model.layers.{L}.self_attn.k_proj.weight",
        "model.layers.{L}.self_attn.v_proj.weight",
    ),
    Rule(
        "layers.{L}.attn.qkv.bias",
        "model.layers.{L}.self_attn.q_proj.bias",
        "model.layers.{L}.self_attn.k_proj.bias",
        "model.layers.{L}.self_attn.v_proj.bias",
    ),
    Rule("layers.{L}.attn.o.weight", "model.layers.{L}.self_attn.o_proj.weight"),
    Rule("layers.{L}.attn.o.bias", "model.layers.{L}.self_attn.o_proj.bias"),
)

QK_NORM = (
    Rule("layers.{L}.attn.q_norm.weight", "model.layers.{L}.self_attn.q_norm.weight"),
    Rule("layers.{L}.attn.k_norm.weight", "model.layers.{L}.self_attn.k_norm.weight"),
)

MLA = (
    Rule("layers.{L}.attn.q.weight", "model.layers.{L}.self_attn.q_proj.weight"),
    Rule("layers.{L}.attn.q.a.weight", "model.layers.{L}.self_attn.q_a_proj.weight"),
    Rule("layers.{L}.attn.q.a.bias", "model.layers.{L}.self_attn.q_a_proj.bias"),
    Rule("layers.{L}.attn.q.norm.weight", "model.layers.{L}.self_attn.q_a_layernorm.weight"),
    Rule("layers.{L}.attn.q.b.weight", "model.layers.{L}.self_attn.q_b_proj.weight"),
    Rule("layers.{L}.attn.kv_a.weight", "model.layers.{L}.self_attn.kv_a_proj_with_mqa.weight"),
    Rule("layers.{L}.attn.kv_a.bias", "model.layers.{L}.self_attn.kv_a_proj_with_mqa.bias"),
    Rule("layers.{L}.attn.kv_norm.weight", "model.layers.{L}.self_attn.kv_a_layernorm.weight"),
    Rule("layers.{L}.attn.kv_b.weight", "model.layers.{L}.self_attn.kv_b_proj.weight"),
    Rule("layers.{L}.attn.o.weight", "model.layers.{L}.self_attn.o_proj.weight"),
    Rule("layers.{L}.attn.o.bias", "model.layers.{L}.self_attn.o_proj.bias"),
)


def gated_mlp(target: str, source: str) -> tuple[Rule, ...]:
    """Return rules for a dense gated feed-forward layer: our parameters `target`, the checkpoint's
    names `source`."""
    return tuple(
        rule
        for kind in ("weight", "bias")
        for rule in (
            Rule(
                f"{target}.gate_up.{kind}",
                f"{source}.gate_proj.{kind}",
                f"{source}.up_proj.{kind}",
            ),
            Rule(f"{target}.down.{kind}", f"{source}.down_proj.{kind}"),
        )
    )


DENSE_MLP = gated_mlp("layers.{L}.mlp", "model.layers.{L}.mlp")


def each_expert(source: str) -> tuple[Rule, ...]:
    """Return rules for experts that the checkpoint names `source`.0, `source`.1 and so on."""
    return (
        Rule(
            "layers.{L}.mlp.w13",
            f"{source}.{{E}}.gate_proj.weight",
            f"{source}.{{E}}.up_proj.weight",
            shard="expert",
        ),
        Rule("layers.{L}.mlp.w2", f"{source}.{{E}}.down_proj.weight", shard="expert"),
    )


EXPERTS = (
    Rule("layers.{L}.mlp.gate", "model.layers.{L}.mlp.gate.weight"),
    *each_expert("model.layers.{L}.mlp.experts"),
    Rule("layers.{L}.mlp.w13", "model.layers.{L}.mlp.experts.gate_up_proj", shard="expert"),
    Rule("layers.{L}.mlp.w2", "model.layers.{L}.mlp.experts.down_proj", shard="expert"),
)

BLOCK_SPARSE_MOE = (
    Rule("layers.{L}.mlp.gate", "model.layers.{L}.block_sparse_moe.gate.weight"),
    Rule(
        "layers.{L}.mlp.w13",
        "model.layers.{L}.block_sparse_moe.experts.{E}.w1.weight",
        "model.layers.{L}.block_sparse_moe.experts.{E}.w3.weight",
        shard="expert",
    ),
    Rule(
        "layers.{L}.mlp.w2",
        "model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight",
        shard="expert",
    ),
)
"""Mixtral's names of gates and experts, in place of those in `EXPERTS`."""

SHARED_EXPERTS = gated_mlp("layers.{L}.mlp.shared", "model.layers.{L}.mlp.shared_experts")

CORRECTION_BIAS = Rule(
    "layers.{L}.mlp.route.correction_bias", "model.layers.{L}.mlp.gate.e_score_correction_bias"
)

DEEPSEEK_MOE = (*DENSE_MLP, *EXPERTS, CORRECTION_BIAS, *SHARED_EXPERTS)
"""DeepSeek-V3's dense layers and MoE layers."""

TOKEN_PREDICTION = tuple(
    Skip(f"{prefix}mtp.{{*}}", "multi-token prediction") for prefix in ("", "model.")
)
"""Modules for multi-token prediction that stand beside the model; they are not loaded."""

TOKEN_PREDICTION_LAYERS = Skip(
    "model.layers.{L}.{*}",
    "multi-token prediction",
    marks=tuple(f"model.layers.{{L}}.{name}.weight" for name in ("eh_proj", "enorm", "hnorm")),
)
"""Layers for multi-token prediction that follow the model's last layer; they are not loaded."""


def of_text_model(rules: Sequence[Rule | Skip]) -> tuple[Rule | Skip, ...]:
    """Return the rules for a text model inside a multimodal one, whose vision model is skipped."""
    inner = tuple(
        Rule(
            rule.target,
            *(source.replace("model.", "model.language_model.", 1) for source in rule.sources),
            shard=rule.shard,
            view=rule.view,
        )
        for rule in rules
        if isinstance(rule, Rule) and rule.sources[0].startswith("model.")
    )
    return (*inner, Skip("model.visual.{*}", "the model of images"))


def with_prefix(prefix: str, rules: Sequence[Rule | Skip]) -> tuple[Rule | Skip, ...]:
    """Return the rules with `prefix` and a dot before every name of the checkpoint."""
    return tuple(
        Rule(
            rule.target,
            *(f"{prefix}.{source}" for source in rule.sources),
            shard=rule.shard,
            view=rule.view,
        )
        if isinstance(rule, Rule)
        else Skip(
            f"{prefix}.{rule.pattern}",
            rule.reason,
            marks=tuple(f"{prefix}.{mark}" for mark in rule.marks),
        )
        for rule in rules
    )
