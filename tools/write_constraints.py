"""Write the version pins that hold in this environment.

Usage: ``write_constraints.py constraints.txt TARGET``, run by the environment's Python.

Left out are packages that the environment sees but does not contain (those of the base Python or
of PYTHONPATH), and those for PETSc where it does not come from PyPI.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def given_packages() -> set[str]:
    """Names of the packages that lie outside the environment."""
    inside = Path(sys.prefix).resolve()
    given = set()
    for distribution in distributions():
        place = Path(str(distribution.locate_file(""))).resolve()
        name = distribution.metadata["Name"]
        if name and inside not in (place, *place.parents):
            given.add(normalized(name))
    return given


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    left_out = given_packages()
    if (Path(sys.prefix) / ".stamps" / "petsc-source").read_text().strip() != "pypi":
        left_out |= {"petsc", "petsc4py", "mpich", "cython"}
    kept = []
    for line in source.read_text().splitlines():
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name and normalized(name.group()) not in left_out:
            kept.append(line)
    target.write_text("\n".join(kept) + "\n")


if __name__ == "__main__":
    main()
