"""`python -m hooked_lm.compat SCRIPT [arguments]` runs a script for the classic library; `-m MODULE` runs a module."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from hooked_lm.compat import install

_USAGE = """usage: python -m hooked_lm.compat SCRIPT [arguments]
       python -m hooked_lm.compat -m MODULE [arguments]

Run a script or module in which `import transformer_lens` finds hooked_lm."""


def main(arguments: list[str]) -> None:
    """Run a script or a module as `python` does, after `install()`.

    Args:
        arguments: of the command line: the script or `-m` and the module, and then what it gets in `sys.argv`.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        sys.stdout.write(_USAGE + "\n")
        return
    if not arguments or arguments == ["-m"]:
        sys.exit(_USAGE)
    install()
    if arguments[0] == "-m":
        # `runpy` puts the module's file in place of its name.
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    script = Path(arguments[0])
    if script.is_file() and not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
