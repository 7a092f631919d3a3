"""Rows that the rule tables of many families share. The matrix of a linear layer is stored as [out in]."""

from __future__ import annotations

from hooked_lm.config import HookedTransformerConfig
from weight_conversion.rules import Constant, Drop, Entry, Piece, Rule, Split

__all__ = [
    "BLOCK",
    "added_layers",
    "attention",
    "attention_gate",
    "attention_output",
    "biasless_layer_norm",
    "embeddings",
    "experts",
    "fused_qkv",
    "gated_mlp",
    "linear",
    "mlp",
    "no_expert_biases",
    "no_mlp_biases",
    "no_qkv_biases",
    "norm",
    "qk_norm",
    "qk_norm_across_heads",
    "router",
    "router_correction",
    "split_qkv",
    "stored_mask",
    "stored_rotary",
]

BLOCK = "blocks.{layer}"

_ATTENTION_AXES = {"Q": "head", "K": "kv_head", "V": "kv_head"}


def norm(
    source: str,
    target: str,
    *,
    bias: bool = False,
    add: float = 0.0,
    scale: float = 1.0,
    again: bool = False,
    layers: tuple[int, ...] | None = None,
) -> tuple[Entry, ...]:
    """Return the rows of a norm over the residual stream: `source.weight` is its gain, `source.bias` its bias.

    Args:
        source, target: the module in the checkpoint and ours.
        bias: the norm has a bias, as only LayerNorms do; `biasless_layer_norm` is for a LayerNorm without.
        add: the number that the model adds to the stored gain (Gemma: 1).
        scale: a factor on the gain, by which the model multiplies the output of a norm without bias.
        again: another norm of ours reads the same tensors.
        layers: the blocks that have it, where the names hold `{layer}`; None for all.
    """
    gain = Rule(
        f"{source}.weight", "d_model -> d_model", f"{target}.w", add=add, scale=scale, again=again, layers=layers
    )
    if not bias:
        return (gain,)
    return (gain, Rule(f"{source}.bias", "d_model -> d_model", f"{target}.b", again=again, layers=layers))


def biasless_layer_norm(
    source: str, target: str, *, again: bool = False, layers: tuple[int, ...] | None = None
) -> tuple[Entry, ...]:
    """Return the rows of a LayerNorm that has a gain and no bias.

    Args:
        source, target: the module in the checkpoint and ours.
        again: another norm of ours reads the same tensors.
        layers: the blocks that have it, where the names hold `{layer}`; None for all.
    """
    return (*norm(source, target, again=again, layers=layers), Constant(f"{target}.b", "d_model", layers=layers))


def attention(
    module: str,
    *,
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    qkv_bias: bool = False,
    out_bias: bool = False,
    out_scale: float = 1.0,
) -> tuple[Entry, ...]:
    """Return the rows of attention with one linear layer each for queries, keys, values and output.

    Args:
        module: the attention module, with `{layer}`.
        names: its four layers.
        qkv_bias, out_bias: which of them have a bias.
        out_scale: a factor on the output before it is added to the stream.
    """
    rows: list[Entry] = []
    for letter, name in zip("QKV", names, strict=False):
        head = _ATTENTION_AXES[letter]
        W, b = f"{BLOCK}.attn.W_{letter}", f"{BLOCK}.attn.b_{letter}"
        rows.append(Rule(f"{module}.{name}.weight", f"({head} d_head) d_model -> {head} d_model d_head", W))
        bias = Rule(f"{module}.{name}.bias", f"({head} d_head) -> {head} d_head", b)
        rows.append(bias if qkv_bias else Constant(b, f"{head} d_head"))
    return (*rows, *attention_output(f"{module}.{names[3]}", bias=out_bias, scale=out_scale))


def attention_output(
    source: str, *, bias: bool = False, scale: float = 1.0, width: str = "d_head"
) -> tuple[Entry, ...]:
    """Return the rows of the output projection of attention.

    Args:
        source: the module.
        bias: the layer has a bias; without one, ours is zero.
        scale: a factor on its output.
        width: the axis of a head's z.
    """
    weight, b_O = f"d_model (head {width}) -> head {width} d_model", f"{BLOCK}.attn.b_O"
    out = Rule(f"{source}.bias", "d_model -> d_model", b_O, scale=scale) if bias else Constant(b_O, "d_model")
    return (Rule(f"{source}.weight", weight, f"{BLOCK}.attn.W_O", scale=scale), out)


def attention_gate(source: str) -> tuple[Entry, ...]:
    """Return the rows of the linear layer without bias whose sigmoid multiplies each head's z.

    Args:
        source: the layer.
    """
    weight = Rule(f"{source}.weight", "(head d_head) d_model -> head d_model d_head", f"{BLOCK}.attn.W_G")
    return (weight, Constant(f"{BLOCK}.attn.b_G", "head d_head"))


def no_qkv_biases() -> tuple[Entry, ...]:
    """Return the rows for queries, keys and values without biases, where the weights have rows of their own."""
    return tuple(Constant(f"{BLOCK}.attn.b_{letter}", f"{head} d_head") for letter, head in _ATTENTION_AXES.items())


def fused_qkv(source: str, *, order: str = "head part d_head", bias: bool = False) -> tuple[Entry, ...]:
    """Return the rows of one linear layer that makes queries, keys and values, as many heads of each.

    Args:
        source: the layer.
        order: how its outputs are laid out; `part` stands for queries, keys, values.
        bias: the layer has a bias.
    """
    W, b = (tuple(f"{BLOCK}.attn.{kind}_{letter}" for letter in "QKV") for kind in "Wb")
    weight = Rule(f"{source}.weight", f"({order}) d_model -> part head d_model d_head", W)
    if not bias:
        return (weight, *no_qkv_biases())
    return (weight, Rule(f"{source}.bias", f"({order}) -> part head d_head", b))


def split_qkv(source: str, *, grouped: bool = False, bias: bool = False) -> tuple[Entry, ...]:
    """Return the rows of one linear layer that makes queries, and keys and values for fewer heads.

    Args:
        source: the layer.
        grouped: the queries of a group come before the one key and value that they share, group by group; otherwise
            all queries come before all keys, and those before all values.
        bias: the layer has a bias.
    """
    order = "(kv_head part d_head)" if grouped else "(part d_head)"
    kept = "part kv_head" if grouped else "part"
    weight = Split(f"{source}.weight", f"{order} d_model -> {kept} d_model d_head", _pieces("W", grouped=grouped))
    if not bias:
        return (weight, *no_qkv_biases())
    return (weight, Split(f"{source}.bias", f"{order} -> {kept} d_head", _pieces("b", grouped=grouped)))


def _pieces(kind: str, *, grouped: bool) -> tuple[Piece, ...]:
    Q, K, V = (f"{BLOCK}.attn.{kind}_{letter}" for letter in "QKV")
    if not grouped:
        return (Piece(Q, "head"), Piece(K, "kv_head"), Piece(V, "kv_head"))
    width = "d_model d_head" if kind == "W" else "d_head"
    one = f"1 kv_head {width} -> kv_head {width}"
    queries = f"group kv_head {width} -> (kv_head group) {width}"
    return (Piece(Q, "group", queries), Piece(K, "1", one), Piece(V, "1", one))


def stored_rotary(attention: str) -> tuple[Entry, ...]:
    """Return the row for the rotary frequencies that old checkpoints keep in each attention module."""
    return (Drop(f"{attention}.rotary_emb.inv_freq", "rotary frequencies, which follow from the config"),)


def stored_mask(attention: str) -> tuple[Entry, ...]:
    """Return the rows for the causal mask and the score of masked keys, which old checkpoints store in attention."""
    return (
        Drop(f"{attention}.bias", "the causal mask"),
        Drop(f"{attention}.masked_bias", "the score of a key that the causal mask hides"),
    )


def qk_norm(
    attention: str, *, names: tuple[str, str] = ("q_norm", "k_norm"), bias: bool = False, add: float = 0.0
) -> tuple[Entry, ...]:
    """Return the rows of a norm over each head's queries and one over its keys, with one gain for all heads.

    Args:
        attention: the attention module.
        names: the two norms in it.
        bias: they have a bias, which only LayerNorms do.
        add: the number that the model adds to the stored gains.
    """
    rows: list[Entry] = []
    for name, target in zip(names, ("q_norm", "k_norm"), strict=True):
        source, ours = f"{attention}.{name}", f"{BLOCK}.attn.{target}"
        rows.append(Rule(f"{source}.weight", "d_head -> d_head", f"{ours}.w", add=add))
        if bias:
            rows.append(Rule(f"{source}.bias", "d_head -> d_head", f"{ours}.b"))
    return tuple(rows)


def qk_norm_across_heads(attention: str, *, names: tuple[str, str] = ("q_norm", "k_norm")) -> tuple[Entry, ...]:
    """Return the rows of an RMS norm over all queries together and one over all keys, with a gain per dimension.

    Args:
        attention: the module.
        names: of the two norms in it.
    """
    return tuple(
        Rule(f"{attention}.{name}.weight", f"({head} d_head) -> {head} d_head", f"{BLOCK}.attn.{target}.w")
        for name, target, head in zip(names, ("q_norm", "k_norm"), ("head", "kv_head"), strict=True)
    )


def linear(
    source: str,
    weight: str,
    bias_target: str,
    axes: tuple[str, str],
    *,
    bias: bool = False,
    scale: float = 1.0,
    layers: tuple[int, ...] | None = None,
) -> tuple[Entry, ...]:
    """Return the rows of one linear layer from `axes[0]` to `axes[1]`, kept as [out in].

    Args:
        source: the layer in the checkpoint.
        weight, bias_target: our tensors.
        axes: the axis of its input and the axis of its output.
        bias: the layer has a bias; without one, ours is zero.
        scale: a factor on its output.
        layers: the blocks that have it, where the names hold `{layer}`; None for all.
    """
    into, out = axes
    W = Rule(f"{source}.weight", f"{out} {into} -> {into} {out}", weight, scale=scale, layers=layers)
    if bias:
        return (W, Rule(f"{source}.bias", f"{out} -> {out}", bias_target, scale=scale, layers=layers))
    return (W, Constant(bias_target, out, layers=layers))


def mlp(
    up: str, down: str, *, up_bias: bool = False, down_bias: bool = False, layers: tuple[int, ...] | None = None
) -> tuple[Entry, ...]:
    """Return the rows of a plain MLP of two linear layers.

    Args:
        up, down: the layers in the checkpoint.
        up_bias, down_bias: whether they have biases.
        layers: the blocks that have it, where the names hold `{layer}`; None for all.
    """
    target = f"{BLOCK}.mlp"
    return (
        *linear(up, f"{target}.W_in", f"{target}.b_in", ("d_model", "d_mlp"), bias=up_bias, layers=layers),
        *linear(down, f"{target}.W_out", f"{target}.b_out", ("d_mlp", "d_model"), bias=down_bias, layers=layers),
    )


def gated_mlp(
    module: str,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    target: str = f"{BLOCK}.mlp",
    d_mlp: str = "d_mlp",
    bias: bool = False,
    out_scale: float = 1.0,
    layers: tuple[int, ...] | None = None,
) -> tuple[Entry, ...]:
    """Return the rows of a gated MLP: `down(act(gate(x)) * up(x))`.

    Args:
        module: the MLP in the checkpoint.
        names: of gate, up and down in it.
        target: the MLP of ours.
        d_mlp: the axis of its hidden layer.
        bias: whether the three have biases.
        out_scale: a factor on the output of `down`.
        layers: the blocks that have it, where the names hold `{layer}`; None for all.
    """
    gate, up, down = (f"{module}.{name}" for name in names)
    inward, outward = ("d_model", d_mlp), (d_mlp, "d_model")
    W_out = (f"{target}.W_out", f"{target}.b_out")
    return (
        *linear(gate, f"{target}.W_gate", f"{target}.b_gate", inward, bias=bias, layers=layers),
        *linear(up, f"{target}.W_in", f"{target}.b_in", inward, bias=bias, layers=layers),
        *linear(down, *W_out, outward, bias=bias, scale=out_scale, layers=layers),
    )


def no_mlp_biases(*, gated: bool) -> tuple[Entry, ...]:
    """Return the rows for an MLP without biases, where the weights have rows of their own."""
    inward = ("b_in", "b_gate") if gated else ("b_in",)
    return (
        *(Constant(f"{BLOCK}.mlp.{name}", "d_mlp") for name in inward),
        Constant(f"{BLOCK}.mlp.b_out", "d_model"),
    )


def router(
    source: str, *, target: str = f"{BLOCK}.mlp", bias: bool = False, layers: tuple[int, ...] | None = None
) -> tuple[Entry, ...]:
    """Return the rows of the linear layer that scores the experts.

    Args:
        source: the layer in the checkpoint.
        target: the mixture of ours.
        bias: the layer has a bias; without one, ours is zero.
        layers: the blocks that have it, where the names hold `{layer}`; None for all.
    """
    return linear(source, f"{target}.W_router", f"{target}.b_router", ("d_model", "choice"), bias=bias, layers=layers)


def router_correction(
    source: str,
    *,
    target: str = f"{BLOCK}.mlp",
    axes: str = "choice -> choice",
    layers: tuple[int, ...] | None = None,
) -> tuple[Entry, ...]:
    """Return the row of the numbers that are added to the experts' weights where experts are chosen.

    Args:
        source: the tensor.
        target: the mixture of ours.
        axes: how it is arranged.
        layers: the blocks that have it; None for all.
    """
    return (Rule(source, axes, f"{target}.b_correction", layers=layers),)


def added_layers(cfg: HookedTransformerConfig, count: int | None) -> tuple[Entry, ...]:
    """Return the rows of layers after the last, which predict the tokens after the next one and nothing else reads.

    Args:
        cfg: the config, which does not count them.
        count: how many there may be in the checkpoint.
    """
    numbers = range(cfg.n_layers, cfg.n_layers + (count or 0))
    return tuple(Drop(f"layers.{number}.*", "it predicts the tokens after the next one") for number in numbers)


def experts(
    module: str,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    target: str = f"{BLOCK}.mlp",
    out_scale: float = 1.0,
    layers: tuple[int, ...] | None = None,
) -> tuple[Entry, ...]:
    """Return the rows of gated experts without biases that have one tensor each, named by their number.

    Args:
        module: the list of experts, with `{layer}`.
        names: an expert's three layers.
        target: the mixture of ours.
        out_scale: a factor on the output of the last of them.
        layers: the blocks that have experts; None for all.
    """
    gate, up, down = (f"{module}.{{expert}}.{name}.weight" for name in names)
    inward = "expert d_expert d_model -> expert d_model d_expert"
    outward = "expert d_model d_expert -> expert d_expert d_model"
    return (
        Rule(gate, inward, f"{target}.W_gate", layers=layers),
        Rule(up, inward, f"{target}.W_in", layers=layers),
        Rule(down, outward, f"{target}.W_out", scale=out_scale, layers=layers),
        *no_expert_biases(target=target, layers=layers),
    )


def no_expert_biases(*, target: str = f"{BLOCK}.mlp", layers: tuple[int, ...] | None = None) -> tuple[Entry, ...]:
    """Return the rows for gated experts without biases, where the weights have rows of their own.

    Args:
        target: the mixture of ours.
        layers: the blocks that have it; None for all.
    """
    axes = {"b_gate": "expert d_expert", "b_in": "expert d_expert", "b_out": "expert d_model"}
    return tuple(Constant(f"{target}.{name}", axis, layers=layers) for name, axis in axes.items())


def embeddings(
    cfg: HookedTransformerConfig,
    embedding: str = "embed_tokens.weight",
    unembedding: str = "lm_head",
    *,
    bias: bool = False,
) -> tuple[Entry, ...]:
    """Return the rows of the token embedding and the unembedding, which are one tensor where the config ties them.

    Args:
        cfg: the config, which holds whether they are tied.
        embedding: the embedding's tensor.
        unembedding: the unembedding's module.
        bias: the unembedding has a bias.
    """
    b_U = (
        Rule(f"{unembedding}.bias", "vocab_out -> vocab_out", "unembed.b_U")
        if bias
        else Constant("unembed.b_U", "vocab_out")
    )
    own: Entry = Rule(f"{unembedding}.weight", "vocab_out d_model -> d_model vocab_out", "unembed.W_U")
    if cfg.tie_word_embeddings:
        own = Drop(f"{unembedding}.weight", "it is the token embedding")
    return (Rule(embedding, "vocab d_model -> vocab d_model", "embed.W_E"), own, b_U)
