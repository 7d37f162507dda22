"""What the structure of the sources comes to, counted: sizes, circles of imports, switches.

    python tools/structure.py [FOLDER]

``FOLDER`` is the top of a checkout, this one by default. Prints the figures; exit code 1 if one is
over its limit.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

FOLDERS = {"pnode": "pnode", "solvers": "pnode.solvers", "adjoint": "pnode.adjoint"}
#: Lines of a file, unless it holds data, and of a function without its docstring.
FILE_LINES, FUNCTION_LINES = 400, 60
_DATA = re.compile(r"tableaus|methods|scheme")
# Where the type of PETSc's TS may decide: the table of methods, and what sets PETSc up.
_MAY_ASK = re.compile(r"solvers/(methods\.py|petsc)")
_COMPARED = re.compile(r"ts_type\s*(?:==|!=|in |not in )")


@dataclass(frozen=True)
class Source:
    """A file of the product: its module's name, its path below the top, text and syntax tree."""

    module: str
    path: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        """Number of lines."""
        return self.text.count("\n")


def sources(top: Path) -> list[Source]:
    """Return the Python files of the product, links not followed."""
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((top / folder).rglob("*.py")):
            if not any(place.is_symlink() for place in (path, *path.parents)):
                parts = path.relative_to(top / folder).with_suffix("").parts
                module = ".".join([package, *parts]).removesuffix(".__init__")
                text = path.read_text(encoding="utf-8")
                found.append(Source(module, str(path.relative_to(top)), text, ast.parse(text)))
    return found


def native_files(top: Path) -> dict[str, int]:
    """Return the C++ files of the product by their paths below the top, and their lines."""
    return {
        str(path.relative_to(top)): path.read_text(encoding="utf-8").count("\n")
        for folder in FOLDERS
        for path in sorted((top / folder).rglob("*"))
        if path.suffix in (".cpp", ".h") and not any(place.is_symlink() for place in path.parents)
    }


def long_files(files: list[Source], native: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Yield the path and length of files over the limit, those that hold data left out."""
    for path, lines in ({file.path: file.lines for file in files} | native).items():
        if lines > FILE_LINES and not _DATA.search(path):
            yield path, lines


def long_functions(files: list[Source]) -> Iterator[tuple[str, int]]:
    """Yield name and length, without docstrings, of functions over the limit."""
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = _length(node)
                if ast.get_docstring(node) is not None:
                    length -= _length(node.body[0])
                if length > FUNCTION_LINES:
                    yield f"{file.path}:{node.name}", length


def _length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def imports(files: list[Source]) -> dict[str, set[str]]:
    """Return what each module imports of the others, inside functions and for types, too.

    The package ``pnode`` itself, which shows names of others, does not count.
    """
    known = {file.module for file in files} - {"pnode"}
    graph = {}
    for file in files:
        found: set[str] = set()
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    found.add(name if name in known else node.module)
        graph[file.module] = (found & known) - {file.module}
    return graph


def circle(files: list[Source]) -> list[str]:
    """Return modules that import each other in a circle, empty if there are none."""
    try:
        TopologicalSorter(imports(files)).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def upward_imports(files: list[Source]) -> list[tuple[str, str]]:
    """Return imports from folders of files that lie directly in pnode/: the top of the house.

    ``pnode/diagnosis``, which tries a solve, belongs to the top.
    """
    folders = {file.module for file in files if file.path.endswith("__init__.py")}
    return [
        (module, name)
        for module, names in imports(files).items()
        if module.count(".") > 1 and not module.startswith("pnode.diagnosis.")
        for name in sorted(names - folders)
        if name.count(".") == 1
    ]


def folder_circle(files: list[Source]) -> list[str]:
    """Return folders that import each other in a circle, empty if there are none."""
    graph: dict[str, set[str]] = {}
    for module, names in imports(files).items():
        for name in names:
            one, other = (".".join(each.split(".")[:-1][:2]) for each in (module, name))
            if one != other and not one.startswith("pnode.diagnosis"):
                graph.setdefault(one, set()).add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def switches(files: list[Source]) -> dict[str, int]:
    """Return how often files compare the type of PETSc's TS, where it is not theirs to ask."""
    counts = {file.path: len(_COMPARED.findall(file.text)) for file in files}
    return {path: n for path, n in counts.items() if n and not _MAY_ASK.match(path)}


def main() -> int:
    """Print the figures."""
    top = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    files = sources(top)
    native = native_files(top)
    over = [f"{path}: {n} lines" for path, n in long_files(files, native)]
    over += [f"{name}: {n} lines" for name, n in long_functions(files)]
    over += [f"{path}: {n} comparisons of ts_type" for path, n in switches(files).items()]
    found = circle(files)
    over += [f"circle: {' imports '.join(reversed(found))}"] if found else []
    found = folder_circle(files)
    over += [f"folders in a circle: {' imports '.join(reversed(found))}"] if found else []
    upward = len(upward_imports(files))
    over += [f"{upward} imports of files in pnode/ from below"] if upward else []
    print(*over, sep="\n")
    total = sum(file.lines for file in files)
    print(f"{total} lines of Python, {sum(native.values())} of C++")
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
