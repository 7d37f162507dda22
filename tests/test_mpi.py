"""Several ranks, each with its own solver: started here, in subprocesses with a hard limit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("program_average_gradient.py")


def mpiexec() -> str:
    """The launcher that belongs to mpi4py's MPI: beside the interpreter, else on the path."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert found, "mpiexec is missing: install mpich into this environment"
    return found


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_with_their_own_batches_average_to_one_gradient(ranks):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        [mpiexec(), "-n", str(ranks), sys.executable, str(PROGRAM)],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"ranks {ranks}" in run.stdout
