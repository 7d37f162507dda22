"""Run every benchmark of this folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("overhead.py", "stiff.py", "schedule.py", "scaling.py")


def main() -> int:
    """Run the scripts one after the other; the first failure ends the run."""
    for script in SCRIPTS:
        print(f"== {script}", flush=True)
        code = subprocess.call([sys.executable, str(Path(__file__).with_name(script))])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
