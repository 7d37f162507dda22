"""Run the tests of tests/mpi on 1, 2 and 3 ranks, and see that each ran on some of these.

Usage: ``run_ranks.py [pytest's arguments]``, by the environment's Python. Each run is
``mpiexec -n N python -m pytest --with-mpi tests/mpi``, with the counters of
``benchmarks/counting.py`` and under a hard limit; a test on one rank needs no other and has a core
to itself (pytest-xdist). Where there are more ranks than cores, those that wait sleep
(``patient_yield.c``).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from counting import beside_python, counting_environment  # noqa: E402

SIZES = (1, 2, 3)
LIMIT = 1200  # seconds, against hangs
# More would take longer to start than they save.
WORKERS = min(4, len(os.sched_getaffinity(0)))


def outcomes(report: Path) -> dict[str, bool]:
    """Whether each test of a report ran, that is, was not skipped."""
    cases = ElementTree.parse(report).iter("testcase")
    return {
        f"{case.get('classname')}::{case.get('name')}": case.find("skipped") is None
        for case in cases
    }


def never_ran(reports: list[Path]) -> list[str]:
    """Tests that were skipped in every report."""
    ran: dict[str, bool] = {}
    for report in reports:
        for name, here in outcomes(report).items():
            ran[name] = ran.get(name, False) or here
    return [name for name, once in ran.items() if not once]


def run(size: int, report: Path, environment: dict[str, str]) -> int:
    """Run the tests on some ranks; return the exit status, 124 if they did not end."""
    print(f"{size} {'ranks' if size > 1 else 'rank'}", flush=True)
    together = [beside_python("mpiexec"), "-n", str(size)] if size > 1 else []
    apart = [] if together else ["-n", str(WORKERS), "--dist", "worksteal"]
    command = [
        *together, sys.executable, "-m", "pytest", "--with-mpi", *apart,
        "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *sys.argv[1:], "tests/mpi",
    ]  # fmt: skip
    # TERM, which mpiexec passes on to the ranks.
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL) as process:
        try:
            return process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            print(f"not over after {LIMIT} s", file=sys.stderr)
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            return 124


def patient(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """Return the environment of ranks that leave their core to others while they wait."""
    library = folder / "patient_yield.so"
    source = Path(__file__).with_name("patient_yield.c")
    command = [beside_python("mpicc"), "-shared", "-fPIC", "-O1", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    preloaded = f"{environment['LD_PRELOAD']} {library}"
    return environment | {"LD_PRELOAD": preloaded, "MPIR_CVAR_POLLS_BEFORE_YIELD": "100"}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # What one rank of one run has compiled serves all; a folder of one's own is taken instead.
        cache = {"PNODE_CACHE_DIR": str(folder / "compiled")}
        environment = cache | counting_environment(folder)
        reports = [folder / f"{size}.xml" for size in SIZES]
        cores = len(os.sched_getaffinity(0))
        for size, report in zip(SIZES, reports, strict=True):
            if size > cores:
                environment = patient(environment, folder)
            status = run(size, report, environment)
            if status:
                return status
        skipped = never_ran(reports)
    if skipped:
        print("Skipped on every number of ranks:", *skipped, sep="\n  ", file=sys.stderr)
    return int(bool(skipped))


if __name__ == "__main__":
    sys.exit(main())
