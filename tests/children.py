"""Programs in processes of their own that need not import torch again.

One process a session (with xdist: a worker) has imported torch, and nothing that starts MPI or
PETSc; it forks for each program. A program finds what it would find in a new interpreter: its
arguments, environment, folder and signals, PETSc not yet started, an exit that runs all handlers.
What Python or the allocator read before they start (PYTHONMALLOC) takes a process of its own to
fork from, ``started_with``; Python's options (-W) take a real interpreter.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path


@cache
def _server(*started_with: tuple[str, str]) -> subprocess.Popen[str]:
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | threads | dict(started_with),
    )  # fmt: skip
    atexit.register(server.communicate)  # it ends with its input
    return server


def run_program(
    path: Path, arguments: Sequence[str] = (), env: Mapping[str, str] = os.environ,
    timeout: float = 120.0, started_with: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a Python program, as ``subprocess.run`` would; ``started_with`` adds to ``env``."""
    started_with = started_with or {}
    server = _server(*sorted(started_with.items()))
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        job = {
            "argv": [str(path), *arguments], "env": {**env, **started_with}, "cwd": os.getcwd(),
            "outputs": outputs, "timeout": timeout,
        }  # fmt: skip
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = json.loads(server.stdout.readline())
        out, err = (Path(output).read_text(encoding="utf-8") for output in outputs)
    if status is None:
        raise subprocess.TimeoutExpired(job["argv"], timeout, out, err)
    return subprocess.CompletedProcess(job["argv"], status, out, err)


def _wait(child: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _serve() -> dict | None:
    """Fork for each job, and return it in the child; None at the end."""
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            return job
        print(json.dumps(_wait(child, job["timeout"])), flush=True)
    return None


def _become(job: dict) -> None:
    """Turn this process into a program's."""
    for stream, output in ((1, job["outputs"][0]), (2, job["outputs"][1])):
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, stream)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = open(0, closefd=False)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv = job["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)


if __name__ == "__main__":
    # What pnode, the first solve and torch's first gradient (sympy) import, but for PETSc and MPI.
    for name in ("proxy_tensor", "symbolic_shapes"):
        importlib.import_module(f"torch.fx.experimental.{name}")
    for name in ("scipy.optimize", "mpmath", "pytest"):
        importlib.import_module(name)

    job = _serve()
    if job is not None:
        _become(job)
        program = types.ModuleType("__main__")
        program.__file__ = sys.argv[0]
        sys.modules["__main__"] = program
        source = Path(sys.argv[0]).read_text(encoding="utf-8")
        exec(compile(source, sys.argv[0], "exec"), program.__dict__)
