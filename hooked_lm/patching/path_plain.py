"""The first run of path patching as an ordinary hooked run of the model, one for each set of senders.

Used where components are not stock. The only assumption is that the hook points are called. In every block the outputs
of attention and (along "direct") of the MLP are set to the corrupted run's values at `hook_attn_out` and
`hook_mlp_out`. In the layer of a sending head z is set instead, to the corrupted z with the sender's clean part, and
the attention module computes its output from that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import HookFunction, HookPoint
from hooked_lm.interventions import Intervention
from hooked_lm.names import UnknownHookError, get_act_name
from hooked_lm.patching.path_nodes import Node
from hooked_lm.patching.path_walk import PathRuns
from hooked_lm.patching.sites import axes_at, replacement

__all__ = ["HookedFirstRun", "outputs_of", "replaced_points"]


def replaced_points(model: HookedModel, names: Sequence[str], layers: Sequence[int]) -> dict[str, nn.Module]:
    """Return the modules that stand where blocks have hook points, by full hook name, hook points left out.

    Args:
        model: the model.
        names: short names of sites of the block itself, `"attn_out"`.
        layers: the blocks.

    Raises:
        UnknownHookError: a block has nothing of that name.
    """
    found = {}
    for layer in layers:
        for name in names:
            module = getattr(model.blocks[layer], f"hook_{name}", None)
            if not isinstance(module, nn.Module):
                raise UnknownHookError(f"blocks.{layer} has no hook_{name}, where path patching holds a value")
            if not isinstance(module, HookPoint):
                found[get_act_name(name, layer)] = module
    return found


def outputs_of(model: HookedModel, modules: Mapping[str, nn.Module], tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the outputs of modules in one run.

    Args:
        model: the model.
        modules: by name.
        tokens, mask: the prompts and their padding.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            # Bound as a default: each hook has its own name.
            def record(module: nn.Module, args: object, output: Tensor, name: str = name) -> None:
                found[name] = output.detach().clone()

            handle = module.register_forward_hook(record)
            stack.callback(handle.remove)
        model(tokens, attention_mask=mask, return_type=None)
    return found


class HookedFirstRun:
    """The first run, made by hooks.

    Args:
        runs: clean and corrupted activations.
        last_layer: the last block that has a receiver.
        replaced: the modules that stand in the place of hook points where a value is held.
    """

    def __init__(self, runs: PathRuns, last_layer: int, replaced: Mapping[str, nn.Module]) -> None:
        self.runs, self.model, self.last_layer, self.replaced = runs, runs.model, last_layer, replaced

    def arrivals(self, senders: Sequence[Node], receivers: Sequence[Node]) -> dict[Node, Intervention]:
        """Return for each receiver the intervention that puts in its input from this run.

        Args:
            senders: a set, whose clean values are put in together.
            receivers: the nodes whose inputs are recorded.
        """
        n_layers, recorded = self.model.cfg.n_layers, dict[str, Tensor]()

        def record(x: Tensor, hook: HookPoint) -> None:
            recorded[hook.name] = x.detach()

        sites = list(dict.fromkeys(node.site(n_layers) for node in receivers))
        held = self._held(senders)
        at_points = {site: value for site, value in held.items() if site not in self.replaced}
        fwd_hooks: list[tuple[str, HookFunction]] = [(site, _putting(value)) for site, value in at_points.items()]
        for node in senders:
            site = node.site(n_layers)
            part = replacement(self.model, site, self.runs.clean[site], pos=node.pos, head=node.head)
            fwd_hooks.append((site, _making(part, axes_at(self.model, site))))
        fwd_hooks += [(site, record) for site in sites]
        with _outputs_held({self.replaced[site]: value for site, value in held.items() if site in self.replaced}):
            self.model.run_with_hooks(
                self.runs.tokens, fwd_hooks=fwd_hooks, attention_mask=self.runs.mask, return_type=None
            )
        return {
            node: replacement(self.model, site, recorded[site], pos=node.pos, head=node.head)
            for node in receivers
            for site in (node.site(n_layers),)
        }

    def _held(self, senders: Sequence[Node]) -> dict[str, Tensor]:
        """The corrupted values that are held, by full hook name."""
        names = []
        for layer in range(self.last_layer + 1):
            if self.runs.routes != "all":
                sends_z = any((node.name, node.layer) == ("z", layer) for node in senders)
                names.append(get_act_name("z" if sends_z else "attn_out", layer))
            if self.runs.routes == "direct" and not self.model.cfg.attn_only:
                names.append(get_act_name("mlp_out", layer))
        return {name: self.runs.corrupted[name] for name in names}


def _putting(value: Tensor) -> HookFunction:
    def put(x: Tensor, hook: HookPoint) -> Tensor:
        return value.to(x)

    return put


def _making(part: Intervention, axes: Sequence[str]) -> HookFunction:
    def make(x: Tensor, hook: HookPoint) -> Tensor:
        return part.apply(x, axes)[0]

    return make


@contextmanager
def _outputs_held(values: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Within the block these modules return these values."""
    with ExitStack() as stack:
        for module, value in values.items():
            # Bound as a default: each hook has its own value.
            def hold(module: nn.Module, args: object, output: Tensor, value: Tensor = value) -> Tensor:
                return value.to(output)

            handle = module.register_forward_hook(hold)
            stack.callback(handle.remove)
        yield
