"""
A ball that bounces
===================

A ball falls, and an event ends the solve when it reaches the floor. The next solve starts there
with the velocity turned round; each time and state of an event is differentiable, so that a loss
may depend on where the ball is after several bounces.
"""

import matplotlib.pyplot as plt
import torch

import pnode

gravity = torch.tensor(9.81, dtype=torch.float64, requires_grad=True)


def fall(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([y[1], -gravity])


solver = pnode.Solver(fall, params=[gravity], event_fn=lambda t, y: y[0], rtol=1e-8)
time = torch.zeros((), dtype=torch.float64)
state = torch.tensor([1.0, 0.0], dtype=torch.float64)
axes = plt.subplots(layout="constrained")[1]
for _ in range(4):
    ahead = torch.linspace(0.0, 1.0, 41, dtype=torch.float64)
    solution = solver(state, time + ahead)
    axes.plot(solution.ts.detach(), solution.ys[:, 0].detach(), color="C0")
    time = solution.ts[-1]
    state = torch.stack([torch.zeros_like(time), -0.8 * solution.ys[-1, 1]])
axes.set(xlabel="t", ylabel="height")

# %%
# The derivative of the last bounce's time with respect to gravity, and what it should be: all times
# go with 1 / sqrt(g).

(derivative,) = torch.autograd.grad(time, [gravity])
print(derivative.item(), (-time / (2 * gravity)).item())
