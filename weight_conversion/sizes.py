"""The sizes of a model, by the names that most configs since Llama's use."""

from __future__ import annotations

from weight_conversion.fields import Arguments, ConfigFields

__all__ = ["d_head", "gpt2_sizes", "sizes"]


def sizes(fields: ConfigFields, *, d_mlp: int | None = None) -> Arguments:
    """Return the sizes, the activation function and whether embeddings are tied, of a config with Llama's names.

    Args:
        fields: of the config.
        d_mlp: the hidden width of dense MLPs, where the config does not say it.
    """
    return {
        "n_layers": fields.take("num_hidden_layers"),
        "d_model": fields.take("hidden_size"),
        "n_heads": fields.take("num_attention_heads"),
        "n_key_value_heads": fields.take("num_key_value_heads"),
        "d_head": d_head(fields),
        "d_mlp": fields.take("intermediate_size") if d_mlp is None else d_mlp,
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("hidden_act"),
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
    }


def gpt2_sizes(fields: ConfigFields) -> Arguments:
    """Return the sizes, the activation function and the `eps` of LayerNorms, of a config with GPT-2's names.

    Args:
        fields: of the config.
    """
    d_model = fields.take("n_embd")
    return {
        "n_layers": fields.take("n_layer"),
        "d_model": d_model,
        "n_heads": fields.take("n_head"),
        "d_mlp": fields.take("n_inner") or 4 * d_model,
        "n_ctx": fields.take("n_positions"),
        "d_vocab": fields.take("vocab_size"),
        "act_fn": fields.take("activation_function"),
        "eps": fields.take("layer_norm_epsilon"),
        "normalization_type": "LN",
    }


def d_head(fields: ConfigFields) -> int:
    """Return the width of a head: `head_dim`, or `hidden_size / num_attention_heads` for a config without it."""
    width: int | None = fields.get("head_dim", None)
    if width:
        return width
    shared: int = fields.take("hidden_size") // fields.take("num_attention_heads")
    return shared
