"""Run mypy on the package and make sure that it has seen every file, once.

mypy is given the folder ``pnode``; it reaches ``solvers/`` and ``adjoint/`` through the links in
it. If a link were lost, mypy would succeed on what is left: so the files are counted.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def count_sources() -> int:
    """Count the Python files in pnode, solvers and adjoint, links not followed."""
    return sum(
        name.endswith(".py")
        for folder in ("pnode", "solvers", "adjoint")
        for _, _, names in os.walk(ROOT / folder)
        for name in names
    )


def main() -> None:
    command = [sys.executable, "-m", "mypy", "pnode", *sys.argv[1:]]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(run.stdout, end="")
    if run.returncode:
        sys.exit(run.returncode)
    checked = re.search(r"no issues found in (\d+) source file", run.stdout)
    expected = count_sources()
    if checked is None or int(checked.group(1)) != expected:
        sys.exit(f"mypy must check the {expected} files of pnode, solvers and adjoint, each once.")


if __name__ == "__main__":
    main()
