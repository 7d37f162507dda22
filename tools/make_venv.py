"""Create the virtual environment and decide which PETSc it gets.

Usage: ``make_venv.py VENV``, run by the Python that the environment is based on.

The choice is written to ``VENV/.stamps/petsc-source``, one of

``base``
    The base Python imports a petsc4py and an mpi4py that will do: the environment sees its
    packages. Where PETSC_DIR is set too, that petsc4py must have been built against it.
``petsc-dir``
    PETSC_DIR is set: petsc4py is built against it.
``pypi``
    PETSc is installed from PyPI.

PETSC_DIR and PETSC_ARCH are kept in files of those names beside it, so that a later call from a
shell without them still means the same PETSc.
"""

import os
import re
import site
import subprocess
import sys
import venv
from pathlib import Path

OLDEST_PETSC = (3, 22)

PROBE = """
import sys
from mpi4py import MPI
import mpi4py, petsc4py
from petsc4py import PETSc
import numpy
if int(mpi4py.__version__.partition(".")[0]) < 4:
    sys.exit("its mpi4py is " + mpi4py.__version__ + ", 4 or newer is needed")
if PETSc.Sys.getVersion() < (3, 22):
    sys.exit("its PETSc is %d.%d.%d, 3.22 or newer is needed" % PETSc.Sys.getVersion())
if PETSc.ScalarType is not numpy.float64:
    sys.exit("its PETSc has scalars of type " + PETSc.ScalarType.__name__ + ", not float64")
print(petsc4py.get_config().get("PETSC_DIR", ""))
"""


def base_petsc(petsc_dir: str) -> bool:
    """Whether the base Python's own petsc4py is to be used."""
    probe = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        reason = (probe.stderr.strip() or "unknown reason").splitlines()[-1]
        if "No module named" not in reason:
            print(f"Not using the petsc4py of {sys.executable}: {reason}")
        return False
    found = probe.stdout.strip()
    if petsc_dir and not (found and os.path.realpath(found) == os.path.realpath(petsc_dir)):
        print(f"Not using the petsc4py of {sys.executable}: built for {found or 'another PETSc'}")
        return False
    return True


def check_petsc_dir(petsc_dir: str, petsc_arch: str) -> None:
    """Stop with a reason where pnode cannot work with this PETSc."""
    root = Path(petsc_dir)
    header = root / "include" / "petscversion.h"
    configurations = (root / petsc_arch / "include" / "petscconf.h", root / "include/petscconf.h")
    configuration = next((path for path in configurations if path.is_file()), None)
    if not header.is_file() or configuration is None:
        sys.exit(
            f"PETSC_DIR={petsc_dir} PETSC_ARCH={petsc_arch}: no built PETSc there "
            "(include/petscversion.h or petscconf.h is missing). Correct them, or unset PETSC_DIR "
            "to install PETSc from PyPI."
        )
    numbers = dict(re.findall(r"#define PETSC_VERSION_(\w+)\s+(\d+)", header.read_text()))
    version = (int(numbers["MAJOR"]), int(numbers["MINOR"]))
    if version < OLDEST_PETSC:
        sys.exit(f"PETSC_DIR={petsc_dir} is PETSc {version[0]}.{version[1]}; 3.22 is the oldest.")
    defined = set(re.findall(r"#define\s+(\w+)", configuration.read_text()))
    if "PETSC_USE_COMPLEX" in defined or "PETSC_USE_REAL_DOUBLE" not in defined:
        sys.exit(f"PETSC_DIR={petsc_dir}: pnode needs a PETSc with real scalars, double precision.")
    if "PETSC_HAVE_MPIUNI" in defined:
        sys.exit(f"PETSC_DIR={petsc_dir}: this PETSc was built without MPI, which pnode needs.")


def show_base_packages(target: Path) -> None:
    """Let the environment at `target` import the packages of the running Python."""
    folders = [folder for folder in site.getsitepackages() if os.path.isdir(folder)]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    # Not venv's system_site_packages: that shows the packages of the Python below a virtual
    # environment, not those of the environment itself.
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    libraries = Path(sys.prefix) / "lib"
    if any(libraries.glob("libmpi.so*")):  # else PyPI's mpi4py looks in the new environment only
        setting = f'"MPI4PY_LIBMPI", {str(libraries)!r}'
        lines.append(f"import os; os.environ.setdefault({setting})\n")
    (target / "lib" / version / "site-packages" / "base_packages.pth").write_text("".join(lines))


def write_mpiexec(target: Path) -> None:
    """Give the environment an mpiexec that runs the one beside the running Python."""
    launcher = Path(sys.prefix) / "bin" / "mpiexec"
    if launcher.exists():
        # A script, no link: Open MPI takes the folder it was called from for its own.
        script = target / "bin" / "mpiexec"
        script.write_text(f'#!/bin/sh\nexec "{launcher}" "$@"\n')
        script.chmod(0o755)


def main() -> None:
    target = Path(sys.argv[1]).resolve()
    if Path(sys.prefix).resolve() == target:  # the environment is active: use what is below it
        base = getattr(sys, "_base_executable", sys.executable)
        os.execv(base, [base, *sys.argv])

    petsc_dir = os.environ.get("PETSC_DIR", "")
    petsc_arch = os.environ.get("PETSC_ARCH", "") if petsc_dir else ""
    if base_petsc(petsc_dir):
        source = "base"
    elif petsc_dir:
        check_petsc_dir(petsc_dir, petsc_arch)
        source = "petsc-dir"
    else:
        source = "pypi"

    venv.EnvBuilder(symlinks=True, with_pip=True).create(target)
    if source == "base":
        show_base_packages(target)
        write_mpiexec(target)
    stamps = target / ".stamps"
    stamps.mkdir(exist_ok=True)
    for name, value in (
        ("petsc-source", source),
        ("PETSC_DIR", petsc_dir),
        ("PETSC_ARCH", petsc_arch),
    ):
        (stamps / name).write_text(value + "\n")


if __name__ == "__main__":
    main()
