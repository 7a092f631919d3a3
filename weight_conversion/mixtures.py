"""Mixtures of experts whose router corrects its choice and groups its experts, as DeepSeek's configs describe them."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion import tables
from weight_conversion.errors import CheckpointError
from weight_conversion.fields import Arguments, ConfigFields
from weight_conversion.rules import Entry

__all__ = [
    "dense_first",
    "groups",
    "ignore_training",
    "mixture",
    "mixture_rules",
    "sparse_layers",
    "where_sparse",
    "widths",
]


def mixture(
    fields: ConfigFields, *, n_experts: str = "n_routed_experts", n_shared: str = "n_shared_experts"
) -> Arguments:
    """Return the arguments about experts of a config with the names of DeepSeek-V3's.

    Args:
        fields: of the config.
        n_experts, n_shared: the fields for how many experts there are, and how many that every token uses.
    """
    ignore_training(fields)
    # Published files describe their router in words. Transformers does not read them.
    fields.require("scoring_func", "sigmoid")
    fields.require("topk_method", "noaux_tc")
    return {
        "num_experts": fields.take(n_experts),
        "experts_per_token": fields.take("num_experts_per_tok"),
        **widths(fields, n_shared),
        "norm_topk_prob": bool(fields.take("norm_topk_prob")),
        "routed_scale": float(fields.take("routed_scaling_factor")),
        "router_scores": "sigmoid",
        "router_correction": True,
        "router_in_float32": True,
        **groups(fields),
    }


def widths(fields: ConfigFields, n_shared: str) -> Arguments:
    """Return the arguments for the widths of the experts and of the shared one, which is as wide as several of them.

    Args:
        fields: of the config.
        n_shared: the field that says as how many, or that there is none.
    """
    width = fields.take("moe_intermediate_size")
    return {"d_expert": width, "d_shared_expert": width * (fields.take(n_shared) or 0) or None}


def ignore_training(fields: ConfigFields) -> None:
    """Ignore the fields about losses and parallel computation; layers with experts follow one another."""
    fields.ignore("attention_dropout", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
    fields.ignore("pretraining_tp", "ep_size", "aux_loss_alpha", "seq_aux")
    # Layers that predict later tokens; `tables.added_layers` leaves their tensors out.
    fields.ignore("num_nextn_predict_layers", "num_mtp_layers")
    fields.require("moe_layer_freq", 1)


def groups(fields: ConfigFields) -> Arguments:
    """Return the arguments about groups of experts; none where a token may choose from every group.

    Raises:
        CheckpointError: there are no groups, or a token may choose from none.
    """
    count, chosen = (1 if number is None else number for number in map(fields.take, ("n_group", "topk_group")))
    if min(count, chosen) < 1:
        raise CheckpointError(f"{fields.family} with n_group={count} and topk_group={chosen}: both are 1 at least")
    if chosen >= count:
        return {}
    return {"expert_groups": count, "expert_groups_per_token": chosen}


def dense_first(fields: ConfigFields, name: str = "first_k_dense_replace") -> Arguments:
    """Return the argument that says which layers have experts, for a config that counts the dense layers before them.

    Args:
        fields: of the config.
        name: the field with their number.
    """
    dense = fields.take(name) or 0
    return {"moe_layers": [layer >= dense for layer in range(fields.take("num_hidden_layers"))]}


def where_sparse(fields: ConfigFields) -> Arguments:
    """Return the argument that says which layers have experts, from `mlp_layer_types`.

    Raises:
        CheckpointError: a layer is neither `"dense"` nor `"sparse"`.
    """
    # Files may give the number of dense layers too, from which transformers fills in `mlp_layer_types`.
    fields.ignore("first_k_dense_replace")
    kinds = fields.take("mlp_layer_types")
    unknown = sorted(set(kinds) - {"dense", "sparse"})
    if unknown:
        raise CheckpointError(f"{fields.family} with MLPs of type {unknown} is not supported; dense and sparse are")
    return {"moe_layers": [kind == "sparse" for kind in kinds]}


def sparse_layers(cfg: HookedTransformerConfig) -> tuple[int, ...]:
    """Return the layers that have experts."""
    return tuple(layer for layer in range(cfg.n_layers) if cfg.has_experts(layer))


def mixture_rules(
    cfg: HookedTransformerConfig,
    module: str,
    *,
    router: str = "gate",
    correction: str | None = "gate.e_score_correction_bias",
    correction_axes: str = "expert -> expert",
    shared: str = "shared_experts",
    bias: bool = False,
    out_scale: float = 1.0,
) -> tuple[Entry, ...]:
    """Return the rows of the mixture in the layers that have experts, and of the dense MLP in the others.

    Args:
        cfg: says which layers have experts, and whether there is a shared one.
        module: of either, with `{layer}`.
        router, correction, shared: the router, the correction of its choice and the shared expert in it; no correction
            if None.
        correction_axes: how the correction is arranged.
        bias: dense MLPs and the shared expert have biases.
        out_scale: a factor on what experts and the shared expert write.
    """
    sparse = sparse_layers(cfg)
    dense = tuple(layer for layer in range(cfg.n_layers) if layer not in sparse)
    rows = [
        *tables.router(f"{module}.{router}", layers=sparse),
        *tables.experts(f"{module}.experts", out_scale=out_scale, layers=sparse),
        *tables.gated_mlp(module, bias=bias, layers=dense),
    ]
    if correction is not None:
        rows += tables.router_correction(f"{module}.{correction}", axes=correction_axes, layers=sparse)
    if cfg.d_shared_expert is not None:
        rows += tables.gated_mlp(
            f"{module}.{shared}",
            target=f"{tables.BLOCK}.mlp.shared",
            d_mlp="d_shared_expert",
            bias=bias,
            out_scale=out_scale,
            layers=sparse,
        )
    return tuple(rows)
