"""HookListing: the hook points of a module by name, and the hooks attached to them."""

from __future__ import annotations

from collections.abc import Iterable

from hooked_lm.hooks.handle import Direction, HookHandle, check_selection
from hooked_lm.hooks.holder import HookHolder
from hooked_lm.hooks.point import HookPoint
from hooked_lm.names import NamesFilter, select_names

__all__ = ["HookListing"]


class HookListing(HookHolder):
    """The listing methods of `HookedRootModule`."""

    hook_dict: dict[str, HookPoint]

    def hook_points(self) -> Iterable[HookPoint]:
        """Return every hook point, in the order of the module tree."""
        return self.hook_dict.values()

    def hook_names(self, names_filter: NamesFilter = None) -> list[str]:
        """Return the names of the hook points that match a filter; all of them by default.

        Args:
            names_filter: a name, a glob, a list of either, or a predicate of names; None for all.

        Raises:
            UnknownHookError: a name or pattern matches nothing.
        """
        return select_names(names_filter, list(self.hook_dict))

    def list_hooks(
        self, name_filter: NamesFilter = None, dir: Direction = "both", including_permanent: bool = True
    ) -> dict[str, list[HookHandle]]:
        """Return the hooks that are attached and act in this thread, by the name of their hook point.

        Hook points without hooks are left out; `hook_names` lists them all.

        Args:
            name_filter: as for `hook_names`.
            dir: `"fwd"`, `"bwd"`, or `"both"` for either.
            including_permanent: list permanent hooks too.

        Raises:
            UnknownHookError: a name or pattern matches nothing.
            ValueError: another direction.
        """
        check_selection(dir)
        attached = {
            name: self.hook_dict[name].attached_hooks(dir, including_permanent) for name in self.hook_names(name_filter)
        }
        return {name: handles for name, handles in attached.items() if handles}
