"""Gathering the facts of this process.

Nothing of pnode that needs MPI, PETSc or torch is imported at the top: these may be what is broken.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from pnode.base.launchers import claims, gpu_aware, mapped_files, mpi_libraries
from pnode.diagnosis.facts import Facts, MPIFacts, PETScFacts, ScratchFacts, TorchFacts
from pnode.diagnosis.machine_code import compile_a_program

__all__ = ["PACKAGES", "blas_threads", "cpu_quota", "gather", "mpi_libraries", "scratch_facts"]

#: Packages whose versions are reported.
PACKAGES = (
    "mpi4py",
    "petsc",
    "petsc4py",
    "petsctools",
    "torch",
    "numpy",
    "scipy",
    "tqdm",
    "typing_extensions",
)
_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PETSC_DIR", "PETSC_ARCH",
    "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK",
)  # fmt: skip
_PREFIXES = ("OMPI_COMM_", "PMI_", "PMIX_RANK", "MV2_COMM_", "MPI_LOCAL", "PALS_", "SLURM_")
_BLAS_LIBRARY = re.compile(r"lib(scipy_)?(openblas|mkl_rt|blis|blas|flexiblas|nvpl_blas|armpl)")
_BLAS_THREADS = (
    *(
        f"{prefix}openblas_get_num_threads{suffix}"
        for prefix in ("", "scipy_")
        for suffix in ("", "64_", "_64", "_64_")
    ),
    "MKL_Get_Max_Threads",
    "bli_thread_get_num_threads",
)
_GPU_PACKAGES = ("cuda", "hip", "sycl", "kokkos")


def gather(scratch: str | None = None, crash: str = "") -> Facts:
    """Gather the facts of this process. Collective where MPI works.

    Parameters
    ----------
    scratch : str, optional
        Folder for checkpoints to try; by default Python's choice of a temporary folder.
    crash : str
        How another process ended that gathered everything; then nothing is imported here.
    """
    errors: dict[str, str] = {}
    mpiexec = () if claims() else _mpiexec()
    mpi = petsc = torch = None
    loaded: dict[str, str] = {}
    if not crash:
        mpi = _attempt("mpi4py.MPI", _mpi_facts, errors)
        loaded |= dict.fromkeys(mpi_libraries(), "mpi4py")
        petsc = _attempt("petsc4py.PETSc", _petsc_facts, errors)
        loaded = dict.fromkeys(mpi_libraries(), "petsc4py") | loaded
        torch = _attempt("torch", _torch_facts, errors)
    return Facts(
        python=sys.version.split()[0],
        versions=_versions(),
        import_errors=errors,
        crash=crash,
        environment={
            name: value
            for name, value in os.environ.items()
            if name in _VARIABLES or name.startswith(_PREFIXES)
        },
        mpiexec=mpiexec,
        own_mpiexec=shutil.which("mpiexec", path=os.path.join(sys.prefix, "bin")) or "",
        mpi=mpi,
        petsc=petsc,
        torch=torch,
        mpi_libraries=loaded,
        blas=blas_threads(),
        cores=_cores(),
        quota=_own_quota(),
        scratch=scratch_facts(scratch),
        solve=None if errors or crash else _solve(),
        compilation=None if errors or crash else compile_a_program(),
    )


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _attempt(module: str, describe: Any, errors: dict[str, str]) -> Any:
    """Import a module and describe it; on failure put the reason into ``errors``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return describe(importlib.import_module(module))
    except Exception as error:  # whatever a broken installation raises
        errors[module] = _message(error)
        return None


def _mpiexec() -> tuple[str, ...]:
    path = shutil.which("mpiexec")
    if path is None:
        return ()
    try:
        run = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return path, _message(error)
    return path, " ".join((run.stdout or run.stderr).split())[:200]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            loaded = getattr(sys.modules.get(name), "__version__", None)
            if loaded is not None:
                found[name] = str(loaded)
    return found


def blas_threads() -> dict[str, int | None]:
    """Return the loaded BLAS libraries with the number of threads each would use."""
    found: dict[str, int | None] = {}
    for path in mapped_files():
        if _BLAS_LIBRARY.match(os.path.basename(path)):
            library = ctypes.CDLL(path)
            known = [name for name in _BLAS_THREADS if hasattr(library, name)]
            found[path] = library[known[0]]() if known else None
    return found


def _mpi_facts(MPI: Any) -> MPIFacts:
    world = MPI.COMM_WORLD
    levels = {getattr(MPI, f"THREAD_{name}"): name for name in ("SINGLE", "FUNNELED")}
    levels |= {getattr(MPI, f"THREAD_{name}"): name for name in ("SERIALIZED", "MULTIPLE")}
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    first = node.bcast(world.rank)
    node.Free()
    text = MPI.Get_library_version().replace("\0", "")
    return MPIFacts(
        library=" ".join(text.splitlines()[0].partition(",")[0].split()),
        size=world.size,
        rank=world.rank,
        threads=levels.get(MPI.Query_thread(), "unknown"),
        node=first,
        gpu_aware=gpu_aware(),
    )


def _petsc_facts(PETSc: Any) -> PETScFacts:
    import numpy as np
    import petsc4py

    config = petsc4py.get_config()
    folder = os.path.join(config.get("PETSC_DIR", ""), config.get("PETSC_ARCH") or "")
    header = _petscconf(folder)
    known = {"MPICH": "MPICH", "OPENMPI": "Open MPI", "MSMPI": "MS-MPI", "I_MPI": "Intel MPI"}
    return PETScFacts(
        version=tuple(PETSc.Sys.getVersion()),
        scalar=np.dtype(PETSc.ScalarType).name,
        real=np.dtype(PETSc.RealType).name,
        integer=np.dtype(PETSc.IntType).name,
        size=PETSc.COMM_WORLD.size,
        folder=folder.rstrip("/"),
        debug=None if header is None else "PETSC_USE_DEBUG" in header,
        mpi=next((known[name] for name in known if f"PETSC_HAVE_{name}" in (header or ())), ""),
        devices=tuple(name for name in _GPU_PACKAGES if PETSc.Sys.hasExternalPackage(name)),
    )


def _petscconf(folder: str) -> set[str] | None:
    """Names defined in PETSc's petscconf.h, or None where it is not found."""
    places = [Path(folder)]
    try:  # petsc4py may name a folder that is gone; PyPI's petsc knows its own
        places.append(Path(importlib.import_module("petsc").get_petsc_dir()))
    except (ImportError, AttributeError):
        pass
    for place in places:
        header = place / "include" / "petscconf.h"
        if header.is_file():
            text = header.read_text(encoding="utf-8", errors="replace")
            return set(re.findall(r"^#define (\w+)", text, re.M))
    return None


def _torch_facts(torch: Any) -> TorchFacts:
    platform = ""
    if torch.version.cuda:
        platform = f"CUDA {torch.version.cuda}"
    elif getattr(torch.version, "hip", None):
        platform = f"HIP {torch.version.hip}"
    number = torch.cuda.device_count() if platform and torch.cuda.is_available() else 0
    names = tuple(torch.cuda.get_device_name(index) for index in range(number))
    return TorchFacts(torch.get_num_threads(), platform, names)


def _cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _own_quota() -> float | None:
    try:
        membership = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return None
    return cpu_quota(membership, Path("/sys/fs/cgroup"))


def cpu_quota(membership: str, root: Path) -> float | None:
    """Return how many cores' worth of time control groups allow; None for no limit.

    Parameters
    ----------
    membership : str
        What ``/proc/self/cgroup`` says.
    root : Path
        Where control groups are mounted, version 1 or 2.
    """
    limits = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (
            (root / "cpu", root / controllers) if controllers else (root, root / "unified")
        ):
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    limits += _limit(folder)
    return min(limits, default=None)


def _limit(folder: Path) -> list[float]:
    """Return a list with a control group's limit, if it has one."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
    except OSError:
        return []
    return [int(quota) / int(period)] if quota not in ("max", "-1") else []


def scratch_facts(folder: str | None = None) -> ScratchFacts:
    """Try a folder for checkpoints: write, read and remove a file in it. Not collective."""
    given = folder is not None
    try:
        folder = os.path.abspath(folder if folder is not None else tempfile.gettempdir())
        with tempfile.TemporaryDirectory(prefix="pnode-doctor-", dir=folder) as place:
            path = Path(place) / "checkpoint"
            content = os.urandom(2**20)
            path.write_bytes(content)
            if path.read_bytes() != content:
                return ScratchFacts(folder, given, "what was written cannot be read back")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return ScratchFacts(folder or "", given, _message(error), 0)
    return ScratchFacts(folder, given, "", free, _filesystem(folder))


def _filesystem(folder: str) -> str:
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    # Device, mount point (blanks as \040), type: the longest point above it, the last of equals.
    mounts = [(words[1].replace("\\040", " "), words[2]) for words in map(str.split, lines)]
    real = Path(folder).resolve()
    above = [(len(point), kind) for point, kind in mounts if real.is_relative_to(point)]
    return max(reversed(above), key=lambda mount: mount[0], default=(0, ""))[1]


def _solve() -> str:
    """Solve y' = -a y on [0, 1] and compare y(1) and its gradient with the exact ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch

            from pnode.odeint import odeint

            rate = torch.ones((), dtype=torch.float64, requires_grad=True)
            y0 = torch.ones(1, dtype=torch.float64)
            times = torch.tensor([0.0, 1.0], dtype=torch.float64)
            y = odeint(
                lambda t, y: -rate * y, y0, times, method="cn", params=[rate],
                options={"step_size": 0.1},
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(y[-1].sum(), [rate])
    except Exception as error:  # whatever a broken installation raises
        return _message(error)
    # Crank-Nicolson: y(1) = q^10 with q = (1 - a h/2) / (1 + a h/2).
    q, slope = 0.95 / 1.05, -0.05 / 1.05 - 0.05 * 0.95 / 1.05**2
    expected = (q**10, 10 * q**9 * slope)
    found = (y[-1].item(), gradient.item())
    if any(abs(a - b) > 1e-5 * abs(b) for a, b in zip(found, expected, strict=True)):
        return f"y(1), dy(1)/da = {found}, and not {expected}"
    return ""
