"""Which module of ours imports which, read from the sources."""

import ast
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("export", "engines", "runtime")
"""Folders at the top, which are packages of `vqdeploy`."""


@dataclass(frozen=True)
class Import:
    """One module imports another; `late` inside a function, by its name in a string, or for type checkers only."""

    source: str
    target: str
    line: int
    late: bool


@cache
def modules() -> dict[str, Path]:
    """Name of each module -> its file."""
    files = {}
    for folder in (ROOT / "vqdeploy", *(ROOT / part for part in PARTS)):
        for file in folder.rglob("*.py"):
            names = [*(["vqdeploy"] if folder.name in PARTS else []), *file.relative_to(ROOT).with_suffix("").parts]
            files[".".join(names).removesuffix(".__init__")] = file
    return files


@cache
def imports() -> tuple[Import, ...]:
    """Every import of one module of ours by another."""
    return tuple(found for name, file in modules().items() for found in _imports(name, ast.parse(file.read_text())))


def closure(*names: str) -> set[Path]:
    """Files of the modules that these ones import, directly or not, and their own.

    What merely runs because it is the package of an imported module is left out.
    """
    targets: dict[str, set[str]] = {}
    for found in imports():
        targets.setdefault(found.source, set()).add(found.target)
    seen, new = set(), set(names)
    while new:
        seen |= new
        new = set().union(*(targets.get(name, set()) for name in new)) - seen
    return {modules()[name] for name in seen}


def _imports(source: str, tree: ast.Module) -> list[Import]:
    found = []

    def visit(node: ast.AST, late: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            late = True
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            late = True
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno} is a relative import"
            # `from package import module` imports the module; `from module import name` the module that has it.
            names = [
                module if (module := f"{node.module}.{alias.name}") in modules() else str(node.module)
                for alias in node.names
            ]
        elif isinstance(node, ast.Constant) and node.value != "vqdeploy":  # a name for `import_module`
            names, late = [node.value], True
        found.extend(Import(source, name, node.lineno, late) for name in dict.fromkeys(names) if name in modules())
        for child in ast.iter_child_nodes(node):
            visit(child, late)

    visit(tree, False)
    return found


if __name__ == "__main__":
    for path in sorted(closure(*sys.argv[1:])):
        print(path.relative_to(ROOT))  # noqa: T201
