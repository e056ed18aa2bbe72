"""What other packages keep private may change with any of their releases: one file for each package uses it.

These files are named `private_<package>.py`; a test for each says when a release changes what it uses.
"""

import ast
import functools
import importlib
import inspect
import pkgutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import omnimix

ROOT = Path(__file__).parents[1]
FOLDERS = ("backbones", "cli", "interop", "kernels", "modalities", "recipes", "utils")
FILES = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
# Attributes of Python's own with an underscore, which are public: of named tuples, and of os.
PUBLIC = {"_asdict", "_exit", "_replace"}
# Methods and attributes of other packages' classes that classes of ours put their own in the place of. They are what
# these packages' own subclasses override, and nothing calls ours where a base class has them no more.
OVERRIDDEN = {
    "torch": {"_apply", "_load_from_state_dict"},
    "transformers": {
        "_init_weights",
        "_is_stateful",
        "_prepare_cache_for_generation",
        "_set_gradient_checkpointing",
        "_skip_keys_device_placement",
        "_tied_weights_keys",
    },
    "lm_eval": {"_device", "_loglikelihood_tokens"},
}
# What Python and torch themselves add to every subclass.
ADDED = {"_abc_impl", "_backward_cls"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in PUBLIC


def own_names(trees: list[ast.AST]) -> set[str]:
    """Every name that the package gives to something of its own."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
                found.add(node.attr)
    return found


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def foreign(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Private names that a file uses and the package does not define, with the lines."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            names = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
        yield from ((node.lineno, name) for name in names if private(name) and name not in own)


def test_private_names_of_other_packages_stand_in_one_file_for_each():
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
    own = own_names([*trees.values()])
    found = {file: list(foreign(tree, own)) for file, tree in trees.items()}
    behind = {file for file in found if file.name.startswith("private_")}
    elsewhere = [
        f"{file.relative_to(ROOT)}:{line}: {name} is another package's; use it in a file private_<package>.py"
        for file, names in found.items()
        if file not in behind
        for line, name in names
    ]
    assert not elsewhere, "\n".join(elsewhere)
    assert len({file.name for file in behind}) == len(behind) > 4


def test_what_a_file_uses_of_others_is_found():
    source = """
    import torch._dynamo
    from torch.utils import _pytree
    torch._C.peek()
    getattr(model, "_orig_mod", None)
    self._dumped()
    os._exit(self._own)
    """
    found = foreign(ast.parse(textwrap.dedent(source)), {"_own"})
    assert {name for _, name in found} == {"_dynamo", "_pytree", "_C", "_orig_mod", "_dumped"}


@functools.cache
def private_of(kind: type) -> set[str]:
    """The private names that a class defines or sets on itself."""
    try:
        source = inspect.getsource(kind)
    except OSError:  # A class in C, or one made by a function.
        source = ""
    # Packages keep results on classes too, under names that the class's source has not.
    found = {name for name in vars(kind) if private(name) and (not source or name in source)}
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Attribute) and of_self(node) and private(node.attr):
            found.add(node.attr)
    return found - ADDED


@pytest.mark.slow
@pytest.mark.triton
def test_classes_take_no_private_name_of_their_base_classes_but_those_listed():
    """A name that both use by chance would be a fault that is hard to find."""
    for package in OVERRIDDEN:
        pytest.importorskip(package)
    taken: dict[str, set[str]] = {}
    unlisted = []
    for module in pkgutil.walk_packages(omnimix.__path__, "omnimix."):
        if not module.name.startswith(tuple(f"omnimix.{folder}." for folder in FOLDERS)) or "private_" in module.name:
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(kind) or kind.__module__ != module.name:
                continue
            for base in kind.__mro__[1:]:
                package = base.__module__.split(".")[0]
                if package == "omnimix" or package in sys.stdlib_module_names:
                    continue
                common = private_of(kind) & private_of(base)
                taken.setdefault(package, set()).update(common)
                if common - OVERRIDDEN.get(package, set()):
                    unlisted.append(f"{kind.__module__}.{kind.__name__}: {sorted(common)} of {base.__name__}")
    assert not unlisted, "\n".join(unlisted)
    unused = {package: names - taken.get(package, set()) for package, names in OVERRIDDEN.items()}
    gone = {package: sorted(names) for package, names in unused.items() if names}
    assert not gone, f"base classes have these no more, so that nothing calls what overrides them: {gone}"
