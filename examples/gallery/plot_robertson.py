"""
Stiff kinetics, drawn
=====================

Robertson's three reactions over eleven decades of time, by BDF. ``solution.plot()`` takes
logarithmic axes by itself, since the output times and the concentrations span decades.
"""

import torch

import pnode


def kinetics(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a, b, c = y
    slow, fast, fastest = 0.04 * a, 1e4 * b * c, 3e7 * b**2
    return torch.stack([fast - slow, slow - fast - fastest, fastest])


start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
times = torch.cat([torch.zeros(1), torch.logspace(-5, 6, 100)]).double()
solver = pnode.Solver(kinetics, method="bdf", rtol=1e-6, atol=1e-10)
solution = solver(start, times)
print(solution)

# %%
# The figure, and a few rows of the table:

axes = solution.plot(names=["A", "B", "C"])
axes.set_title("Robertson's reaction")
print(solution.table(6, names=["A", "B", "C"]))
