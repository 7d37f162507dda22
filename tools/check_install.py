"""Make sure that this environment imports the pnode of this folder, and no other."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.chdir("/")  # nothing in the current folder counts
spec = find_spec("pnode")
found = Path(spec.origin) if spec and spec.origin else None
if found is None or found.resolve().parent != ROOT / "pnode":
    sys.exit(
        f"This environment imports pnode from {found}, not from {ROOT / 'pnode'}.\n"
        "If the Python it was made from has a pnode of its own, uninstall that one, or make the\n"
        "environment from another Python: make clean, then make setup PYTHON=…"
    )
