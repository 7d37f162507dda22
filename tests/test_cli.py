"""The command ``pnode``, what it tells while it works, and what importing pnode costs."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pnode
from pnode.cli import asked_for_doctor, main
from pnode.listing import listing
from pnode.solvers.methods import METHODS, markdown_table

ROOT = Path(__file__).parents[1]


def decay(t, y):
    return -y


def start(**more):
    return torch.ones(2, dtype=torch.float64, **more)


# -------------------------------------------------------------------------------------- commands


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"pnode {pnode.__version__}\n"
    assert f"## [{pnode.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_version_needs_nothing():
    assert asked_for_doctor(["-m", "--version"], ["python", "-m", "pnode", "--version"])
    program = (
        "import sys; sys.argv = ['/bin/pnode', '--version']; import pnode\n"
        "assert not {'torch', 'petsc4py', 'numpy'} & set(sys.modules)\n"
        "from pnode.cli import main; main()"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.stdout, run.returncode) == (f"pnode {pnode.__version__}\n", 0), run.stderr


def test_bare_command_helps(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("usage: pnode", "doctor", "methods", "--version"))


def test_methods_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(found) == [method.name for method in METHODS]
    assert found["dopri5"] == {
        "name": "dopri5", "aliases": ["5dp", "dormand_prince5", "rk5dp"], "petsc": "rk 5dp",
        "order": 5, "stages": 7, "fsal": True, "kind": "explicit", "adaptive": True,
        "forms": ["rhs"], "adjoint": "stages", "checkpoint": "6 stages", "bits": False,
    }  # fmt: skip


def names(*conditions):
    return {row["name"] for row in json.loads(listing(conditions, as_json=True))}


def test_filters():
    everything = {method.name: method for method in METHODS}

    def those(holds):
        return {name for name, method in everything.items() if holds(method)}

    assert names("kind=imex") == those(lambda m: m.kind == "imex")
    assert names("adaptive=no", "order>=3") == those(lambda m: not m.adaptive and m.order >= 3)
    assert names("forms=residual") == {"beuler", *(f"bdf{i}" for i in range(1, 7)), "bdf"}
    assert names("stages<=1", "order=1") == those(lambda m: m.stages <= 1 and m.order == 1)
    assert names("Dormand") == {"dopri5", "dopri8"}
    assert names("order>=99") == set()
    rows = listing(["kind=imex"], as_json=False).splitlines()
    assert set(rows) <= set(markdown_table().splitlines())
    assert len(rows) == 2 + len(names("kind=imex"))


@pytest.mark.parametrize(
    "condition",
    ["color=red", "order=four", "order>4", "adaptive=perhaps", "kind>=imex", "kind=imlicit",
     "forms=masses", "name=rk5"],
)  # fmt: skip
def test_filters_that_are_none(condition, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["methods", "--filter", condition])
    assert caught.value.code == 2
    assert re.split("[=>]", condition)[0] in capsys.readouterr().err


# --------------------------------------------------------------------------------- logs and bars


def test_log_of_sweeps(caplog):
    with caplog.at_level(logging.DEBUG, "pnode"):
        solution = pnode.Solver(decay, compile=False)(start(requires_grad=True), [0.0, 1.0])
        solution.ys.sum().backward()
    forward, backward = (record.getMessage() for record in caplog.records)
    stats = solution.stats
    assert forward == (
        f"dopri5: forward sweep of {stats.steps} steps ({stats.rejected} rejected), "
        f"{stats.rhs} evaluations, {stats.ram_bytes} bytes of checkpoints"
    )
    assert backward == f"dopri5: backward sweep of {stats.steps} steps (0 repeated)"


def test_quiet_by_default(capfd):
    pnode.Solver(decay)(start(requires_grad=True), [0.0, 1.0]).ys.sum().backward()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["rk4", "bdf2"])
def test_bar_of_a_backward_sweep(method, monkeypatch):
    from pnode.sweeping import monitor

    bars = []

    class Bar(monitor.tqdm):
        def __init__(self, **keywords):
            super().__init__(file=io.StringIO(), mininterval=0, **keywords)
            bars.append(self)

    monkeypatch.setattr(monitor, "tqdm", Bar)
    solver = pnode.Solver(decay, method=method, step_size=0.1, progress=True, checkpointing=500)
    solution = solver(start(requires_grad=True), [0.0, 1.0])
    solution.ys[-1].sum().backward()
    forward, backward = bars
    assert forward.n == pytest.approx(1.0, rel=1e-12)
    assert backward.desc == "backward"
    assert (backward.n, backward.total) == (solution.stats.steps, solution.stats.steps)


def test_compilation_is_told(caplog, tmp_path, monkeypatch):
    """In the log, and on the bar: its beginning and how long it took."""
    from pnode.base.notices import compiling, shown_to

    seen = []
    with caplog.at_level(logging.INFO, "pnode"), shown_to(seen.append), compiling("steps"):
        assert seen == ["compiling steps"]
    assert seen == ["compiling steps", ""]
    first, last = (record.getMessage() for record in caplog.records)
    assert first == "compiling steps" and re.fullmatch(r"compiled steps in \d+\.\d s", last)
    with caplog.at_level(logging.INFO, "pnode"), pytest.raises(ValueError), compiling("nothing"):
        raise ValueError
    assert caplog.records[-1].getMessage().startswith("compiled nothing in ")


# --------------------------------------------------------------------------------------- imports


def test_import_brings_only_what_every_solve_needs():
    """``tools/import_time.py`` measures; here is what used to take the time."""
    program = (
        "import sys, torch; before = set(sys.modules); import pnode\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    packages = {name.partition(".")[0] for name in loaded}
    assert {"pnode", "petsc4py", "mpi4py"} <= packages
    assert not packages & {"matplotlib", "h5py", "xarray", "pandas", "meshio", "sympy", "triton"}
    heavy = ("scipy.optimize", "scipy.sparse", "scipy.linalg", "torch._inductor", "torch._dynamo")
    assert not [name for name in loaded if name.startswith(heavy)]
    assert len(loaded) < 400
