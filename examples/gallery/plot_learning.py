"""
Learning a rate
===============

Forty observations of a damped pendulum, and its damping as the one unknown: a gradient of the loss
is one backward sweep over the steps that were taken.
"""

import matplotlib.pyplot as plt
import torch

import pnode

torch.manual_seed(0)


class Pendulum(torch.nn.Module):
    def __init__(self, damping: float) -> None:
        super().__init__()
        self.damping = torch.nn.Parameter(torch.tensor(damping, dtype=torch.float64))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        angle, speed = y
        return torch.stack([speed, -torch.sin(angle) - self.damping * speed])


start = torch.tensor([2.0, 0.0], dtype=torch.float64)
times = torch.linspace(0.0, 10.0, 41, dtype=torch.float64)
with torch.no_grad():
    truth = pnode.Solver(Pendulum(0.3))(start, times).ys
data = truth + 0.05 * torch.randn_like(truth)

model = Pendulum(0.05)
solver = pnode.Solver(model, method="tsit5")
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
losses = []
for _ in range(60):
    optimizer.zero_grad()
    loss = (solver(start, times).ys - data).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"damping {model.damping.item():.3f}, true 0.3")

# %%
# What was seen and what was learned:

learned = solver(start, times)
axes = learned.plot(names=["angle", "speed"])
axes.plot(times, data, "k.", markersize=3)
figure, axes = plt.subplots(layout="constrained")
axes.semilogy(losses)
axes.set(xlabel="iteration", ylabel="loss")
