"""What the environment says about who started this process, and whether MPI agrees.

An MPI program that a foreign launcher starts N times is N programs of one rank each: nothing
fails, and every sum over ranks is wrong. Launchers leave their count in environment variables.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = [
    "Claim",
    "claims",
    "find_mismatch",
    "gpu_aware",
    "launcher_mismatch",
    "mapped_files",
    "mpi_libraries",
    "torchrun_claim",
]

# Name for messages; variables with the number of processes and with this one's rank.
_LAUNCHERS = (
    ("Open MPI's mpiexec", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("a PMI launcher (MPICH, Intel MPI, Cray, srun --mpi=pmi2)", "PMI_SIZE", "PMI_RANK"),
    ("MVAPICH2's mpirun_rsh", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("Cray PALS", "", "PALS_RANKID"),
    ("a PMIx launcher", "", "PMIX_RANK"),
)
# Counts the processes of this node only: no more than a lower bound.
_NODE = ("Hydra's mpiexec", "MPI_LOCALNRANKS", "MPI_LOCALRANKID")
_SLURM = ("Slurm's srun", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_PROCID")


@dataclass(frozen=True)
class Claim:
    """What a launcher says through the environment.

    Attributes
    ----------
    launcher : str
        Its name.
    size : int or None
        How many processes it started; None if it does not say.
    rank : int or None
        Which of them this one is.
    """

    launcher: str
    size: int | None
    rank: int | None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None


def claims(environment: Mapping[str, str] = os.environ) -> tuple[Claim, ...]:
    """Return the claims of MPI launchers, the innermost first. Not collective.

    Slurm's variables count only inside of a job step (``srun``), and come last: an mpiexec inside
    of a job starts its own daemons with srun.
    """
    found = []
    for launcher, size, rank in (*_LAUNCHERS, _NODE):
        claim = Claim(launcher, _number(environment, size), _number(environment, rank))
        if claim.size is not None or claim.rank is not None:
            found.append(claim)
    launcher, sizes, rank = _SLURM
    if "SLURM_STEP_ID" in environment:
        known = [number for name in sizes if (number := _number(environment, name)) is not None]
        if known:
            found.append(Claim(launcher, known[0], _number(environment, rank)))
    return tuple(found)


def torchrun_claim(environment: Mapping[str, str] = os.environ) -> Claim | None:
    """Return what torchrun says, which starts no MPI ranks; None without it. Not collective."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    return Claim("torchrun", _number(environment, "WORLD_SIZE"), _number(environment, "RANK"))


def find_mismatch(size: int, environment: Mapping[str, str] = os.environ) -> Claim | None:
    """Return the claim that contradicts MPI, or None. Not collective.

    Parameters
    ----------
    size : int
        ``MPI.COMM_WORLD.size``.
    environment : mapping of str to str
        Environment variables.
    """
    found = claims(environment)
    outer = (_NODE[0], _SLURM[0])
    sized = [claim for claim in found if claim.size is not None and claim.launcher not in outer]
    counting = sized or [claim for claim in found if claim.launcher == _SLURM[0]]
    if counting:
        return None if any(claim.size == size for claim in counting) else counting[0]
    more = (claim for claim in found if (claim.size or 0) > size or (claim.rank or 0) >= size)
    return next(more, None)


def launcher_mismatch(size: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """Say that a launcher started several processes of which MPI knows one. Not collective.

    Cheap: a few look-ups in a dictionary, no communication, no import.

    Parameters
    ----------
    size : int
        ``MPI.COMM_WORLD.size``.
    environment : mapping of str to str
        Environment variables.

    Returns
    -------
    str or None
        A sentence with the remedy; None if all is well, or nobody knows better.
    """
    claim = find_mismatch(size, environment) if size == 1 else None
    if claim is None:
        return None
    several = f"{claim.size} processes" if claim.size is not None else "several processes"
    return (
        f"{claim.launcher} started {several}, but MPI sees one rank: each computes alone. "
        "The launcher belongs to another MPI than mpi4py: `python -m pnode doctor` says which"
    )


# ------------------------------------------------------------------------------- loaded libraries

# Whole MPI libraries; not their C++ and Fortran parts, nor helpers such as libmpi_gtl_cuda.
_MPI_LIBRARY = re.compile(r"lib(mpi|mpich|mpi_abi|mpi_(cray|gnu|intel|amd|aocc|nvidia|pgi)\w*)[-.]")


def mapped_files() -> list[str]:
    """Files that are mapped into this process; none where there is no /proc."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    # Address, permissions, offset, device, inode, path (which may contain blanks).
    fields = (line.split(maxsplit=5) for line in lines)
    return sorted({words[5] for words in fields if len(words) == 6 and words[5].startswith("/")})


def mpi_libraries(files: list[str] | None = None) -> list[str]:
    """Return the paths of the MPI libraries among files, by default those loaded here."""
    files = mapped_files() if files is None else files
    return [path for path in files if _MPI_LIBRARY.match(os.path.basename(path))]


@cache
def gpu_aware() -> bool | None:
    """Return whether the MPI library takes device memory; None if it does not say."""
    answers = []
    for path in mpi_libraries():
        library = ctypes.CDLL(path)
        names = ("cuda", "hip", "rocm", "ze")
        functions = [f"MPIX_Query_{name}_support" for name in names]
        answers += [bool(library[name]()) for name in functions if hasattr(library, name)]
    if os.environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1":  # Cray
        answers.append(True)
    return any(answers) if answers else None
