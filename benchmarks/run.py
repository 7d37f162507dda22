"""Run every benchmark of this folder but gpu.py; what they write lies in ``results`` in it.

python benchmarks/run.py [--quick]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
#: Scripts, with what makes them quick.
SCRIPTS = {
    "overhead.py": ["--repeats", "3"],
    "peers.py": ["--quick"],
    "stiff.py": ["--quick"],
    "schedule.py": [],
    "memory.py": ["--steps", "10", "30"],
    "growth.py": ["--gradients", "100"],
    "scaling.py": ["--quick"],
    "derivatives.py": ["--quick"],
    "derivative_errors.py": ["--quick"],
    "samples.py": ["--quick"],
    "reaction_diffusion.py": ["--quick"],
}
PLOTS = ("peers.py", "stiff.py", "memory.py", "scaling.py")


def commands(quick: bool) -> list[list[str]]:
    """Return the command line of each script."""
    lines = []
    for script, options in SCRIPTS.items():
        line = [sys.executable, str(FOLDER / script), *(options if quick else [])]
        if script in PLOTS:
            result = FOLDER / "results" / Path(script).stem
            line += ["--json", f"{result}.json", "--plot", f"{result}.png"]
        lines.append(line)
    return lines


def main() -> int:
    """Run the scripts one after the other; the first failure ends the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs")
    quick = parser.parse_args().quick
    (FOLDER / "results").mkdir(exist_ok=True)
    for line in commands(quick):
        print(f"== {Path(line[1]).name}", flush=True)
        code = subprocess.call(line)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
