"""Imports go down only, from floor to floor, and files of different folders do not import each other in circles."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. What a file imports, within functions too, lies on its own floor or below.
FLOORS = (("errors", "utils"), ("kernels",), ("backbones",), ("modalities",), ("interop",), ("recipes",), ("cli",))
# The face of the package, which only the command may ask for what it knows.
TOP = (("__init__",), ("__main__",))
FOLDERS = [name for names in FLOORS for name in names if name != "errors"]
HEIGHT = {name: height for height, names in enumerate((*FLOORS, *TOP)) for name in names}


def sources() -> dict[str, Path]:
    """Every module of the package, by its name below `omnimix` ("" is the package itself)."""
    found = {}
    for file in [*ROOT.glob("*.py"), *(f for name in HEIGHT for f in ROOT.glob(f"{name}/**/*.py"))]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def nodes(tree: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """Everything in a module; without `typing` not what stands under `if TYPE_CHECKING`, which is never run."""
    for node in ast.iter_child_nodes(tree):
        if typing or not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield node
            yield from nodes(node, typing)


def imports(name: str, tree: ast.AST, package: bool, known: set[str], typing: bool = True) -> Iterator[tuple[int, str]]:
    """The modules of ours that a module imports anywhere, with the lines."""
    folder = name.split(".") if package and name else name.split(".")[:-1]
    for node in nodes(tree, typing):
        if isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            path = [*base, *(node.module or "").split(".")] if node.module else base
            if not node.level:
                if path[0] != "omnimix":
                    continue
                path = path[1:]
            for alias in node.names:
                inner = ".".join([*path, alias.name])
                yield node.lineno, inner if inner in known else ".".join(path)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "omnimix":
                    yield node.lineno, ".".join(alias.name.split(".")[1:])


def graph(files: dict[str, Path], typing: bool = True) -> dict[str, dict[str, int]]:
    """Module -> the modules that it imports, with a line each."""
    edges = {}
    for name, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = imports(name, tree, file.stem == "__init__", set(files), typing)
        edges[name] = {target: line for line, target in found}
    return edges


def height(name: str) -> int:
    return HEIGHT[name.split(".")[0] or "__init__"]


def circles(edges: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Sets of more than one module of which each is reached from each other (Tarjan 1972)."""
    found: list[set[str]] = []
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for target in edges[name]:
            if target not in number:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == number[name]:
            circle = set()
            while name not in circle:
                circle.add(stack.pop())
            if len(circle) > 1:
                found.append(circle)

    for name in edges:
        if name not in number:
            visit(name)
    return found


@pytest.fixture(scope="module")
def files() -> dict[str, Path]:
    return sources()


@pytest.fixture(scope="module")
def run(files) -> dict[str, dict[str, int]]:
    """Without imports for type checkers alone."""
    return graph(files, typing=False)


@pytest.fixture(scope="module")
def edges(files) -> dict[str, dict[str, int]]:
    return graph(files)


def test_every_import_is_of_a_module_that_there_is(files, edges):
    assert len(edges) > 200
    unknown = [(name, target) for name, targets in edges.items() for target in targets if target not in files]
    assert not unknown


def test_imports_go_down_only(files, edges):
    upward = [
        f"{files[name].relative_to(ROOT)}:{line} imports {target or 'omnimix'}"
        for name, targets in edges.items()
        for target, line in targets.items()
        if height(target) > height(name)
    ]
    assert not upward


@pytest.mark.parametrize("floor", FOLDERS)
def test_files_of_different_folders_form_no_circle(floor, files, run):
    """Between floors there can be none, since imports go down."""
    own = {name: [t for t in targets if t.split(".")[0] == floor] for name, targets in run.items()}
    found = circles({name: targets for name, targets in own.items() if name.split(".")[0] == floor})
    across = [sorted(circle) for circle in found if len({files[name].parent for name in circle}) > 1]
    assert not across


def test_a_circle_and_an_import_inside_a_function_are_found():
    source = "def f():\n    from ..cli import shard\n    from .. import kernels\n    import omnimix.recipes.text\n"
    known = {"", "cli", "cli.shard", "kernels", "recipes.text", "utils.files"}
    found = list(imports("utils.files", ast.parse(source), False, known))
    assert found == [(2, "cli.shard"), (3, "kernels"), (4, "recipes.text")]
    assert height("cli.shard") > height("utils.files") and height("kernels.norm") < height("backbones.norm")
    typed = "if TYPE_CHECKING:\n    from . import files\nimport omnimix.kernels\n"
    assert list(imports("utils.cache", ast.parse(typed), False, known, typing=False)) == [(3, "kernels")]
    assert circles({"a": {"b": 1}, "b": {"c": 1}, "c": {"a": 1, "d": 1}, "d": {}}) == [{"a", "b", "c"}]
