"""How many rooms a call passes on its way from the loop over steps to f.

    python tools/rooms.py [METHOD ...]

A room is an object of pnode's, or a file for functions outside of classes, between the loop and f.
Printed is the longest way of each sweep: to an assembled Jacobian where the method has one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import torch

import pnode

PRODUCT = Path(pnode.__file__).resolve().parent
#: Where the loops over steps are.
LOOPS = ("stepping.py", "reverse.py")
METHODS = ("rk4", "cn", "es325", "rodaspr", "bdf", "radau5")


def rooms(frame: FrameType | None) -> tuple[str, ...]:
    """Return the rooms from the loop over steps to a frame; none where no loop is above it."""
    found: dict[object, str] = {}
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if PRODUCT in file.parents:
            if file.name in LOOPS:
                return tuple(reversed(found.values()))
            owner = frame.f_locals.get("self")
            if owner is None:
                found.setdefault(file, file.name)
            else:
                found.setdefault(id(owner), type(owner).__name__)
        frame = frame.f_back
    return ()


class Watched(torch.nn.Module):
    """y' = -a y^2, which notes the ways on which it is called.

    Attributes
    ----------
    ways : set of tuple of str
        The rooms of each, from the loop over steps to f.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        self.ways: set[tuple[str, ...]] = set()

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the slope."""
        self.ways.add(rooms(sys._getframe(1)))
        return -self.a * y * y


def ways(method: str) -> dict[str, set[tuple[str, ...]]]:
    """Return the ways to f of a forward and a backward sweep, by the name of the sweep."""
    field = Watched()
    steps = {} if method == "bdf" else {"step_size": 0.25}
    solver = pnode.Solver(
        field,
        method=method,
        compile=False,
        checkpointing=pnode.Checkpointing(store="stages"),
        **steps,
    )
    y = solver(torch.ones(2, dtype=torch.float64, requires_grad=True), [0.0, 1.0]).ys
    found = {"forward": field.ways}
    field.ways = set()
    y[-1].sum().backward()
    return {**found, "backward": field.ways}


def main() -> int:
    """Print the ways, the longest of each kind."""
    for method in sys.argv[1:] or METHODS:
        for sweep, found in ways(method).items():
            if found:
                longest = max(found, key=len)
                print(f"{method} {sweep}: {len(longest)}: {' > '.join(longest)} > f")
    return 0


if __name__ == "__main__":
    sys.exit(main())
