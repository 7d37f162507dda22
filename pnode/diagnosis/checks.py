"""The checks: functions of the facts alone, each of which gives a finding and the remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from pnode.base.launchers import claims, find_mismatch, torchrun_claim
from pnode.diagnosis.facts import Facts
from pnode.diagnosis.finding import Finding
from pnode.diagnosis.machine_code import check_compiled_solves

__all__ = ["CHECKS", "MINIMUM", "check_threads", "plural"]

#: Oldest versions that pnode works with, as in pyproject.toml.
MINIMUM = {
    "petsc4py": "3.22", "mpi4py": "4", "torch": "2.4", "numpy": "1.26", "scipy": "0",
    "petsctools": "2025.3", "tqdm": "0", "typing_extensions": "4.10",
}  # fmt: skip
_FREE_SPACE = 2**30
_SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "ceph", "fuse.sshfs")


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 2.4.0+cu121 is (2, 4, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def check_packages(facts: Facts) -> Finding:
    """Whether everything is installed, new enough, and imports."""
    broken = [f"{name}: {text}" for name, text in facts.import_errors.items()]
    if facts.crash:
        return Finding(
            "packages", "error", facts.crash,
            "try it without the launcher: if that is well, see below"
            if claims(facts.environment)
            else "mpi4py and petsc4py probably load different MPIs: name petsc4py's to PyPI's "
            "mpi4py, `export MPI4PY_LIBMPI=/path/to/libmpi.so.12`, or build both from source with "
            "one mpicc, `MPICC=$(which mpicc) pip install --no-cache-dir --no-binary mpi4py "
            "mpi4py`, then petsc4py (docs/hpc.md)",
        )  # fmt: skip
    if broken:
        return Finding("packages", "error", "; ".join(broken), _import_remedy(" ".join(broken)))
    missing = [name for name in MINIMUM if name not in facts.versions]
    old = [
        f"{name} {facts.versions[name]} is older than {oldest}"
        for name, oldest in MINIMUM.items()
        if name in facts.versions and _numbers(facts.versions[name]) < _numbers(oldest)
    ]
    if missing or old:
        found = "; ".join([*(f"{name} is not installed" for name in missing), *old])
        return Finding("packages", "error", found, "install them as docs/install.md says")
    listed = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return Finding("packages", "ok", f"Python {facts.python}, {listed}")


def _import_remedy(text: str) -> str:
    if "libmpi" in text or "MPI library" in text:
        return (
            "no usable MPI library was found: load the cluster's MPI module, or `pip install "
            "mpich`; mpi4py and petsc4py must use the same one (docs/install.md)"
        )
    if "openblas" in text:
        return "install OpenBLAS: `apt-get install libopenblas0`, or the cluster's module"
    if "No module named" in text:
        return "install what is missing as docs/install.md says; is the right environment active?"
    return "reinstall the package named; see the troubleshooting in docs/install.md"


def check_one_mpi(facts: Facts) -> Finding | None:
    """Whether mpi4py and petsc4py use the same MPI library."""
    if facts.mpi is None:
        return None
    paths = ", ".join(f"{path} ({by})" for path, by in facts.mpi_libraries.items())
    remedy = (
        "two MPIs in one process do not know one another: rebuild mpi4py and petsc4py with one "
        "mpicc and --no-cache-dir (docs/hpc.md), or install both from the same source (all pip, or "
        "all conda)"
    )
    if len(facts.mpi_libraries) > 1:
        return Finding("MPI library", "error", f"several MPI libraries are loaded: {paths}", remedy)
    petsc = facts.petsc
    if petsc is not None and petsc.size != facts.mpi.size:
        found = f"mpi4py sees {facts.mpi.size} ranks, PETSc {petsc.size}"
        return Finding("MPI library", "error", found, remedy)
    if petsc is not None and _differ(petsc.mpi, facts.mpi.library):
        found = f"PETSc was configured with {petsc.mpi}, mpi4py loaded {facts.mpi.library}"
        return Finding("MPI library", "error", found, remedy)
    where = f"{facts.mpi.library}: {paths}" if paths else facts.mpi.library
    if facts.mpi.threads not in ("SERIALIZED", "MULTIPLE"):
        return Finding(
            "MPI library", "note", f"{where}; thread support {facts.mpi.threads}",
            "backward passes may run in a thread of torch's: leave mpi4py.rc.thread_level at "
            "'multiple', and take an MPI that supports it",
        )  # fmt: skip
    return Finding("MPI library", "ok", where)


def _family(text: str) -> str:
    """Return the kind of binary interface, MPICH's or Open MPI's; empty for another."""
    if re.search(r"open ?mpi|open ?rte|open-mpi|prte|spectrum", text, re.I):
        return "Open MPI"
    return "MPICH" if re.search(r"mpich|hydra|intel|mvapich", text, re.I) else ""


def _differ(one: str, other: str) -> bool:
    """Whether two texts name different MPIs, for certain."""
    kinds = {_family(one), _family(other)}
    return len(kinds) == 2 and "" not in kinds


def check_launcher(facts: Facts) -> Finding | None:
    """Whether the launcher and MPI agree about the number of processes."""
    size = 1 if facts.mpi is None else facts.mpi.size
    claim = find_mismatch(size, facts.environment)
    if claim is not None:
        several = f"{claim.size} processes" if claim.size is not None else "several processes"
        found = f"{claim.launcher} started {several}, but MPI sees {size}"
        status, library = "warning", "may use another MPI"
        if facts.mpi is None:
            found = f"{claim.launcher} started {several}, and MPI did not start in this one"
        else:
            library = f"uses {facts.mpi.library}"
        if facts.mpi is not None and size == 1:
            status = "error"
            found += ": each believes it is alone, and nothing is shared between them"
        own = f" (perhaps {facts.own_mpiexec})" if facts.own_mpiexec else ""
        return Finding(
            "launcher", status, found,
            f"mpi4py {library}: start with the mpiexec that belongs to it{own}; under "
            "Slurm choose the interface with `srun --mpi=...` (`srun --mpi=list`); or rebuild "
            "mpi4py and petsc4py for the MPI of the launcher (docs/hpc.md)"
        )  # fmt: skip
    torchrun = torchrun_claim(facts.environment)
    if torchrun is not None and size == 1 and (torchrun.size or 1) > 1:
        return Finding(
            "launcher", "note", f"torchrun started {torchrun.size} processes; MPI sees 1 in each",
            "each has a solver of its own, which is right for data parallelism by "
            "torch.distributed; for what is collective in pnode start with mpiexec",
        )  # fmt: skip
    if size > 1:
        return Finding("launcher", "ok", f"{size} ranks, and the launcher agrees")
    return _check_mpiexec(facts)


def _check_mpiexec(facts: Facts) -> Finding:
    if not facts.mpiexec:
        found = "one process; no mpiexec was looked for, or none is on the search path"
        return Finding("launcher", "ok", found)
    path, text = facts.mpiexec
    other = f" (perhaps {facts.own_mpiexec})" if facts.own_mpiexec not in ("", path) else ""
    if facts.mpi is not None and _differ(text, facts.mpi.library):
        return Finding(
            "launcher", "warning",
            f"{path} is {_family(text)}'s, but mpi4py uses {facts.mpi.library}: it would start "
            "processes that do not see one another",
            f"use the mpiexec of mpi4py's MPI{other}, or put it first on PATH",
        )  # fmt: skip
    return Finding("launcher", "ok", f"one process; {path} would start more")


def check_petsc_versions(facts: Facts) -> Finding | None:
    """Whether petsc4py fits the PETSc library it has loaded, and PETSC_DIR."""
    if facts.petsc is None:
        return None
    library = ".".join(map(str, facts.petsc.version))
    wrapper = facts.versions.get("petsc4py", library)
    if _numbers(wrapper)[:2] != facts.petsc.version[:2]:
        return Finding(
            "PETSc version", "error", f"petsc4py {wrapper} has loaded PETSc {library}",
            f"install the petsc4py of this PETSc: `pip install --no-cache-dir "
            f"--no-build-isolation --no-deps 'petsc4py=={library.rpartition('.')[0]}.*'`",
        )  # fmt: skip
    folder = os.path.normpath(
        os.path.join(
            facts.environment.get("PETSC_DIR", ""), facts.environment.get("PETSC_ARCH", "")
        )
    )
    if facts.environment.get("PETSC_DIR") and folder != os.path.normpath(facts.petsc.folder):
        return Finding(
            "PETSc version", "warning",
            f"PETSC_DIR and PETSC_ARCH say {folder}, petsc4py was built with {facts.petsc.folder}",
            "unset them, or rebuild petsc4py for that PETSc: the variables have no effect here",
        )  # fmt: skip
    return Finding("PETSc version", "ok", f"PETSc {library}, petsc4py {wrapper}")


def check_petsc_types(facts: Facts) -> Finding | None:
    """Whether PETSc's numbers are real and double."""
    petsc = facts.petsc
    if petsc is None:
        return None
    found = f"scalars {petsc.scalar}, indices {petsc.integer}"
    if petsc.scalar != petsc.real:
        return Finding(
            "PETSc types", "error", f"{found}: pnode needs real scalars",
            "install a PETSc configured with --with-scalar-type=real (conda: petsc=*=real*)",
        )  # fmt: skip
    if petsc.real != "float64":
        return Finding(
            "PETSc types", "warning", f"{found}: states are integrated in {petsc.real}",
            "take a PETSc configured with --with-precision=double: tolerances and gradients of "
            "the documentation are out of reach here",
        )  # fmt: skip
    limit = " (up to 2^31 - 1 entries)" if petsc.integer == "int32" else ""
    return Finding("PETSc types", "ok", found + limit)


def check_petsc_build(facts: Facts) -> Finding | None:
    """Whether PETSc is optimised."""
    if facts.petsc is None:
        return None
    if facts.petsc.debug is None:
        found = f"no petscconf.h in {facts.petsc.folder}: debug or optimised build unknown"
        return Finding("PETSc build", "ok", found)
    if facts.petsc.debug:
        return Finding(
            "PETSc build", "warning", "a debug build, several times slower",
            "for production configure PETSc with --with-debugging=0 COPTFLAGS=-O3",
        )  # fmt: skip
    return Finding("PETSc build", "ok", "optimised")


def check_blas(facts: Facts) -> Finding | None:
    """Which BLAS is loaded, and with how many threads."""
    if facts.petsc is None:
        return None
    listed = ", ".join(
        f"{os.path.basename(path)} ({plural(threads, 'thread')})"
        if threads
        else os.path.basename(path)
        for path, threads in facts.blas.items()
    )
    many = max((threads or 1 for threads in facts.blas.values()), default=1)
    if many > 1:
        return Finding(
            "BLAS", "note", listed,
            "PETSc's dense matrices are small here: one thread is usually faster. Set "
            "OPENBLAS_NUM_THREADS=1 (MKL_NUM_THREADS=1) before Python starts",
        )  # fmt: skip
    # Debian's reference BLAS is blas/libblas.so.3, OpenBLAS's copy openblas-pthread/libblas.so.3.
    reference = [path for path in facts.blas if re.search(r"(?<!openblas-pthread)/libblas\.", path)]
    if reference and len(facts.blas) == len(reference):
        return Finding(
            "BLAS", "note", f"{listed}, the reference BLAS",
            "an optimised BLAS such as OpenBLAS is several times faster with dense Jacobians",
        )  # fmt: skip
    return Finding("BLAS", "ok", listed or "linked into PETSc, or not to be seen from here")


def plural(number: int, noun: str) -> str:
    """Return ``1 rank`` or ``2 ranks``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _threads(facts: Facts) -> int:
    """Threads that one rank may run at a time: torch's and BLAS's do not run together."""
    torch = 1 if facts.torch is None else facts.torch.threads
    return max([torch, *(threads or 1 for threads in facts.blas.values())])


def check_threads(node: Sequence[Facts]) -> Finding:
    """Whether the threads of the ranks on one node fit on the cores they may use.

    Parameters
    ----------
    node : sequence of Facts
        Those of all ranks on the node.
    """
    cores = len({core for facts in node for core in facts.cores})
    quota = min((facts.quota for facts in node if facts.quota is not None), default=None)
    usable = cores if quota is None else max(1, min(cores, int(quota)))
    total = sum(map(_threads, node))
    limit = f" ({cores} and a quota of {quota:g})" if usable < cores else ""
    found = (
        f"{plural(len(node), 'rank')} on the node, {plural(total, 'thread')} in all, "
        f"{plural(usable, 'core')}{limit}"
    )
    if len(node) > usable:
        return Finding(
            "threads", "warning", found,
            f"start at most {plural(usable, 'rank')} per node, or ask the scheduler for more "
            "cores; is each rank bound to the same core?",
        )  # fmt: skip
    bound = [facts for facts in node if _threads(facts) > len(facts.cores)]
    if total > usable or bound:
        share = min([max(1, usable // len(node)), *(len(facts.cores) for facts in bound)])
        if bound:
            worst = max(bound, key=_threads)
            found += (
                f"; a rank with {plural(_threads(worst), 'thread')} is bound to "
                f"{plural(len(worst.cores), 'core')}"
            )
        return Finding(
            "threads", "warning", found,
            f"set OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_NUM_THREADS={share} before Python "
            f"starts, or call torch.set_num_threads({share}) (docs/hpc.md)",
        )  # fmt: skip
    return Finding("threads", "ok", found)


def check_gpu(facts: Facts) -> Finding | None:
    """Whether torch, PETSc and MPI agree about devices."""
    torch, petsc = facts.torch, facts.petsc
    if torch is None or petsc is None:
        return None
    built = torch.platform or "the CPU only"
    aware = {None: "MPI does not say", True: "MPI takes it", False: "MPI does not take it"}
    found = (
        f"torch is built for {built}, {', '.join(torch.devices) or 'no device visible'}; "
        f"PETSc has {', '.join(petsc.devices) or 'no device support'}; device memory: "
        f"{aware[facts.mpi.gpu_aware if facts.mpi else None]}"
    )
    kind = torch.platform.partition(" ")[0].lower()
    if not torch.devices:
        if torch.platform:
            remedy = "if there should be one: look at nvidia-smi (rocm-smi) and *_VISIBLE_DEVICES"
            return Finding("GPU", "note", found, remedy)
        return Finding("GPU", "ok", found)
    if not petsc.devices:
        return Finding(
            "GPU", "note", found,
            "f may compute on the device, with device_state='host'; for states there, build PETSc "
            f"and petsc4py with --with-{kind} (docs/gpu.md)",
        )  # fmt: skip
    if kind not in petsc.devices:
        remedy = f"build PETSc with --with-{kind}, or take the torch for {petsc.devices[0]}"
        return Finding("GPU", "warning", found, remedy)
    if facts.mpi is not None and facts.mpi.size > 1 and not facts.mpi.gpu_aware:
        return Finding(
            "GPU", "warning", found,
            "states on the device are sent through the host, as with -use_gpu_aware_mpi 0: for "
            "the direct way take an MPI built for the device (Cray: MPICH_GPU_SUPPORT_ENABLED=1)",
        )  # fmt: skip
    return Finding("GPU", "ok", found)


def check_scratch(facts: Facts) -> Finding | None:
    """Whether checkpoints can go to the scratch folder."""
    scratch = facts.scratch
    if scratch is None:
        return None
    where = f"{scratch.folder or 'no temporary folder'}"
    if scratch.error:
        return Finding(
            "scratch", "error" if scratch.given else "warning", f"{where}: {scratch.error}",
            "name an existing folder that you may write to: `python -m pnode doctor --scratch "
            "FOLDER`, and the same in Checkpointing(disk=FOLDER)",
        )  # fmt: skip
    found = f"{where} ({scratch.filesystem or 'file system unknown'})"
    if scratch.free < _FREE_SPACE:
        left = f"{found}, {scratch.free / 2**20:.0f} MiB free"
        return Finding("scratch", "warning", left, "free space, or name another with --scratch")
    if scratch.filesystem in ("tmpfs", "ramfs"):
        remedy = "files there take memory: name a folder on a disk for Checkpointing(disk=...)"
        return Finding("scratch", "note", found, remedy)
    if scratch.filesystem in _SHARED:
        remedy = "shared between nodes, and slow with many ranks: prefer the node's own disk"
        return Finding("scratch", "note", found, remedy)
    return Finding("scratch", "ok", found)


def check_solve(facts: Facts) -> Finding | None:
    """Whether a small solve and its gradient are right."""
    if facts.solve is None:
        return None
    if facts.solve:
        return Finding(
            "a small solve", "error", facts.solve,
            "resolve what is found above first; else report it with this output",
        )  # fmt: skip
    return Finding("a small solve", "ok", "y' = -a y with Crank-Nicolson: solution and gradient")


#: Checks of one process, in the order of the report; that of the threads looks at a whole node.
CHECKS: tuple[Callable[[Facts], Finding | None], ...] = (
    check_packages,
    check_one_mpi,
    check_launcher,
    check_petsc_versions,
    check_petsc_types,
    check_petsc_build,
    check_blas,
    check_gpu,
    check_scratch,
    check_solve,
    check_compiled_solves,
)
