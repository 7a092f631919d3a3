"""Full circuits: what a head does between the vocabulary it reads and the vocabulary it writes, from the weights alone.

`W_E W_QK W_E^T` holds how strongly each query token attends to each token, `W_E W_OV W_U` how much a token that is
attended to raises each logit (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). Both are
[vocab vocab] and of the rank of a head: they are kept as factors, and questions about their entries are answered block
by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm.circuits.folded import head_norm_linear_part, linear_part, require_additive, require_scores_by_head
from hooked_lm.circuits.stock_only import require_own_matrices, require_stock_attention, require_stock_unembedding
from hooked_lm.components.norm import Norm
from hooked_lm.components.spread import applied
from hooked_lm.components.stock import not_stock, require_stock
from hooked_lm.factored_matrix import FactoredMatrix
from hooked_lm.hooked_model import HookedModel

__all__ = ["TopEntries", "full_ov_circuit", "full_qk_circuit", "token_embeddings", "top1_accuracy", "top_entries"]

# The numbers in a block, unless the caller gives the number of rows: 64 MB in float32.
_NUMBERS_PER_BLOCK = 2**24


# The circuits


@torch.no_grad()
def token_embeddings(
    model: HookedModel, *, effective: bool = False, block: int | None = None, verbose: bool = True
) -> Float[Tensor, "vocab d_model"]:
    """Return what each token puts into the residual stream; no gradients.

    That is `W_E`, times the embedding scale and through the norm after the embedding, where the model has these; an
    overridden embedding is run. The effective embedding is the stream after the first MLP, had the first attention
    written nothing: `E + MLP_0(E)`. In models with tied embeddings the heads of later layers read a token from there
    rather than from its embedding (Wang et al. 2022, "Interpretability in the Wild"; McDougall et al. 2023, "Copy
    Suppression").

    Args:
        model: a `HookedTransformer`.
        effective: with the first MLP. Hooks of the model act in it.
        block: tokens that go through the MLP at a time; by default as many as make 64 MB of hidden layer in float32.
        verbose: show a progress bar.

    Raises:
        ValueError: the model has no MLP, or norms on the stream itself; its first block is overridden; or `block` is
            less than 1.
    """
    rows = torch.arange(model.cfg.d_vocab, device=model.embed.W_E.device)
    if not effective:
        scaled = model.cfg.embedding_scale != 1.0 or isinstance(model.embed.ln, Norm)
        plain = not scaled and not_stock(model.embed, name="embed") is None
        return model.W_E.detach() if plain else model.embed(rows[None])[0]
    require_additive(model)
    if model.cfg.attn_only or model.cfg.n_layers == 0:
        raise ValueError("an effective embedding is the one after the first MLP, and this model has no MLP")
    require_stock("an effective embedding", "blocks.0", model.blocks[0], alone=True)
    pieces, first = [], model.blocks[0]
    for part in _blocks(len(rows), model.cfg.d_mlp or model.cfg.d_model, block, "effective embedding", verbose):
        embedded = model.embed(rows[None, part])
        pieces.append((embedded + applied(first, embedded, first.mlp_output))[0])
    return torch.cat(pieces)


def full_qk_circuit(
    model: HookedModel, layer: int, head: int, *, effective_embedding: bool = False, normalize: bool = False
) -> FactoredMatrix:
    """Return `W_E W_Q W_K^T W_E^T` of a head as a FactoredMatrix [vocab vocab]: destination token, source token.

    Times `model.cfg.score_scale(layer)`, an entry is what the two tokens by themselves add to an attention score, at
    the same position where positions rotate. Biases, learned positions and ALiBi are left out. The gain of the norm
    that the head reads through is in it, and so is that of a norm on queries and keys; their scales are not.

    Args:
        model: a `HookedTransformer`.
        layer, head: the head. With grouped queries, the keys are those of the head's group.
        effective_embedding: tokens as they are after the first MLP; see `token_embeddings`.
        normalize: scale each embedding as the head's norm would if it stood alone in the stream.

    Raises:
        ValueError: no such head; norms stand where the circuit is no product of matrices; or attention or norms are
            overridden.
    """
    _check_head(model, layer, head)
    require_scores_by_head(model)
    require_own_matrices(model, "a full QK circuit")
    require_stock_attention(model, layer, "a full QK circuit")
    attn = model.blocks[layer].attn
    source = head // (model.cfg.n_heads // model.cfg.n_kv_heads)
    embedded = _read_embeddings(model, layer, effective_embedding, normalize)
    queries = head_norm_linear_part(attn.q_norm, embedded @ attn.W_Q[head].to(embedded.device), head)
    keys = head_norm_linear_part(attn.k_norm, embedded @ attn.W_K[source].to(embedded.device), source)
    return FactoredMatrix(queries, keys.mT)


def full_ov_circuit(
    model: HookedModel,
    layer: int,
    head: int | Sequence[int],
    *,
    effective_embedding: bool = False,
    normalize: bool = False,
) -> FactoredMatrix:
    """Return `W_E W_V W_O W_U` of a head as a FactoredMatrix [vocab vocab_out]: source token, token it raises.

    Times `model.cfg.logit_scale` and over the scale of the final norm, an entry is what a head that attends to the
    token, and to nothing else, adds to a logit by the direct path (before a soft-cap, where there is one). Biases are
    left out. The gains of the norms on the way are in it, their scales are not.

    Args:
        model: a `HookedTransformer`.
        layer, head: the head. Several heads of a layer give the sum of their circuits, whose ranks add up too.
        effective_embedding: tokens as they are after the first MLP; see `token_embeddings`.
        normalize: scale each embedding as the head's norm would if it stood alone in the stream.

    Raises:
        ValueError: no such head, one given twice, or none; norms stand where the circuit is no product of matrices; or
            attention, norms or unembedding are overridden.
    """
    heads = list(head) if isinstance(head, Sequence) else [head]
    if not heads or len(set(heads)) < len(heads):
        raise ValueError(f"the heads of a full OV circuit are one or more different ones, got {head!r}")
    for one in heads:
        _check_head(model, layer, one)
    require_own_matrices(model, "a full OV circuit", by_values=True)
    require_stock_attention(model, layer, "a full OV circuit")
    require_stock_unembedding(model, "a full OV circuit")
    block, group = model.blocks[layer], model.cfg.n_heads // model.cfg.n_kv_heads
    embedded = _read_embeddings(model, layer, effective_embedding, normalize)
    values = torch.cat([embedded @ block.attn.W_V[one // group].to(embedded.device) for one in heads], dim=-1)
    written = torch.cat([block.attn.W_O[one].to(embedded.device) for one in heads])
    for norm in (block.ln1_post, model.ln_final):
        written = linear_part(norm, written)
    return FactoredMatrix(values, written @ model.W_U)


def _read_embeddings(
    model: HookedModel, layer: int, effective: bool, normalize: bool
) -> Float[Tensor, "vocab d_model"]:
    """What the heads of a layer read of each token."""
    require_additive(model)
    if effective and layer == 0:
        raise ValueError("the heads of layer 0 read before the first MLP: the effective embedding is for later layers")
    embedded, norm = token_embeddings(model, effective=effective), model.blocks[layer].ln1
    if not (normalize and isinstance(norm, Norm)):
        return linear_part(norm, embedded)
    read = applied(norm, embedded, norm.without_hooks)
    return read if norm.b is None else read - norm.b.to(read.device)


def _check_head(model: HookedModel, layer: int, head: int) -> None:
    if not (0 <= layer < model.cfg.n_layers and 0 <= head < model.cfg.n_heads):
        raise ValueError(
            f"no head L{layer}H{head}: this model has layers 0-{model.cfg.n_layers - 1} and heads "
            f"0-{model.cfg.n_heads - 1}"
        )


# Entries of a circuit, block by block


@torch.no_grad()
def top1_accuracy(
    full_circuit: FactoredMatrix,
    targets: Int[Tensor, " row"] | None = None,
    *,
    block: int | None = None,
    verbose: bool = True,
) -> float:
    """Return the share of rows whose largest entry is on the diagonal, or in the column given for the row.

    For a copying head's OV circuit it is the share of tokens that the head predicts when it attends to them.

    Args:
        full_circuit: one matrix, [row column].
        targets: the column that each row should be largest in; the diagonal by default, for a square circuit.
        block: rows multiplied out at a time: the memory is `block * column` numbers, never `row * column`. By default
            as many as make 64 MB in float32.
        verbose: show a progress bar.

    Raises:
        ValueError: a stack of circuits, one that is not square and has no targets, targets that do not fit, entries
            that are not finite, or a block without rows.
    """
    _check_circuit(full_circuit)
    targets = _checked_targets(full_circuit, targets)
    hits = 0
    for rows in _blocks(full_circuit.ldim, full_circuit.rdim, block, "top-1 accuracy", verbose):
        entries = _entries(full_circuit, rows)
        hits += int((entries.argmax(-1) == targets[rows]).sum())
    return hits / full_circuit.ldim


@dataclass(frozen=True, eq=False)
class TopEntries:
    """The largest entries of some rows of a circuit, the largest first.

    Attributes:
        rows: the rows, in the order given, [row].
        columns: the columns of the entries, [row k].
        values: the entries, [row k].
    """

    rows: Int[Tensor, " row"]
    columns: Int[Tensor, "row k"]
    values: Float[Tensor, "row k"]


@torch.no_grad()
def top_entries(
    full_circuit: FactoredMatrix,
    k: int = 10,
    rows: Int[Tensor, " row"] | Sequence[int] | None = None,
    *,
    largest: bool = True,
    block: int | None = None,
    verbose: bool = True,
) -> TopEntries:
    """Return the `k` largest entries of each row, or the smallest: what a token attends to most, or raises most.

    Args:
        full_circuit: one matrix, [row column].
        k: how many entries of each row.
        rows: which rows, all by default.
        largest: False for the smallest entries, the most negative first: what a head suppresses.
        block, verbose: as for `top1_accuracy`.

    Raises:
        ValueError: a stack of circuits, rows that it does not have, more entries than a row has, or a block without
            rows.
    """
    _check_circuit(full_circuit)
    if not 1 <= k <= full_circuit.rdim:
        raise ValueError(f"k {k} is not in 1-{full_circuit.rdim}, the entries of a row")
    picked = _checked_rows(full_circuit, rows)
    values, columns = [], []
    for part in _blocks(len(picked), full_circuit.rdim, block, "top entries", verbose):
        best = _entries(full_circuit, picked[part]).topk(k, dim=-1, largest=largest)
        values.append(best.values)
        columns.append(best.indices)
    return TopEntries(picked, torch.cat(columns), torch.cat(values))


def _entries(circuit: FactoredMatrix, rows: slice | Int[Tensor, " row"]) -> Float[Tensor, "row column"]:
    entries = einsum(circuit.A[rows], circuit.B, "row rank, rank column -> row column")
    if not bool(entries.isfinite().all()):
        raise ValueError("the circuit has entries that are NaN or infinite: look at the weights it was made of")
    return entries


def _blocks(n_rows: int, n_columns: int, block: int | None, what: str, verbose: bool) -> Iterator[slice]:
    """Yield slices of at most `block` rows each."""
    if block is not None and block < 1:
        raise ValueError(f"a block has at least one row; got block={block}")
    size = block or max(1, _NUMBERS_PER_BLOCK // n_columns)
    for start in tqdm(range(0, n_rows, size), disable=not verbose, desc=what, leave=False):
        yield slice(start, start + size)


def _check_circuit(circuit: FactoredMatrix) -> None:
    if circuit.ndim != 2 or circuit.ldim == 0 or circuit.rdim == 0:
        raise ValueError(
            f"a full circuit is one matrix [row column], got shape {tuple(circuit.shape)}; index a stack of them first"
        )


def _checked_targets(circuit: FactoredMatrix, targets: Tensor | None) -> Int[Tensor, " row"]:
    if targets is None:
        if circuit.ldim != circuit.rdim:
            raise ValueError(
                f"a circuit with shape {tuple(circuit.shape)} has no diagonal for every row: give targets, a column "
                "for each row"
            )
        return torch.arange(circuit.ldim, device=circuit.A.device)
    if tuple(targets.shape) != (circuit.ldim,):
        raise ValueError(
            f"targets are one column for each of {circuit.ldim} rows, got a tensor with shape {tuple(targets.shape)}"
        )
    if int(targets.min()) < 0 or int(targets.max()) >= circuit.rdim:
        raise ValueError(f"targets are columns 0-{circuit.rdim - 1}, got {int(targets.min())} to {int(targets.max())}")
    return targets.to(circuit.A.device)


def _checked_rows(circuit: FactoredMatrix, rows: Tensor | Sequence[int] | None) -> Int[Tensor, " row"]:
    if rows is None:
        return torch.arange(circuit.ldim, device=circuit.A.device)
    picked = torch.as_tensor(rows)
    if picked.ndim != 1 or picked.numel() == 0 or picked.is_floating_point() or picked.dtype == torch.bool:
        raise ValueError(f"rows are one or more integers, got {rows!r}")
    if int(picked.min()) < 0 or int(picked.max()) >= circuit.ldim:
        raise ValueError(f"rows are 0-{circuit.ldim - 1}, got {int(picked.min())} to {int(picked.max())}")
    return picked.to(circuit.A.device, torch.long)
