"""What mypy makes of a user's program, with pnode installed from a wheel or editable.

Editors follow the same rules: ``py.typed``, and folders that .pth files name.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import sysconfig
import typing
import zipfile
from pathlib import Path

import pytest

import pnode
from pnode import configuration
from pnode.solvers.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
#: Kept beside mypy's own, which takes a quarter of a minute for torch.
CACHE = ROOT / ".mypy_cache"
GROUPS = (pnode.Steps, pnode.LinearAlgebra, pnode.Output)


def environment(folder: Path, kind: str) -> Path:
    """Make an environment with pnode, that finds all else where this Python does."""
    copy = folder / "sources"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "pnode", "solvers",
                 "adjoint", "tools"):  # fmt: skip
        subprocess.run(["cp", "-a", str(ROOT / name), str(copy)], check=True)
    build = f"import setuptools.build_meta as build; build.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Only the packages themselves: its .pth files, of an editable pnode, are not followed again.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin" / "python"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_program_of_a_user(kind: str, tmp_path: Path) -> None:
    python = environment(tmp_path, kind)
    # A copy, far from the sources: mypy must find pnode where it is installed.
    program = tmp_path / "program.py"
    program.write_text((ROOT / "tests" / "program_types.py").read_text())
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)]
    command += ["--cache-dir", str(CACHE / "user"), str(program)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.stdout == "Success: no issues found in 1 source file\n", run.stdout + run.stderr


def test_examples() -> None:
    """What torch's own functions lack in types is torch's: ``Tensor.backward`` has none."""
    examples = sorted((ROOT / "examples").rglob("*.py"))
    command = [sys.executable, "-m", "mypy", "--strict", "--untyped-calls-exclude", "torch"]
    command += ["--follow-imports", "silent", "--cache-dir", str(CACHE / "examples")]
    command += map(str, examples)
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    expected = f"Success: no issues found in {len(examples)} source files\n"
    assert run.stdout == expected, run.stdout + run.stderr


def test_editable_install_shows_nothing_but_pnode() -> None:
    folder = ROOT / "tools" / "editable"
    assert [path.name for path in folder.iterdir()] == ["pnode"]
    assert (folder / "pnode").resolve() == ROOT / "pnode"


def test_names_of_methods() -> None:
    names = typing.get_args(configuration.MethodName)
    assert names == tuple(method.name for method in METHODS)


def test_plain_keywords_are_the_options_of_the_groups() -> None:
    plain = typing.get_type_hints(configuration.PlainOptions)
    grouped = {
        name: kind
        for group in GROUPS
        for name, kind in typing.get_type_hints(group).items()
        if name in {each.name for each in dataclasses.fields(group)}
    }
    assert plain == grouped
