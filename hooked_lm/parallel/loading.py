"""Make a model of which this process has a part: from a whole model, or from a checkpoint, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hooked_lm._support.plain_data import PlainData
from hooked_lm.components.positions import AlibiSpec
from hooked_lm.components.ranks import PointOfRanks, Ranks
from hooked_lm.components.shortcut import make_block
from hooked_lm.hooks import HookPoint
from hooked_lm.parallel.plan import PartOfConfig, axis_of, check_sizes, kv_copies
from hooked_lm.transformer import HookedTransformer
from hooked_lm.weights.placement import ParameterPlacement

__all__ = ["load", "shard"]

_SHARED_AXES = ("head", "kv_head", "d_mlp")


def shard(
    model: HookedTransformer, group: dist.ProcessGroup | None = None, *, device: str | torch.device | None = None
) -> HookedTransformer:
    """Return a model of which this process has a part of the heads and neurons. Every process of the group calls it.

    All processes then run the same code on the same prompts. Hooks see whole activations, which are gathered only where
    something listens; logits, caches and gradients of whole parameters are those of one process. Embeddings, norms and
    the unembedding are whole on every rank.

    Args:
        model: the whole model, the same one in every process. It is left as it is.
        group: of processes; by default all of them.
        device: of the part; by default the model's.

    Raises:
        ValueError: the heads or neurons do not divide, or `torch.distributed` has not been initialised.
    """
    ranks = _ranks(model, group)
    device = model.embed.W_E.device if device is None else torch.device(device)
    weights = {name: _cut(ranks, name, one.detach(), device) for name, one in model.named_parameters()}
    return _built(model, ranks, weights, device)


def load(
    name_or_path: str | Path,
    group: dist.ProcessGroup | None = None,
    *,
    device: str | torch.device = "cpu",
    **options: object,
) -> HookedTransformer:
    """Return a checkpoint's model, of which this process has a part; see `shard`. No process ever holds all of it.

    The checkpoint is read block by block; of each block the rank keeps its part.

    Args:
        name_or_path: as for `HookedTransformer.from_pretrained`.
        group: of processes; by default all of them.
        device: of the part.
        **options: of `from_pretrained`: processing, dtype, tokenizer.

    Raises:
        ValueError: as `shard`, and as `from_pretrained`.
    """
    kept: dict[str, Tensor] = {}

    class Parts(ParameterPlacement):
        """Keeps this rank's part of each parameter that is loaded, and leaves the model without weights."""

        ranks: Ranks

        def _set_parameter(self, name: str, value: Tensor) -> None:
            parameter = self._parameter(name)
            if parameter is not None:
                kept[name] = _cut(self.ranks, name, value.to(parameter.dtype), torch.device(device))

    class Whole(HookedTransformer):
        """A model that stays on the meta device while its weights are read."""

        @classmethod
        def _placement(cls, model: nn.Module, device: str | torch.device) -> ParameterPlacement:
            placement = Parts(model, "cpu")
            placement.ranks = _ranks(model, group)
            return placement

    whole = Whole.from_pretrained(name_or_path, device="cpu", **cast(PlainData, options))
    return _built(whole, _ranks(whole, group), kept, torch.device(device))


def _ranks(model: nn.Module, group: dist.ProcessGroup | None) -> Ranks:
    if not dist.is_initialized():
        raise ValueError(
            "ranks are processes of torch.distributed: call torch.distributed.init_process_group() first, in each of "
            "them, for example by `python -m torch.distributed.run --nproc-per-node 2 script.py`"
        )
    assert isinstance(model, HookedTransformer)
    group = dist.group.WORLD if group is None else group
    assert group is not None
    size, cfg = dist.get_world_size(group), model.cfg
    check_sizes(cfg, size)
    axes = {name: axis_of(name, one.ndim, cfg, size) for name, one in model.named_parameters()}
    shared = {name: axis for name, axis in axes.items() if axis is not None}
    return Ranks(group, dist.get_rank(group), size, kv_copies(cfg, size), shared)


def _cut(ranks: Ranks, name: str, value: Tensor, device: torch.device) -> Tensor:
    """This rank's part of a parameter, in memory of its own."""
    axis = ranks.parameters.get(name)
    part = value if axis is None else ranks.cut(value, axis)
    return part.to(device, copy=True)


def _built(
    whole: HookedTransformer, ranks: Ranks, weights: dict[str, Tensor], device: torch.device
) -> HookedTransformer:
    """A model of the whole one's config, with blocks of this rank's sizes and weights."""
    cfg = whole.cfg.replace(init_weights=False, device=None, tokenizer_name=None)
    with torch.device("meta"):
        model = HookedTransformer(cfg, move_to_device=False)
        part = PartOfConfig.of(model.cfg, ranks.size)
        blocks = [make_block(part, layer) for layer in range(cfg.n_layers)]
        model.blocks = nn.ModuleList(blocks).to(cfg.dtype)  # type: ignore[assignment]
        for block in model.blocks:
            _share(block, ranks, part)
    model.setup()
    model.ranks = ranks
    _place(model, weights)
    _add_up_gradients(model, ranks)
    if whole.tokenizer is not None:
        model.tokenizer = whole.tokenizer
    model.processed, model.origin = whole.processed, whole.origin
    model.cfg.set_unlocked(device=str(device))
    model.train(whole.training)
    return model


def _share(block: nn.Module, ranks: Ranks, part: PartOfConfig) -> None:
    """Tell the components of a block which part of the heads and neurons they have."""
    attn = block.attn
    assert isinstance(attn, nn.Module)
    across = part.qk_norm_across_heads
    if across and part.use_qk_norm:
        # Over all heads: it is computed on whole queries and keys.
        whole = type(attn)(part.whole, layer_id=attn.layer_id)
        attn.q_norm, attn.k_norm = whole.q_norm.to(part.dtype), whole.k_norm.to(part.dtype)
    if attn.alibi is not None:
        first = ranks.rank * part.n_heads
        attn.alibi = AlibiSpec(  # type: ignore[assignment]
            part.whole.n_heads, part.alibi_scale, part.alibi_in_bfloat16, (first, first + part.n_heads)
        )

    def copies_of_keys() -> int:
        return 1 if part.ungroup_grouped_query_attention else ranks.kv_copies

    def one() -> int:
        return 1

    for name, module in block.named_modules():
        if hasattr(type(module), "ranks"):
            module.ranks = ranks
        if not isinstance(module, HookPoint) or (across and name.startswith(("attn.q_norm.", "attn.k_norm."))):
            continue
        for dim, axis in enumerate(module.axes):
            if axis in _SHARED_AXES and not name.startswith("attn.latent"):
                module.shares = PointOfRanks(ranks, dim, copies_of_keys if axis == "kv_head" else one)


def _place(model: HookedTransformer, weights: dict[str, Tensor]) -> None:
    for path, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            given = weights.get(full)
            if given is None or given.shape != old.shape:
                came = "nothing" if given is None else tuple(given.shape)
                raise ValueError(f"{full} has the shape {tuple(old.shape)} on this rank, and {came} came")
            placed = torch.empty_like(old, device=given.device, dtype=given.dtype).copy_(given)
            setattr(module, name, nn.Parameter(placed, requires_grad=old.requires_grad))


def _add_up_gradients(model: HookedTransformer, ranks: Ranks) -> None:
    """Add up the gradients of parameters that several ranks have and each uses for its own heads and neurons only.

    They are the gains of norms of single heads, what an activation function has learned, and copies of keys and values.
    """
    for name, parameter in model.named_parameters():
        axis = ranks.parameters.get(name)
        if not parameter.requires_grad:
            continue
        per_head = name.split(".")[-2] in ("q_norm", "k_norm") and not model.cfg.qk_norm_across_heads
        if axis is None and (per_head or ".act_fn." in name):
            parameter.register_hook(ranks.add_up)
        elif axis is not None and axis.copies > 1:
            parameter.register_hook(lambda grad, copies=axis.copies: _of_copies(ranks, grad, copies))


def _of_copies(ranks: Ranks, grad: Tensor, copies: int) -> Tensor:
    first = ranks.rank // copies * copies
    total: Tensor = sum(ranks.parts_of_all(grad)[first : first + copies], torch.zeros_like(grad))
    return total
