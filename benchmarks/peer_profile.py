"""Where the time of a pnode gradient goes: ``peers.py --profile``."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["print_profile"]

PNODE = ("pnode", "solvers", "adjoint")


def category(key: tuple[str, int, str]) -> str:
    """Say whose code a function of the profile is."""
    file, _, name = key
    if file == "~":
        if "petsc" in name.lower():
            return "PETSc and petsc4py"
        if "run_backward" in name:
            return "autograd's backward passes"
        return "torch operations" if "torch" in name or "Tensor" in name else "other built-ins"
    path = Path(file)
    if path.parent.name in PNODE:
        return f"pnode's Python: {path.parent.name}/{path.name}"
    if Path(torch.__file__).parent in path.parents:
        return "torch's Python"
    return "f and the program around the solve"


def print_profile(title: str, run: Callable[[], Any], seconds: float) -> None:
    """Profile ``run`` for some seconds and print the shares of its time by category.

    A profile slows down Python's calls, and so overstates them; ``stretched`` says how much longer
    the run took under it.
    """
    run()
    start = time.perf_counter()
    count = 0
    while count < 2 or time.perf_counter() - start < seconds:
        run()
        count += 1
    plain = (time.perf_counter() - start) / count
    profile = cProfile.Profile()
    start = time.perf_counter()
    profile.enable()
    for _ in range(count):
        run()
    profile.disable()
    stretched = (time.perf_counter() - start) / count / plain
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    shares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    total = sum(own for _, _, own, _, _ in stats.values())
    for key, (_, calls, own, _, _) in stats.items():
        shares[category(key)][0] += own
        shares[category(key)][1] += calls
    print(f"\nProfile of {title}: {1e3 * plain:.2f} ms, stretched {stretched:.2f} times")
    for name, (own, calls) in sorted(shares.items(), key=lambda item: -item[1][0]):
        if own > 0.01 * total:
            print(f"{own / total:>7.1%} {calls / count:>9.0f} calls  {name}")
    print("  the functions that take most, without what they call:")
    for key, (_, calls, own, _, _) in sorted(stats.items(), key=lambda item: -item[1][2])[:14]:
        file, line, name = key
        where = name if file == "~" else f"{Path(file).parent.name}/{Path(file).name}:{line} {name}"
        print(f"{own / total:>7.1%} {calls / count:>9.0f} calls  {where}")
