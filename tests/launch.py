"""Programs on several ranks: started in subprocesses with a hard limit, and what they check."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


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


def check(program: str, ranks: int, *arguments: str, **options: Any) -> str:
    """Run a program that is to succeed, see :func:`launch`; return what it printed."""
    run = launch(program, ranks, *arguments, **options)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert f"ranks {ranks}" in run.stdout
    return run.stdout


class Checks:
    """Collects what holds and what does not; every rank goes on, so that none waits in vain.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks.
    """

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.number = 0
        self.failures: list[str] = []

    def true(self, condition: Any, *what: Any) -> None:
        """Note whether something holds on this rank. Not collective."""
        self.number += 1
        if not condition:
            self.failures.append(f"rank {self.comm.rank}: " + " ".join(map(str, what)))

    def below(self, value: float, bound: float, *what: Any) -> None:
        """Note whether a value is at most a bound on this rank; NaN is not. Not collective."""
        self.true(value <= bound, *what, f"{value:.3e} > {bound:.3e}")

    def finish(self) -> None:
        """Print how it went, and end the process with 1 if anything failed on any rank."""
        found = [line for lines in self.comm.allgather(self.failures) for line in lines]
        numbers = self.comm.allgather(self.number)
        if self.comm.rank == 0:
            print("\n".join(found[:40]))
            print(f"ranks {self.comm.size} checks {sum(numbers)} failures {len(found)}", flush=True)
        self.comm.Barrier()
        sys.exit(1 if found or not min(numbers) else 0)
