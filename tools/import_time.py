"""CPU seconds of `import pnode`, and how much of that is torch's: the least of several runs.

    python tools/import_time.py [--runs 5]

Compiled bytecode is kept in a folder of its own, and a first run that makes it does not count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

PROGRAM = """
import json, time
start = time.process_time()
import torch
middle = time.process_time()
import pnode
end = time.process_time()
print(json.dumps({"python": start, "torch": middle - start, "pnode": end - middle, "total": end}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": folder, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(runs + 1):
            command = [sys.executable, "-c", PROGRAM]
            run = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            found.append(json.loads(run.stdout))
    least = min(found[1:], key=lambda each: each["total"])
    print(json.dumps({name: round(value, 3) for name, value in least.items()}))


if __name__ == "__main__":
    main()
