"""tools/run_ranks.py: a test that was skipped on every number of ranks is found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "run_ranks.py"


@pytest.fixture(scope="module")
def run_ranks():
    spec = importlib.util.spec_from_file_location("run_ranks", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("second", "expected"), [("<skipped/>", ["m::a"]), ("", [])])
def test_what_never_ran(run_ranks, second, expected, tmp_path):
    reports = []
    for number, inner in enumerate(["<skipped/>", second]):
        reports.append(tmp_path / f"{number}.xml")
        reports[-1].write_text(
            "<testsuites><testsuite>"
            f'<testcase classname="m" name="a">{inner}</testcase>'
            f'<testcase classname="m" name="b">{"" if number else "<skipped/>"}</testcase>'
            "</testsuite></testsuites>"
        )
    assert run_ranks.never_ran(reports) == expected


def test_ranks_that_do_not_end_are_ended(run_ranks, monkeypatch, tmp_path, capfd):
    """The command is replaced: ranks that wait for ever, without MPI."""
    monkeypatch.setattr(run_ranks, "LIMIT", 0.5)
    waiting = tmp_path / "mpiexec"
    waiting.write_text("#!/bin/sh\nexec sleep 600\n")
    waiting.chmod(0o700)
    monkeypatch.setattr(run_ranks, "beside_python", lambda name: str(waiting))
    monkeypatch.setattr(run_ranks.sys, "argv", ["run_ranks.py"])
    assert run_ranks.run(2, tmp_path / "none.xml", {}) == 124
    assert "not over after 0.5 s" in capfd.readouterr().err
