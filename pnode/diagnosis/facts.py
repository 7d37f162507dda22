"""What the checks look at: plain data about one process, which another rank or a test can make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Facts", "MPIFacts", "PETScFacts", "ScratchFacts", "TorchFacts"]


@dataclass(frozen=True)
class MPIFacts:
    """MPI as mpi4py sees it.

    Attributes
    ----------
    library : str
        Its name and version as it says.
    size, rank : int
        Of ``MPI.COMM_WORLD``.
    threads : str
        Level of thread support, such as ``"MULTIPLE"``.
    node : int
        Smallest rank on the same node.
    gpu_aware : bool or None
        Whether the library takes device memory; None if it does not say.
    """

    library: str
    size: int
    rank: int
    threads: str = "MULTIPLE"
    node: int = 0
    gpu_aware: bool | None = None


@dataclass(frozen=True)
class PETScFacts:
    """PETSc as petsc4py sees it.

    Attributes
    ----------
    version : tuple of int
        Of the loaded library.
    scalar, real, integer : str
        Names of the NumPy types of PetscScalar, PetscReal, PetscInt.
    size : int
        Of ``PETSc.COMM_WORLD``.
    folder : str
        PETSC_DIR and PETSC_ARCH that petsc4py was built with.
    debug : bool or None
        Whether it is a debug build; None if petscconf.h is not found.
    mpi : str
        MPI that PETSc was configured with, such as ``"MPICH"``; empty if unknown.
    devices : tuple of str
        Device packages it was configured with.
    """

    version: tuple[int, ...]
    scalar: str = "float64"
    real: str = "float64"
    integer: str = "int32"
    size: int = 1
    folder: str = ""
    debug: bool | None = False
    mpi: str = ""
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class TorchFacts:
    """Threads and devices of torch.

    Attributes
    ----------
    threads : int
        ``torch.get_num_threads()``.
    platform : str
        ``"CUDA 12.4"``, ``"HIP 6.0"``, or empty for a build without either.
    devices : tuple of str
        Names of the visible devices.
    """

    threads: int = 1
    platform: str = ""
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScratchFacts:
    """A folder for checkpoints.

    Attributes
    ----------
    folder : str
        Its path.
    given : bool
        Whether the user named it; else it is Python's choice of a temporary folder.
    error : str
        Why it cannot be used; empty if it can.
    free : int
        Bytes left for this user.
    filesystem : str
        Type of its file system, such as ``"ext4"``; empty if unknown.
    """

    folder: str
    given: bool = False
    error: str = ""
    free: int = 2**40
    filesystem: str = ""


@dataclass(frozen=True)
class Facts:
    """Everything that the checks of one process look at.

    Attributes
    ----------
    python : str
        Version of Python.
    versions : mapping of str to str
        Installed packages.
    import_errors : mapping of str to str
        What went wrong for modules that do not import.
    crash : str
        How a process ended that gathered all of this; empty if it did not.
    environment : mapping of str to str
        Variables of launchers, of threads and of PETSc's place.
    mpiexec : tuple of str
        Path and version of the mpiexec on the search path; empty if there is none or a launcher
        is at work already.
    own_mpiexec : str
        Path of the mpiexec beside Python's interpreter; empty if there is none.
    mpi, petsc, torch : MPIFacts, PETScFacts, TorchFacts, optional
        None where the import fails.
    mpi_libraries : mapping of str to str
        Loaded MPI libraries, and the module whose import loaded each.
    blas : mapping of str to int or None
        Loaded BLAS libraries and their threads, None if unknown.
    cores : tuple of int
        Cores that this process may run on.
    quota : float or None
        Cores' worth of time that its control group may use.
    scratch : ScratchFacts, optional
        A folder for checkpoints.
    solve : str or None
        Why a small solve failed; empty if it did not, None if it was not tried.
    compilation : str or None
        Why a small program in C++ was not compiled, kept or loaded; likewise.
    """

    python: str
    versions: Mapping[str, str] = field(default_factory=dict)
    import_errors: Mapping[str, str] = field(default_factory=dict)
    crash: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    mpiexec: tuple[str, ...] = ()
    own_mpiexec: str = ""
    mpi: MPIFacts | None = None
    petsc: PETScFacts | None = None
    torch: TorchFacts | None = None
    mpi_libraries: Mapping[str, str] = field(default_factory=dict)
    blas: Mapping[str, int | None] = field(default_factory=dict)
    cores: tuple[int, ...] = (0,)
    quota: float | None = None
    scratch: ScratchFacts | None = None
    solve: str | None = None
    compilation: str | None = None
