"""The first run of path patching by the stages of stock blocks: the residual streams of all sets of senders at once.

Along the routes "direct" and "mlps" this run needs no attention, since attention's outputs are those of the corrupted
run. So one pass up the layers carries the streams of every set of senders, each from the layer of its first sender on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_lm.components import SequenceLayout
from hooked_lm.hooked_model import HookedModel
from hooked_lm.names import get_act_name
from hooked_lm.patching.path_nodes import Node, as_tuple
from hooked_lm.patching.sites import axes_at, replacement

__all__ = ["PathRuns", "StreamBatch"]

_PROJECTIONS: tuple[tuple[str, Literal["Q", "K", "V"]], ...] = (("q", "Q"), ("k", "K"), ("v", "V"))


@dataclass(frozen=True, eq=False)
class PathRuns:
    """The two runs that path patching starts from.

    Attributes:
        model: the model.
        routes: what may carry the change from senders to receivers.
        tokens, mask: the corrupted prompts and their padding.
        clean: full hook name -> clean activation at the senders.
        corrupted: full hook name -> corrupted activation at the senders, and wherever the first run holds it.
    """

    model: HookedModel
    routes: str
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    clean: dict[str, Tensor]
    corrupted: dict[str, Tensor]


class StreamBatch:
    """The residual streams of several sets of senders, on their way through the layers.

    Args:
        runs: clean and corrupted activations.
        senders: the sets.
    """

    def __init__(self, runs: PathRuns, senders: Sequence[Sequence[Node]]) -> None:
        self.runs, self.model, self.cfg, self.routes = runs, runs.model, runs.model.cfg, runs.routes
        self.senders = senders
        self.first = [min(node.layer or 0 for node in nodes) for nodes in senders]
        self.active: list[int] = []
        self.rows = runs.corrupted[get_act_name("resid_pre", 0)][None][:0]  # [row batch pos d_model]
        self.valid = None if bool(runs.mask.all()) else runs.mask.bool()

    def through_block(self, layer: int, receivers: Sequence[Node]) -> Iterator[tuple[Node, Tensor]]:
        """Run one block; yield each receiver in it, with the activation at its site, [row batch ...].

        Args:
            layer: the block.
            receivers: those in it.
        """
        over = self.model.spread_over
        if over is not None:
            self.rows = self.rows.to(over.blocks[layer])
        self._join(layer)
        if not self.active:
            return
        block = self.model.blocks[layer]
        self.rows = self._sent(self._sent_embeddings(self.rows, layer), "resid_pre", layer)
        resid_pre = self.rows
        layout, shortformer = self._layout()
        read = block.attention_inputs(resid_pre.flatten(0, 1), shortformer)
        yield from self._received(receivers, "resid_pre", resid_pre)
        for (name, which), x in zip(_PROJECTIONS, read, strict=True):
            if any(node.name == name for node in receivers):
                yield from self._received(receivers, name, self._row_by_row(block.attn.project(x, which)))
        gate = block.attn.gate(read[0])
        if gate is not None:
            yield from self._received(receivers, "gate", self._row_by_row(gate))
        attn_out = self._attention(layer, read, gate, layout)
        stream = resid_pre
        if self.cfg.attn_only or not block.parallel:
            stream = self._row_by_row(block.joined(resid_pre.flatten(0, 1), attn_out.flatten(0, 1), block.ln1))
        if not self.cfg.attn_only:
            stream = self._sent(stream, "resid_mid", layer)
            yield from self._received(receivers, "resid_mid", stream)
            yield from self._received(receivers, "mlp_in", stream)
            stream = self._after_mlp(layer, stream, attn_out)
        self.rows = self._sent(stream, "resid_post", layer)
        yield from self._received(receivers, "resid_post", self.rows)
        yield from self._received(receivers, "logits", self.rows)

    def _join(self, layer: int) -> None:
        """Add a row, the corrupted stream, for each set whose first sender is in this block."""
        new = [index for index, first in enumerate(self.first) if first == layer]
        if new:
            self.active += new
            stream = self._base("resid_pre", layer)
            self.rows = torch.cat((self.rows, stream.expand(len(new), *stream.shape)))

    def _attention(
        self, layer: int, read: tuple[Tensor, Tensor, Tensor], gate: Tensor | None, layout: SequenceLayout
    ) -> Tensor:
        """Attention's output in each row: computed anew along "all"; else the corrupted one, but for sending heads."""
        block = self.model.blocks[layer]
        if self.routes == "all":
            q, k, v = block.attn.queries_keys_values(*read, layout)
            z = block.attn.gated(block.attn.attend(q, k, v, layout), gate)
            z = self._sent(self._row_by_row(z), "z", layer)
            attn_out = self._row_by_row(block.ln1_post(block.attn.write(z.flatten(0, 1))))
            return self._sent(attn_out, "attn_out", layer)
        attn_out = self._same_for_all("attn_out", layer)
        sending = [row for row, index in enumerate(self.active) if self._sends(index, "z", layer)]
        if sending:
            z = self._sent(self._same_for_all("z", layer), "z", layer)[sending]
            written = block.ln1_post(block.attn.write(z.flatten(0, 1)))
            rows = torch.tensor(sending, device=z.device)
            attn_out = attn_out.index_copy(0, rows, written.reshape(len(sending), -1, *written.shape[1:]))
        return self._sent(attn_out, "attn_out", layer)

    def _after_mlp(self, layer: int, stream: Tensor, attn_out: Tensor) -> Tensor:
        """The stream after the MLP, which reads `stream`; its output is the corrupted one along "direct"."""
        block = self.model.blocks[layer]
        if self.routes == "direct":
            mlp_out = self._same_for_all("mlp_out", layer)
        else:
            mlp_out = self._row_by_row(block.mlp_output(stream.flatten(0, 1)))
        mlp_out = self._sent(mlp_out, "mlp_out", layer)
        if block.parallel:
            return stream + attn_out + mlp_out
        return self._row_by_row(block.joined(stream.flatten(0, 1), mlp_out.flatten(0, 1), block.ln2))

    def _layout(self) -> tuple[SequenceLayout, Tensor | None]:
        """The layout of all rows; in shortformer models also the positions that are added for queries and keys."""
        n_pos, device = self.rows.shape[2], self.rows.device
        valid = None if self.valid is None else self.valid.repeat(len(self.active), 1)
        layout = SequenceLayout(n_pos, 0, device, None if valid is None else valid.to(device))
        if self.cfg.positional_embedding_type != "shortformer":
            return layout, None
        home = self.model.embed.W_E.device
        like = self.rows[..., 0].flatten(0, 1).to(home)
        return layout, self.model.pos_embed(like, 0, valid).to(device)

    # Rows, senders and receivers

    def _base(self, name: str, layer: int) -> Tensor:
        return self.runs.corrupted[get_act_name(name, layer)].to(self.rows.device)

    def _same_for_all(self, name: str, layer: int) -> Tensor:
        """The corrupted activation, once for each row."""
        base = self._base(name, layer)
        return base.expand(len(self.active), *base.shape)

    def _row_by_row(self, flat: Tensor) -> Tensor:
        return flat.reshape(len(self.active), -1, *flat.shape[1:])

    def _sends(self, index: int, name: str, layer: int | None) -> list[Node]:
        return [node for node in self.senders[index] if (node.name, node.layer) == (name, layer)]

    def _sent(self, rows: Tensor, name: str, layer: int) -> Tensor:
        """Rows of an activation, with the clean values of the senders at this site."""
        site, edited = get_act_name(name, layer), rows
        for row, index in enumerate(self.active):
            for node in self._sends(index, name, layer):
                if edited is rows:
                    edited = rows.clone()
                part = replacement(self.model, site, self.runs.clean[site], pos=node.pos, head=node.head)
                edited[row] = part.apply(edited[row], axes_at(self.model, site))[0]
        return edited

    def _sent_embeddings(self, rows: Tensor, layer: int) -> Tensor:
        """The streams at the start of block 0, plus the change that clean embeddings of senders make."""
        if layer > 0:
            return rows
        edited = rows.clone()
        for name in ("embed", "pos_embed"):
            for row, index in enumerate(self.active):
                for node in self._sends(index, name, None):
                    site = node.site(self.cfg.n_layers)
                    change = self.runs.clean[site].to(rows) - self.runs.corrupted[site].to(rows)
                    positions = list(range(rows.shape[2]) if node.pos is None else as_tuple(node.pos))
                    edited[row, :, positions] += change[:, positions]
        return edited

    @staticmethod
    def _received(receivers: Sequence[Node], name: str, rows: Tensor) -> Iterator[tuple[Node, Tensor]]:
        """Yield each receiver at a site, by its short name, with the activation there."""
        for node in receivers:
            if node.name == name:
                yield node, rows
