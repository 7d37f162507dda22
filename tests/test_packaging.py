"""What is installed, under which names, and which module may import which."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pnode

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"pnode": "pnode", "solvers": "pnode.solvers", "adjoint": "pnode.adjoint"}

# Folders, and modules directly in pnode/ that others may import, in the order of who imports whom:
# a module imports its own level and lower ones. Directly in pnode/ is the top of the house.
LEVELS = {
    "pnode.base": 1,
    "pnode.layout": 2,
    "pnode.problems": 3,
    "pnode.field": 4,
    "pnode.solutions": 4,
    "pnode.solvers": 5,
    "pnode.adjoint": 6,
    "pnode.sweeping": 7,
    "pnode.derivatives": 8,
    "pnode.events": 8,
    "pnode.doctor": 10,
    "pnode.cli": 10,
    "pnode.__main__": 10,
    "pnode.testing": 10,
}
TOP_LEVEL = 9


def source_files() -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the path of every module, links not followed."""
    for folder, package in FOLDERS.items():
        for place, _, names in os.walk(ROOT / folder):
            for name in sorted(names):
                path = Path(place) / name
                if path.suffix == ".py":
                    parts = path.relative_to(ROOT / folder).with_suffix("").parts
                    yield ".".join([package, *parts]).removesuffix(".__init__"), path


MODULES = dict(source_files())


def level(module: str) -> int:
    """Return the level of a module: that of the longest listed name that contains it."""
    if module == "pnode":
        return max(LEVELS.values())
    while module:
        if module in LEVELS:
            return LEVELS[module]
        module = module.rpartition(".")[0]
    return TOP_LEVEL


def imported_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every imported dotted name and its line; ``from a import b`` yields ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the modules of pnode that a file imports, names within a module left off."""
    for name, line in imported_names(tree):
        if name == "pnode" or name.startswith("pnode."):
            while name not in MODULES and "." in name:
                name = name.rpartition(".")[0]
            yield name, line


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


# ------------------------------------------------------------------------------ what is installed


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "sources"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", *FOLDERS):
        # cp -a keeps the links; a copy, since setuptools writes into the folder it builds in.
        subprocess.run(["cp", "-a", str(ROOT / name), str(copy)], check=True)
    build = f"import setuptools.build_meta as build; build.build_wheel({str(folder)!r})"
    command = [sys.executable, "-c", build]
    run = subprocess.run(command, capture_output=True, text=True, cwd=copy, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


def test_only_top_level_name_of_a_wheel_is_pnode(wheel_names: list[str]) -> None:
    names = {name.partition("/")[0] for name in wheel_names}
    assert {name for name in names if not name.endswith(".dist-info")} == {"pnode"}


def test_wheel_has_every_source_file_once(wheel_names: list[str]) -> None:
    found = sorted(name for name in wheel_names if name.endswith(".py"))
    expected = []
    for module, path in MODULES.items():
        name = module.replace(".", "/")
        expected.append(f"{name}/__init__.py" if path.name == "__init__.py" else f"{name}.py")
    assert found == sorted(expected)
    assert any(name.startswith("pnode/solvers/") for name in found)
    assert any(name.startswith("pnode/adjoint/") for name in found)


def test_wheel_says_that_it_is_typed(wheel_names: list[str]) -> None:
    assert "pnode/py.typed" in wheel_names


@pytest.mark.parametrize("name", ["solvers", "adjoint"])
def test_links_are_relative(name: str) -> None:
    link = ROOT / "pnode" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_no_top_level_solvers_or_adjoint(tmp_path: Path) -> None:
    """The installed package is the one here, and leaves the short names free."""
    script = (
        "import sys, pnode.solvers, pnode.adjoint\n"
        "assert not {'solvers', 'adjoint'} & set(sys.modules)\n"
        "print(pnode.__file__)\n"
    )
    (tmp_path / "script.py").write_text(script)
    run = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.splitlines()[0]).resolve() == ROOT / "pnode" / "__init__.py"


# ------------------------------------------------------------------------------- who imports whom


def test_imports_are_absolute_and_under_pnode() -> None:
    wrong = [
        f"{path}:{line}: {name}"
        for path in MODULES.values()
        for name, line in imported_names(parse(path))
        if name.startswith(".") or name.partition(".")[0] in ("solvers", "adjoint")
    ]
    assert len(MODULES) > 100 and not wrong


def test_no_module_imports_a_higher_one() -> None:
    wrong = [
        f"{path}:{line}: {module} imports {name} (a new module: see LEVELS)"
        for module, path in MODULES.items()
        for name, line in imported_modules(parse(path))
        if level(name) > level(module)
    ]
    assert not wrong


@pytest.mark.parametrize("name", ["schedule", "costs", "optimal", "online"])
def test_schedules_import_neither_petsc_nor_torch(name: str) -> None:
    tree = parse(ROOT / "adjoint" / f"{name}.py")
    seen: set[str] = set()
    while True:
        roots = {name.partition(".")[0] for name, _ in imported_names(tree)}
        assert not roots & {"petsc4py", "mpi4py", "torch"}, f"{roots}, through {seen}"
        # Nor through a module that it imports; package files are another matter.
        new = {name for name, _ in imported_modules(tree)} - seen
        new = {name for name in new if MODULES[name].name != "__init__.py"}
        if not new:
            break
        seen |= new
        tree = ast.Module([parse(MODULES[name]) for name in sorted(seen)], [])


# --------------------------------------------------------------------------- who calls autograd

# The trace records vectorfield's calls, and rewrites operations in place (functionalize). The probe
# solves a problem and takes its gradient as a user would.
CALLS_AUTOGRAD = {
    "pnode.field.linearization", "pnode.field.products", "pnode.field.vectorfield",
    "pnode.solvers.compiled.trace", "pnode.testing", "pnode.diagnosis.probe",
    "pnode.field.second_products", "pnode.sensitivities", "pnode.derivatives.tangents",
    "pnode.adjoint.ahead",  # transforms of torch.func
    "pnode.base.transforms", "pnode.field.watching", "pnode.derivatives.linearized",  # tangents?
}  # fmt: skip
# The solve, and with its continuous adjoint, backward sweeps that tell of stages, sums over ranks
# and ghost cells, terms by times, the root of algebraic equations, and the time of an event.
DEFINES_FUNCTION = {
    "pnode.derivatives.autograd", "pnode.derivatives.batches", "pnode.derivatives.continuous",
    "pnode.derivatives.stages", "pnode.base.rank_sums", "pnode.field.consistency",
    "pnode.events.event_derivatives", "pnode.samples", "pnode.layout.ghost_cells",
    "pnode.field.time_terms", "pnode.problems.mass", "pnode.field.rates",
    "pnode.derivatives.row_slopes",
    "pnode.solvers.compiled.entrances",  # takes down calls of the user's
}  # fmt: skip


def dotted(node: ast.AST) -> str:
    """Return ``a.b.c`` for such an expression, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        prefix = dotted(node.value)
        return f"{prefix}.{node.attr}" if prefix else ""
    return ""


def autograd_uses(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield what a file uses of torch.autograd and torch.func, and calls of ``.backward``."""
    inner: set[int] = set()  # parts of a longer dotted name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            inner.add(id(node.value))
            name = dotted(node)
            if id(node) not in inner and name.startswith(("torch.autograd", "torch.func.")):
                yield name, node.lineno
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "backward"
        ):
            yield f"{dotted(node.func.value)}.backward()", node.lineno
    for name, line in imported_names(tree):
        if name.startswith(("torch.autograd", "torch.func.")) or name == "torch.func":
            yield name, line


def test_only_vectorfield_calls_autograd() -> None:
    # sweeps.backward is pnode's own: the sweep that the autograd.Function stands for.
    allowed = ("torch.autograd.Function", "torch.autograd.function", "sweeps.backward()")
    wrong = [
        f"{MODULES[module]}:{line}: {name}"
        for module in sorted(set(MODULES) - CALLS_AUTOGRAD)
        for name, line in autograd_uses(parse(MODULES[module]))
        if not (module in DEFINES_FUNCTION and name.startswith(allowed))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.autograd.grad(y, x)", ["torch.autograd.grad"]),
        ("from torch.func import vjp", ["torch.func.vjp"]),
        ("from torch import func", ["torch.func"]),
        ("import torch.autograd.forward_ad as fw", ["torch.autograd.forward_ad"]),
        ("y.sum().backward()", [".backward()"]),
        ("class F(torch.autograd.Function): ...", ["torch.autograd.Function"]),
        ("import torch\ntorch.functional.norm(x)\nself.backward = 1", []),
    ],
)
def test_the_search_for_autograd_finds(source: str, expected: list[str]) -> None:
    assert [name for name, _ in autograd_uses(ast.parse(source))] == expected


def test_both_conda_environments_have_the_same_packages():
    """Apart from what makes one of them a CUDA build."""

    def packages(name: str) -> set[str]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return {line.split("#")[0].strip(" -") for line in lines if line.lstrip().startswith("- ")}

    plain, cuda = packages("environment.yml"), packages("environment-cuda.yml")
    assert plain - cuda == {"mpich", "petsc=*=real*", "pytorch>=2.4"}
    assert cuda - plain == {
        "cuda-version>=12,<13", "openmpi", "petsc=*=cuda12_real*", "pytorch-gpu>=2.4",
    }  # fmt: skip


def test_all_recipes_ask_for_what_the_package_does():
    """The same packages with the same lowest versions, by the names that each knows them by."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = {
        name.lower().replace("_", "-"): lowest
        for each in [*project["dependencies"], *extras["plot"], *extras["io"]]
        for name, _, lowest in [each.partition(">=")]
    }

    def asked(path: str, pattern: str) -> dict[str, str]:
        found = re.findall(pattern, (ROOT / path).read_text("utf-8"), re.MULTILINE)
        rename = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
        names = {name.lower().replace("_", "-"): lowest for name, lowest in found}
        return {rename.get(name, name): lowest for name, lowest in names.items()}

    conda = asked("packaging/conda-forge/recipe.yaml", r"^ +- ([\w-]+)(?: >=([\d.]+))?$")
    spack = asked("packaging/spack/package.py", r'depends_on\("py-([\w-]+)(?:@([\d.]+):)?"')
    environment = asked("environment.yml", r"^ +- ([\w-]+)(?:>=([\d.]+))?$")
    for found in (conda, spack, environment):
        assert {name: found.get(name) for name in needed} == needed
    recipe = (ROOT / "packaging/conda-forge/recipe.yaml").read_text("utf-8")
    assert f"\n  version: {pnode.__version__}\n" in recipe
    assert f'version("{pnode.__version__}")' in (ROOT / "packaging/spack/package.py").read_text()
