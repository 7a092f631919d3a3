"""Code written for the classic library runs as it is: its import paths, its words, its defaults of loading.

`install()` makes `import transformer_lens` find this library. Without it, every module of the classic library is found
under `hooked_lm.compat`: `from hooked_lm.compat.hook_points import HookPoint`.
"""

from __future__ import annotations

import sys

from hooked_lm.compat.distribution import ClassicDistributionFinder
from hooked_lm.compat.modules import ClassicModule, UnknownNames, find, register_modules
from hooked_lm.config.defaults import CLASSIC, STANDARD, set_defaults

__all__ = ["install", "uninstall"]

_CLASSIC = "transformer_lens"
_finders = (ClassicDistributionFinder(), UnknownNames(_CLASSIC))


def install() -> None:
    """Make `import transformer_lens`, and every module below it, find this library, with the classic defaults.

    Call it before the first `import transformer_lens`. From then on, `from_pretrained` loads in float32, new and loaded
    models go to the GPU if there is one, and a hook that was given by its name and never ran is a warning, no error. A
    second call does nothing.

    Raises:
        RuntimeError: the real `transformer_lens` has been imported.
    """
    there = sys.modules.get(_CLASSIC)
    if isinstance(there, ClassicModule):
        return
    if there is not None:
        raise RuntimeError(
            f"hooked_lm.compat.install() came after the import of {there!r}: call it in a new process, before anything "
            "imports transformer_lens"
        )
    register_modules(_CLASSIC)
    distributions, unknown = _finders
    # The distribution goes before an installed one of the same name; names are unknown if no other finder knows them.
    sys.meta_path.insert(0, distributions)
    sys.meta_path.append(unknown)
    set_defaults(CLASSIC)


def uninstall() -> None:
    """Undo `install`: `import transformer_lens` finds what is installed, and the defaults are this library's.

    Objects that were imported stay as they are.
    """
    if not isinstance(sys.modules.get(_CLASSIC), ClassicModule):
        return
    for name in [name for name, module in sys.modules.items() if name.partition(".")[0] == _CLASSIC]:
        del sys.modules[name]
    for finder in _finders:
        sys.meta_path.remove(finder)
    set_defaults(STANDARD)


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return find(__name__, "", name)


register_modules(__name__)
sys.meta_path.append(UnknownNames(__name__))
