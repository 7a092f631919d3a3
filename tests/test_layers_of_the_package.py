"""The order of the package: imports go to rooms above, files are short, private names stay private."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import hooked_lm
from tests.rooms import ORDER

ROOT = Path(hooked_lm.__file__).parents[1]

RANK = {room: rank for rank, room in enumerate(ORDER)}

FILES = sorted([*(ROOT / "hooked_lm").rglob("*.py"), *(ROOT / "weight_conversion").rglob("*.py")])
MODULES = [path for path in FILES if path != ROOT / "hooked_lm" / "__init__.py"]


def dotted(path: Path) -> str:
    """hooked_lm/components/norm.py -> hooked_lm.components.norm"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """hooked_lm.components.norm -> components; anything in weight_conversion is one room."""
    package, _, rest = module.partition(".")
    return package if package == "weight_conversion" else rest.partition(".")[0] or "__init__"


def imported(node: ast.AST) -> Iterator[str]:
    """The modules, and the names that may be modules, which run-time code under `node` imports from our packages."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        for child in node.orelse:
            yield from imported(child)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.startswith(("hooked_lm", "weight_conversion")))
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        source = node.module or ""
        if source == "hooked_lm":
            yield from (f"hooked_lm.{alias.name}" for alias in node.names)
        elif source.startswith(("hooked_lm.", "weight_conversion")):
            yield source
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def imports_of(path: Path) -> set[str]:
    return set(imported(parsed(path)))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def offenders(paths: list[Path], wrong: Callable[[Path], set[str]]) -> dict[str, set[str]]:
    """Return what is wrong in each of the modules in which something is."""
    found = {dotted(path): wrong(path) for path in paths}
    return {module: names for module, names in found.items() if names}


def above(path: Path) -> set[str]:
    """What a module imports from the rooms that come after its own."""
    here = RANK[room(dotted(path))]
    return {name for name in imports_of(path) if RANK.get(room(name), len(ORDER)) > here}


def test_every_room_has_its_place_in_the_order() -> None:
    assert len(MODULES) > 100
    assert {room(dotted(path)) for path in FILES} == set(RANK)


def test_a_module_imports_only_from_the_rooms_above_it() -> None:
    assert offenders(MODULES, above) == {}


def test_weight_conversion_knows_the_config_and_nothing_of_the_model() -> None:
    conversion = [path for path in MODULES if room(dotted(path)) == "weight_conversion"]
    known = {"hooked_lm.config", "hooked_lm.names"}
    known |= {f"hooked_lm._support.{helper}" for helper in ("files", "reading", "tensor_bytes")}

    def of_the_model(path: Path) -> set[str]:
        return {name for name in imports_of(path) - known if room(name) != "weight_conversion"}

    assert conversion
    assert offenders(conversion, of_the_model) == {}


def test_nothing_imports_the_command_line() -> None:
    ends = ("hooked_lm.cli", "hooked_lm.__main__")
    others = [path for path in FILES if not dotted(path).startswith(ends)]
    assert offenders(others, lambda path: {name for name in imports_of(path) if name.startswith("hooked_lm.cli")}) == {}


def test_transformers_and_plotly_are_not_imported_when_a_module_is() -> None:
    def heavy(path: Path) -> set[str]:
        at_top = parsed(path).body
        sources = {alias.name for node in at_top if isinstance(node, ast.Import) for alias in node.names}
        sources |= {node.module or "" for node in at_top if isinstance(node, ast.ImportFrom)}
        return {source for source in sources if source.partition(".")[0] in {"transformers", "plotly", "pandas"}}

    assert offenders([path for path in FILES if not dotted(path).startswith("hooked_lm.plotting")], heavy) == {}


def names_of_families(tree: ast.AST) -> set[str]:
    """What in a module's code, docstrings apart, asks which architecture a model is of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_types = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"gpt2"}
    architectures = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"original_architecture", "model_type", "architectures"}:
            found.add(node.attr)
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if text in architectures | model_types or text.endswith(("ForCausalLM", "LMHeadModel")):
            found.add(text)
        if isinstance(node, ast.Compare):
            compared = [*node.comparators, node.left]
            found |= {c.value for c in compared if isinstance(c, ast.Constant) and c.value == "gpt2"}
    return found


def test_no_architecture_is_looked_at_outside_weight_conversion() -> None:
    # "gpt2" is also the name of an init mode.
    def families(path: Path) -> set[str]:
        named_so = room(dotted(path)) == "config" or dotted(path) == "hooked_lm.weights.initialization"
        return names_of_families(parsed(path)) - ({"gpt2"} if named_so else set())

    assert offenders([path for path in MODULES if dotted(path).startswith("hooked_lm")], families) == {}


def test_the_search_for_architectures_finds_one() -> None:
    tree = ast.parse("if cfg.original_architecture == 'LlamaForCausalLM' or kind == 'gpt2':\n    pass")
    assert names_of_families(tree) == {"original_architecture", "LlamaForCausalLM", "gpt2"}


def module_level_imports(path: Path) -> set[str]:
    """Return the modules of ours whose code runs when a module is imported, the packages around the module apart."""
    known = {dotted(file) for file in FILES}
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            named = [f"{source}.{alias.name}" for alias in node.names]
            found.update(name if name in known else source for name in named)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parsed(path))
    # Importing a module runs the packages it is in first.
    packages = {name.rsplit(".", depth)[0] for name in found for depth in range(1, name.count(".") + 1)}
    own = {dotted(path).rsplit(".", depth)[0] for depth in range(1, dotted(path).count(".") + 1)}
    return ((found | (packages - own)) & known) - {dotted(path), "hooked_lm"}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {dotted(path): module_level_imports(path) for path in FILES}
    assert sum(map(len, graph.values())) > 500
    # Raises CycleError, which names the modules of the circle.
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> set[str]:
    """Return the private functions, classes, variables and attributes that a module defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if private(name)}


def private_uses(tree: ast.AST) -> set[str]:
    """Return the private names that a module imports, or reads from anything but self, cls or super()."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            if not (isinstance(owner, ast.Name) and owner.id in {"self", "cls", "super"}):
                used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("hooked_lm", "weight_conversion")):
            used |= {alias.name for alias in node.names if private(alias.name)}
    return used - {"_support"}


def test_no_private_name_is_used_in_another_file() -> None:
    defined = {path: private_names(parsed(path)) for path in FILES}
    ours = set().union(*defined.values())

    def foreign(path: Path) -> set[str]:
        return (private_uses(parsed(path)) & ours) - defined[path]

    assert len(ours) > 500
    assert offenders(FILES, foreign) == {}


def test_the_search_for_private_names_finds_them() -> None:
    tree = ast.parse("from hooked_lm.names import _hidden\nmodel._run()\nself._own()\nsuper()._own()\nx.__dict__")
    assert private_uses(tree) == {"_hidden", "_run"}
    assert private_names(ast.parse("def _f(): self._g = 1\n_h = 2\nclass _C: ...")) == {"_f", "_g", "_h", "_C"}


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many lines a function has, its docstring apart."""
    assert function.end_lineno is not None
    first = function.body[0]
    lines = function.end_lineno - function.lineno + 1
    documented = ast.get_docstring(function) is not None
    return lines - (first.end_lineno or first.lineno) + first.lineno - 1 if documented else lines


def test_files_and_functions_can_be_read_at_one_sitting() -> None:
    def too_long(path: Path) -> set[str]:
        functions = [
            node for node in ast.walk(parsed(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        found = {f"{node.name}: {lines_of_code(node)} lines" for node in functions if lines_of_code(node) > 60}
        length = len(path.read_text().splitlines())
        return found | ({f"{length} lines"} if length > 500 else set())

    assert offenders(FILES, too_long) == {}


def test_any_is_an_exception() -> None:
    counted = {}
    for path in FILES:
        lines = [line for line in path.read_text().splitlines() if "import" not in line]
        counted[dotted(path)] = sum(len(re.findall(r"\bAny\b", line)) for line in lines)
    assert sum(counted.values()) < 60, {module: number for module, number in counted.items() if number}
