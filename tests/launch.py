"""Programs on several ranks, in subprocesses with a hard limit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def mpiexec() -> str:
    """The launcher that belongs to mpi4py's MPI: beside the interpreter, else on the path."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert found, "mpiexec is missing: install mpich into this environment"
    return found


def launch(
    program: str,
    ranks: int,
    *arguments: str,
    limit: float = 120.0,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder on some ranks.

    An exception on one rank ends the job (``-m mpi4py``); subprocess.TimeoutExpired if the job is
    not over within ``limit`` seconds.
    """
    path = Path(__file__).with_name(program)
    environment = dict(os.environ) if environment is None else environment
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [mpiexec(), "-n", str(ranks), sys.executable, "-m", "mpi4py", str(path), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=limit, env=environment, check=False
    )
