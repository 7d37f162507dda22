"""A small program of a user's, for mypy: what it infers of the public names. Never run."""

from typing import assert_type

import torch

import pnode

y0, t = torch.ones(2), torch.tensor([0.0, 1.0])


def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y


solver = pnode.Solver(field, method="dopri5", rtol=1e-6, dense=True)
solution = solver(y0, t)
assert_type(solution, pnode.Solution[torch.Tensor])
assert_type(solution.ys, torch.Tensor)
assert_type(solution.event_time, torch.Tensor | None)
assert_type(solution.stats.backward, pnode.Ledger)
assert_type(solver((y0, y0), [0.0, 1.0]).ys, tuple[torch.Tensor, ...])
assert_type(pnode.odeint(field, y0, t), torch.Tensor)
assert_type(pnode.odeint(field, (y0, y0), t), tuple[torch.Tensor, ...])
event_time, ys = pnode.odeint(field, y0, t, event_fn=lambda t, y: y[0] - 0.5)
assert_type(ys, torch.Tensor)
assert_type(event_time, torch.Tensor | None)
assert_type(pnode.methods()[0], pnode.Method)

steps = pnode.Steps(rtol=1e-8, max_steps=100)
algebra = pnode.LinearAlgebra(jacobian="block", jacobian_reuse="step")
grouped = pnode.Solver(
    field, method="es325", steps=steps, linear_algebra=algebra,
    output=pnode.Output(event_fn=lambda t, y: y[0] - 0.5), checkpointing="1GiB",
)  # fmt: skip
anything: pnode.Solution = grouped(y0, t)

# What is refused; of an "ignore" that nothing needs mypy complains.
pnode.Solver(field, jacobian="lu")  # type: ignore[arg-type]
pnode.Solver(field, device_state="gpu")  # type: ignore[arg-type]
pnode.Solver(field, step_size="small")  # type: ignore[arg-type]
pnode.Solver(field, nonsense=1)  # type: ignore[call-arg]
pnode.LinearAlgebra(jacobian_reuse="never")  # type: ignore[arg-type]
solver("y0", t)  # type: ignore[type-var]
