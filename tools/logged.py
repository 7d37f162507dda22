"""Run a long command into a log file and show that it lives."""

import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

INTERVAL = 30.0  # seconds between two lines of progress


def last_lines(path: Path, count: int) -> list[str]:
    with path.open(errors="replace") as stream:
        return [line.rstrip() for line in deque(stream, maxlen=count)]


def run_logged(
    command: Sequence[str], env: Mapping[str, str], log: Path, *, required: bool = True
) -> bool:
    """Run `command` with its output in `log`, a line of progress every 30 s.

    Where it fails, print the end of the log and its path and exit, or return False where the
    command is not `required`. Progress carries the name of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
        )
        while True:
            try:
                status = process.wait(INTERVAL)
                break
            except subprocess.TimeoutExpired:
                line = (last_lines(log, 1) or [""])[0].strip()
                minutes = (time.monotonic() - start) / 60
                print(f"  {log.stem} {minutes:4.1f} min: {line[:80]}", flush=True)
            except KeyboardInterrupt:
                process.terminate()
                process.wait()
                raise
    if status and required:
        print(*last_lines(log, 40), sep="\n", file=sys.stderr)
        sys.exit(f"\nFailed (status {status}): {' '.join(command)}\nWhole output: {log}")
    return status == 0
