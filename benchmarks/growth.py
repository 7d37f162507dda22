"""Does plain training grow? Memory of one process over thousands of gradients, family by family.

    python benchmarks/growth.py [--gradients 2000] [--families rk4 cn] [--json FILE]

For each family of methods and each way to use a solve: bytes that malloc has handed out (glibc's
``mallinfo2``: in its arenas, and in mappings of their own) and resident memory, after a tenth of
the gradients and at the end, each after a garbage collection and ``malloc_trim``. What is handed
out shows a leak of a few bytes a gradient; resident memory moves with the allocator, too. Exit
code 1 if a gradient leaves more than ``ALLOWED`` bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

import pnode

D = torch.float64
WIDTH = 2
#: Bytes a gradient may leave: far less than a state, a vector of PETSc or a node of a graph.
ALLOWED = 64.0
NAMES = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd",
    "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


class Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


class Mallinfo(ctypes.Structure):
    """The same before glibc 2.33, whose numbers wrap around."""

    _fields_ = [(name, ctypes.c_uint) for name in NAMES]


def allocated() -> int:
    """Return the bytes that malloc has handed out."""
    libc = ctypes.CDLL(None)
    new = hasattr(libc, "mallinfo2")
    mallinfo = libc.mallinfo2 if new else libc.mallinfo
    mallinfo.restype = Mallinfo2 if new else Mallinfo
    info = mallinfo()
    return int(info.uordblks) + int(info.hblkhd)


def resident() -> int:
    """Return resident memory in bytes, after what is free has been given back to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Net(torch.nn.Module):
    """A field on rows whose activation saves its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH, dtype=D)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(0.1, 0.5, parameter.numel()).view_as(parameter))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """dy/dt."""
        return torch.tanh(self.linear(y))


FIXED: dict[str, Any] = {"step_size": 0.1}
BLOCK: dict[str, Any] = {"jacobian": "block"}
LOOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
#: Keywords of the solver of y' = f(t, y), one or more for each family of methods.
FAMILIES: dict[str, dict[str, Any]] = {
    "rk4": {"method": "rk4", **FIXED},
    "dopri5": {"method": "dopri5"},
    "bosh3, no graphs": {"method": "bosh3", "checkpointing": pnode.Checkpointing(store="stages")},
    "dopri5, all graphs": {"method": "dopri5", "checkpointing": pnode.Checkpointing(store="tape")},
    "ssprk43": {"method": "ssprk43", **FIXED},
    "beuler": {"method": "beuler", **FIXED, **BLOCK},
    "cn": {"method": "cn", **FIXED, **BLOCK},
    "cn, adaptive": {"method": "cn", **LOOSE, **BLOCK},
    "cn, matrix-free": {"method": "cn", **FIXED, "jacobian": "matrix-free"},
    "cn, J once a step": {"method": "cn", **FIXED, **BLOCK, "jacobian_reuse": "step"},
    "implicit_midpoint": {"method": "implicit_midpoint", **FIXED, **BLOCK},
    "es325": {"method": "es325", **FIXED, **BLOCK},
    "rodaspr": {"method": "rodaspr", **FIXED, **BLOCK},
    "ra34pw2, matrix-free": {"method": "ra34pw2", **FIXED, "jacobian": "matrix-free"},
    "bdf": {"method": "bdf", **LOOSE, **BLOCK},
    "bdf2": {"method": "bdf2", **FIXED, **BLOCK},
    "symplectic: forest_ruth": {"method": "forest_ruth", **FIXED},
    "imex: ark4": {"method": "ark4", **FIXED, **BLOCK},
    "mass: cn": {"method": "cn", **FIXED, **BLOCK},
    "residual: bdf2": {"method": "bdf2", **FIXED, **BLOCK},
}
#: The same for ways to use an explicit method.
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"dense": True},
    "event": {"event_fn": lambda t, y: t - 0.15},
    "budget": {"step_size": 0.01},
    "disk": {"step_size": 0.01},
    "forward alone": {},
    "no_grad": {},
    "twice": {},
}


def solver_of(name: str, rows: int, folder: str) -> pnode.Solver:
    """Return the solver of a row of the table."""
    field, form = Net(), name.partition(":")[0]
    keywords = dict(FAMILIES.get(name) or {"method": "dopri5", **WAYS[name]})
    if name in ("budget", "disk"):
        state = 8 * WIDTH * rows
        disk = folder if name == "disk" else None
        keywords["checkpointing"] = pnode.Checkpointing(memory=12 * state, disk=disk)
    problem: dict[str, Any] = {"rhs": field}
    if form == "symplectic":
        problem["rhs"] = lambda t, y: (field(t, y[1]), -field(t, y[0]))
    elif form == "imex":
        problem = {"implicit": field, "explicit": Net()}
    elif form == "mass":
        problem["mass"] = torch.full((rows, WIDTH), 2.0, dtype=D)
    elif form == "residual":
        problem = {"residual": lambda t, y, yp: yp - field(t, y)}
    return pnode.Solver(**problem, params=field.parameters(), **keywords)


def gradient_of(name: str, rows: int, folder: str) -> Callable[[], None]:
    """Return what one step of plain training does."""
    solver = solver_of(name, rows, folder)
    start = torch.linspace(0.2, 0.6, rows * WIDTH, dtype=D).view(rows, WIDTH)
    times = torch.tensor([0.0, 0.1, 0.2], dtype=D)

    def once() -> None:
        solver.zero_grad(set_to_none=True)
        y0: Any = start.clone().requires_grad_()
        if name.startswith("symplectic"):
            y0 = (y0, start.clone())
        if name == "no_grad":
            with torch.no_grad():
                solver(y0, times)
            return
        ys = solver(y0, times).ys
        if name == "forward alone":
            return
        loss = (ys[0] if isinstance(ys, tuple) else ys).square().sum()
        loss.backward(retain_graph=name == "twice")
        if name == "twice":
            loss.backward()

    return once


def measure(name: str, gradients: int, rows: int) -> dict[str, Any]:
    """Return memory after a tenth of the gradients and after all of them."""
    with tempfile.TemporaryDirectory() as folder:
        once = gradient_of(name, rows, folder)

        def repeat(number: int) -> tuple[int, int]:
            for _ in range(number):
                once()
            gc.collect()
            return allocated(), resident()

        first = max(1, gradients // 10)
        before, begun = repeat(first), time.process_time()
        after = repeat(gradients)
        seconds = time.process_time() - begun
    return {
        "family": name,
        "gradients": gradients,
        "allocated": [before[0], after[0]],
        "resident": [before[1], after[1]],
        "bytes_each": (after[0] - before[0]) / gradients,
        "seconds_each": seconds / gradients,
    }


def main() -> int:
    """Run everything and print the table."""
    names = [*FAMILIES, *WAYS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gradients", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=16, help="the state has two entries in each")
    parser.add_argument("--families", nargs="+", choices=names, default=names, metavar="FAMILY")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    print(
        f"{arguments.gradients} gradients each, state of {WIDTH * arguments.rows} doubles, tanh\n"
        f"{'':>24} {'malloc, kB':>10} {'bytes each':>10} {'RSS, kB':>9} {'grown, kB':>9} "
        f"{'CPU, ms':>8}"
    )
    rows = []
    for name in arguments.families:
        row = measure(name, arguments.gradients, arguments.rows)
        rows.append(row)
        grown = row["resident"][1] - row["resident"][0]
        print(
            f"{name:>24} {row['allocated'][0] / 1e3:10.0f} {row['bytes_each']:10.1f} "
            f"{row['resident'][0] / 1e3:9.0f} {grown / 1e3:9.0f} {1e3 * row['seconds_each']:8.2f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    growing = [row["family"] for row in rows if row["bytes_each"] > ALLOWED]
    if growing:
        print(f"growing by more than {ALLOWED:.0f} bytes a gradient: {', '.join(growing)}")
    return 1 if growing else 0


if __name__ == "__main__":
    sys.exit(main())
