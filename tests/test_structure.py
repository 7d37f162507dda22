"""The structure of the sources: no circles of imports, no file or function too long to be read.

What is over a limit is listed here. The lists may only become shorter: what is no longer over has
to go from them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def structure():
    """Return the tool that counts."""
    return tool("structure")


@pytest.mark.parametrize("method", ["rk4", "cn", "es325", "rodaspr", "bdf", "radau5"])
def test_f_is_reached_through_few_rooms(method):
    """Values, and the way to an assembled Jacobian, which is the longest."""
    found = tool("rooms").ways(method)
    assert all(0 < len(way) <= 5 for way in found["forward"] if way), found
    assert all(len(way) <= 6 for way in found["backward"]), found
    assert any(found["forward"])


def test_long_files(structure):
    native = structure.native_files(ROOT)
    assert {path.rpartition(".")[2] for path in native} == {"cpp", "h"}
    found = structure.long_files(structure.sources(ROOT), native)
    assert {path for path, _ in found} == LONG_FILES


def test_long_functions(structure):
    found = structure.long_functions(structure.sources(ROOT))
    assert {name for name, _ in found} == LONG_FUNCTIONS


def test_circles(structure):
    assert structure.circle(structure.sources(ROOT)) == []


def test_arrows_between_folders_point_down(structure):
    files = structure.sources(ROOT)
    assert structure.upward_imports(files) == []
    assert structure.folder_circle(files) == []


def test_upward_imports_are_found(structure, tmp_path):
    for name in ("pnode/base", "pnode/field"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "pnode" / "top.py").write_text("from pnode.base import a\n")
    (tmp_path / "pnode" / "base" / "a.py").write_text("from pnode import top\n")
    files = structure.sources(tmp_path)
    assert structure.upward_imports(files) == [("pnode.base.a", "pnode.top")]
    assert set(structure.folder_circle(files)) == {"pnode", "pnode.base"}
    (tmp_path / "pnode" / "base" / "a.py").write_text("from pnode.field import b\n")
    (tmp_path / "pnode" / "field" / "b.py").write_text("def f():\n    from pnode.base import a\n")
    files = structure.sources(tmp_path)
    assert structure.upward_imports(files) == []
    assert set(structure.folder_circle(files)) == {"pnode.base", "pnode.field"}


def test_switches(structure):
    """What a method is, others ask its properties: its type of TS is PETSc's name."""
    assert structure.switches(structure.sources(ROOT)) == {}


@pytest.mark.parametrize("how", ["import pnode.b", "from pnode import b", "from pnode.b import f"])
def test_circles_are_found(structure, how, tmp_path):
    (tmp_path / "pnode").mkdir()
    (tmp_path / "pnode" / "a.py").write_text(f"def f():\n    {how}\n")
    (tmp_path / "pnode" / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pnode.a import f\n"
    )
    assert set(structure.circle(structure.sources(tmp_path))) == {"pnode.a", "pnode.b"}
    (tmp_path / "pnode" / "b.py").write_text("")
    assert structure.circle(structure.sources(tmp_path)) == []


def test_lengths_are_found(structure, tmp_path):
    (tmp_path / "solvers").mkdir()
    body = "    x = 1\n"
    text = 'def f():\n    """One.\n\n    Two.\n    """\n' + 59 * body + "\n\ndef g():\n" + 60 * body
    (tmp_path / "solvers" / "a.py").write_text(text + 300 * "\n")
    files = structure.sources(tmp_path)
    assert list(structure.long_functions(files)) == [("solvers/a.py:g", 61)]
    (tmp_path / "solvers" / "b.h").write_text(401 * "\n")
    found = list(structure.long_files(files, structure.native_files(tmp_path)))
    assert found == [("solvers/a.py", files[0].lines), ("solvers/b.h", 401)]
