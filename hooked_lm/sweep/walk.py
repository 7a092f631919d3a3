"""SweepWalk: one batched incremental forward for many cells, which computes only activations that can differ.

In a causal model an edit at layer l and position p changes no layer below l and no position before p. So the row of a
cell holds positions p and after, takes the keys and values before p from the base run, and joins the batch at layer l
with the base run's activation, edited.

The rows of all groups are packed into one tensor [1 token ...], so that every matrix is multiplied once per layer; only
attention is done group by group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm.components.positions import QueryScaleSpec, RotarySpec
from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookPoint, without_hooks
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name
from hooked_lm.sweep.plan import Stage, SweepCell

__all__ = ["BaseRun", "SweepWalk", "WalkGroup", "key_site"]


def key_site(cfg: HookedTransformerConfig, layer: int) -> str:
    """Return where a layer's keys are as attention uses them."""
    return get_act_name("rot_k" if cfg.rotates(layer) else "k", layer)


@dataclass
class BaseRun:
    """The run that all cells start from.

    Attributes:
        cache: its activations by name, [batch pos ...].
        layout: lengths, padding and positions of the prompts.
        shortformer_pos: positions that go to queries and keys only, or None.
    """

    cache: dict[str, Tensor]
    layout: SequenceLayout
    shortformer_pos: Tensor | None

    @property
    def batch(self) -> int:
        return next(iter(self.cache.values())).shape[0]

    @property
    def n_positions(self) -> int:
        return self.layout.n_keys


@dataclass
class WalkGroup:
    """The rows of cells that share their first position: cell after cell, each with every prompt.

    Attributes:
        first: the first position they compute.
        start: the first position of the queries; later than `first` once earlier positions are no longer read.
        cells: in the order of the rows.
    """

    first: int
    start: int = 0
    cells: list[SweepCell] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.first


class SweepWalk:
    """A walk with some cells.

    Args:
        model: a `HookedTransformer`.
        base: the run that the cells start from.
        cells: that can be walked.
        last_read: the first position that anything reads of the last layer.
    """

    def __init__(self, model: HookedModel, base: BaseRun, cells: Sequence[SweepCell], last_read: int) -> None:
        self.model, self.base, self.last_read = model, base, last_read
        self.joining: dict[tuple[int, Stage], dict[int, list[SweepCell]]] = {}
        for cell in cells:
            after_block = cell.stage is Stage.END
            key = (cell.layer + 1, Stage.START) if after_block else (cell.layer, cell.stage)
            self.joining.setdefault(key, {}).setdefault(cell.first, []).append(cell)
        self.groups: list[WalkGroup] = [WalkGroup(first) for first in sorted({cell.first for cell in cells})]
        self.edits: dict[str, list[tuple[SweepCell, Intervention]]] = {}
        for cell in cells:
            for one in cell.on_the_way:
                self.edits.setdefault(one.site, []).append((cell, one))
        self.current: WalkGroup | None = None
        self._layouts: dict[tuple[int, int, int], SequenceLayout] = {}

    def run(self, advance: Callable[[], object]) -> list[tuple[WalkGroup, Float[Tensor, "row pos d_model"]]]:
        """Return each group with the final, normalised stream of its rows.

        Args:
            advance: called after every layer.
        """
        with self.model.hooks(fwd_hooks=[(site, self._make) for site in self.edits]):
            stream, over = self._pack([]), self.model.spread_over
            for layer in range(self.model.cfg.n_layers):
                if over is not None:
                    stream = stream.to(over.blocks[layer])
                stream = self._block(layer, self._joined(layer, Stage.START, stream))
                advance()
            if over is not None:
                stream = stream.to(over.home)
            stream = self._joined(self.model.cfg.n_layers, Stage.START, stream)
            return list(zip(self.groups, self._unpack(self.model.ln_final(stream)), strict=True))

    # One block

    def _block(self, layer: int, stream: Tensor) -> Tensor:
        block = self.model.blocks[layer]
        stream, z = self._attention(layer, stream, prune=layer == self.model.cfg.n_layers - 1)
        stream, z = self._joined_z(layer, stream, z)
        if z.shape[1] == 0:
            middle = stream
        else:
            attn_out = block.attention_output(block.attn.write(block.attn.hook_z(z)))
            if block.attn_only or block.parallel:
                return block.after_attention(stream, attn_out)
            middle = block.joined(stream, attn_out, block.ln1)
        if block.attn_only or block.parallel:
            return middle
        middle = self._joined(layer, Stage.MID, middle)
        return middle if middle.shape[1] == 0 else block.after_mid(block.hook_resid_mid(middle))

    def _attention(self, layer: int, stream: Tensor, *, prune: bool) -> tuple[Tensor, Tensor]:
        """Return the stream and z [1 token head d_value] of the rows there are, at the positions that are read."""
        block, attn = self.model.blocks[layer], self.model.blocks[layer].attn
        if stream.shape[1] == 0:
            self._prune(prune)
            return stream, stream.new_zeros(1, 0, self.model.cfg.n_heads, self.model.cfg.value_width)
        resid_pre = block.hook_resid_pre(stream)
        positions = self._packed_positions(stream.device)
        read = block.attention_inputs(resid_pre, positions.shortformer)
        q, k, v = attn.queries_keys_values(*read, positions)
        gate = attn.gate(read[0])
        queries, keys, values = self._unpack(q), self._unpack(k), self._unpack(v)
        gates = [None] * len(self.groups) if gate is None else self._unpack(gate)
        streams = self._unpack(resid_pre)
        skipped = self._prune(prune)
        if any(skipped):
            resid_pre = self._pack([rows[:, skip:] for rows, skip in zip(streams, skipped, strict=True)])
        z = []
        for index, group in enumerate(self.groups):
            q_group = queries[index][:, skipped[index] :]
            if not group.cells:
                z.append(q_group.new_zeros(*q_group.shape[:-1], self.model.cfg.value_width))
                continue
            self.current = group
            k_group = self._with_past(key_site(self.model.cfg, layer), group, keys[index])
            v_group = self._with_past(get_act_name("v", layer), group, values[index])
            gate = gates[index]
            mixed = attn.attend(q_group, k_group, v_group, self._layout(group).on(q_group.device))
            z.append(attn.gated(mixed, None if gate is None else gate[:, skipped[index] :]))
        self.current = None
        return resid_pre, self._pack(z)

    def _prune(self, prune: bool) -> list[int]:
        """Let every group go on with the positions that are read; return how many it leaves behind."""
        skipped = []
        for group in self.groups:
            start = max(group.first, self.last_read) if prune else group.start
            skipped.append(start - group.start)
            group.start = start
        return skipped

    def _with_past(self, name: str, group: WalkGroup, new: Float[Tensor, "row pos kv_head width"]) -> Tensor:
        """Keys or values of every position: those before the group's rows are the base run's."""
        if group.first == 0:
            return new
        whole = new.new_empty(new.shape[0], self.base.n_positions, *new.shape[2:])
        past = self.base.cache[name][:, : group.first]
        whole.unflatten(0, (-1, self.base.batch))[:, :, : group.first] = past
        whole[:, group.first :] = new
        return whole

    def _layout(self, group: WalkGroup) -> SequenceLayout:
        valid = self.base.layout.valid
        n_cells = len(group.cells) if valid is not None else 1
        key = (group.first, group.start, n_cells)
        if key not in self._layouts:
            n_positions = self.base.n_positions
            rows = None if valid is None else valid.repeat(n_cells, 1)
            self._layouts[key] = SequenceLayout(n_positions - group.start, group.start, self.base.layout.device, rows)
        return self._layouts[key]

    def _packed_positions(self, device: torch.device) -> _PackedPositions:
        return _PackedPositions(self.base, [(group.start, len(group.cells)) for group in self.groups], device)

    # Joining

    def _joined(self, layer: int, stage: Stage, stream: Tensor) -> Tensor:
        """Add the rows that join here to the packed stream."""
        joining = self.joining.get((layer, stage))
        if joining is None:
            return stream
        parts = self._unpack(stream)
        for index, group in enumerate(self.groups):
            for cell in joining.get(group.first, []):
                group.cells.append(cell)
                parts[index] = _rows(parts[index], self._entering(cell)[:, group.start :])
        return self._pack(parts)

    def _joined_z(self, layer: int, stream: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        joining = self.joining.get((layer, Stage.Z))
        if joining is None:
            return stream, z
        streams, zs = self._unpack(stream), self._unpack(z)
        for index, group in enumerate(self.groups):
            for cell in joining.get(group.first, []):
                group.cells.append(cell)
                gathered = self._edited(cell, get_act_name("z", layer))
                streams[index] = _rows(streams[index], self._base("resid_pre", layer)[:, group.start :])
                zs[index] = _rows(zs[index], gathered[:, group.start :])
        return self._pack(streams), self._pack(zs)

    def _entering(self, cell: SweepCell) -> Float[Tensor, "batch pos d_model"]:
        """The stream of a cell where it joins at the start of a block, or in its middle, every position of it."""
        layer, site = cell.layer, cell.at_entry[0].site.rpartition("hook_")[2] if cell.at_entry else None
        if cell.stage is Stage.START:
            n_layers = self.model.cfg.n_layers
            name = get_act_name("resid_pre", layer) if layer < n_layers else get_act_name("resid_post", n_layers - 1)
            return self._edited(cell, name)
        block = self.model.blocks[layer]
        if cell.stage is Stage.MID:
            if site == "attn_out":
                attn_out = self._edited(cell, get_act_name("attn_out", layer))
                return block.joined(self._base("resid_pre", layer), attn_out, _hookless(block.ln1))
            return self._edited(cell, get_act_name("resid_mid", layer))
        if site == "resid_post":
            return self._edited(cell, get_act_name("resid_post", layer))
        return self._after_writing(cell, layer, str(site))

    def _after_writing(self, cell: SweepCell, layer: int, site: str) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual after a block whose attention or MLP output is the last edit."""
        block = self.model.blocks[layer]
        written = self._edited(cell, get_act_name(site, layer))
        if block.parallel and not block.attn_only:
            other = self._base("mlp_out" if site == "attn_out" else "attn_out", layer)
            if site == "attn_out":
                other = self._edited_next(cell, get_act_name("mlp_out", layer), other)
            stream = self._base("resid_pre", layer) + written + other
        elif site == "attn_out":
            stream = block.joined(self._base("resid_pre", layer), written, _hookless(block.ln1))
        else:
            stream = block.joined(self._base("resid_mid", layer), written, _hookless(block.ln2))
        return self._edited_next(cell, get_act_name("resid_post", layer), stream)

    def _edited_next(self, cell: SweepCell, name: str, activation: Tensor) -> Tensor:
        """An activation with the cell's edits that would be made on the way, had its rows been in the walk by then."""
        for one in cell.on_the_way:
            if one.site == name:
                activation = self._apply(one, activation, name, 0)
        return activation

    def _base(self, site: str, layer: int) -> Tensor:
        return self.base.cache[get_act_name(site, layer)]

    def _edited(self, cell: SweepCell, name: str) -> Tensor:
        """The base run's activation with the cell's edits that are made at entry."""
        activation = self.base.cache[name]
        for one in cell.at_entry:
            activation = self._apply(one, activation, one.site, 0)
        return activation

    # Edits on the way

    def _apply(self, one: Intervention, x: Tensor, site: str, n_past: int) -> Tensor:
        return one.apply(x, self.model.hook_dict[site].axes, n_past)[0]

    def _make(self, x: Tensor, hook: HookPoint) -> Tensor:
        """The hook at every site that is edited on the way: each edit acts on its cell's rows."""
        site = str(hook.name)
        edits = self.edits[site]
        if self.current is not None:  # hooks on scores and patterns run group by group
            self._edit_rows(edits, x, self.current, site)
            return x
        for group, part in zip(self.groups, self._unpack(x), strict=True):
            self._edit_rows(edits, part, group, site)
        return x

    def _edit_rows(
        self, edits: list[tuple[SweepCell, Intervention]], rows: Tensor, group: WalkGroup, site: str
    ) -> None:
        """Make edits in place on a group's rows [row ...]."""
        batch = self.base.batch
        place = {cell.index: index for index, cell in enumerate(group.cells)}
        for owner, one in edits:
            index = place.get(owner.index)
            if index is not None:
                part = rows[index * batch : (index + 1) * batch]
                part.copy_(self._apply(one, part, site, group.start))

    # Packing

    def _pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of every group, [row pos ...] each, as one tensor [1 token ...]."""
        if not parts:
            like = self._base("resid_post", self.model.cfg.n_layers - 1)
            return like.new_zeros(1, 0, like.shape[-1])
        return torch.cat([part.flatten(0, 1) for part in parts])[None]

    def _unpack(self, packed: Tensor) -> list[Tensor]:
        """Views of each group's rows, [row pos ...]."""
        parts, offset, batch = [], 0, self.base.batch
        for group in self.groups:
            n_pos, n_rows = self.base.n_positions - group.start, batch * len(group.cells)
            part = packed[0, offset : offset + n_rows * n_pos]
            parts.append(part.view(n_rows, n_pos, *part.shape[1:]))
            offset += n_rows * n_pos
        return parts


class _PackedPositions(SequenceLayout):
    """The positions of packed rows: they only serve to rotate queries and keys, and to scale queries."""

    def __init__(self, base: BaseRun, groups: Sequence[tuple[int, int]], device: torch.device) -> None:
        super().__init__(0, 0, device)
        self._batch, self._whole, self._groups = base.batch, base.layout.on(device), groups
        pos = base.shortformer_pos
        self.shortformer = None if pos is None else self._packed(pos.to(device))

    def rotary(self, spec: RotarySpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, [1 token 1 rotary_dim]."""
        cos, sin = self._whole.rotary(spec, dtype)
        return self._packed(cos), self._packed(sin)

    def query_scales(self, spec: QueryScaleSpec, dtype: torch.dtype) -> Tensor:
        """Return the factor on each query, [1 token 1 1]."""
        return self._packed(self._whole.query_scales(spec, dtype))

    def _packed(self, table: Tensor) -> Tensor:
        table = table.expand(self._batch, *table.shape[1:])
        parts = [table[:, start:].repeat(n_cells, *(1,) * (table.ndim - 1)) for start, n_cells in self._groups]
        return torch.cat([part.flatten(0, 1) for part in parts])[None]


def _rows(rows: Tensor, more: Tensor) -> Tensor:
    more = more.to(rows.device)  # a cell whose last edit ends a block may join where the next one is
    return torch.cat((rows, more)) if rows.shape[0] else more


def _hookless(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a norm on the stream that runs without hooks, since hooks act on packed rows only."""

    def normalized(x: Tensor) -> Tensor:
        with without_hooks():
            return norm(x)  # type: ignore[no-any-return]

    return normalized
