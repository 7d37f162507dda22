"""tests/slow.txt: what `make test` leaves out is there, and nothing that `make quick` runs."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


@cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_slow_tests():
    names = (HERE / "slow.txt").read_text(encoding="utf-8").splitlines()
    assert names == sorted(set(names))
    for name in names:
        path, _, test = name.partition("[")[0].partition("::")
        assert test.rpartition("::")[2] in functions(HERE.parent / path), name
    quick = (HERE / "quick.txt").read_text(encoding="utf-8").splitlines()
    sharpest = tuple(line for line in quick if line and not line.startswith("#"))
    assert not [name for name in names if name.startswith(sharpest)]


def test_marks(request):
    """Of the tests of this session."""
    names = (HERE / "slow.txt").read_text(encoding="utf-8").splitlines()
    marked = {item.nodeid for item in request.session.items if item.get_closest_marker("slow")}
    assert marked == set(names) & {item.nodeid for item in request.session.items}
