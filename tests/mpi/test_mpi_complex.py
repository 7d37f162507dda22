"""Complex parameters, and hooks on them, of a batch that the ranks share."""

from __future__ import annotations

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode.parallel import replicate, sum_gradients, total

pytestmark = [
    pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("error:Casting complex values to real"),
]  # fmt: skip
D = torch.float64
t = torch.tensor([0.0, 0.5, 1.0], dtype=D)
batch = torch.linspace(-1.0, 1.0, 28, dtype=D).reshape(7, 4)
share = batch[comm.rank :: comm.size].contiguous()


def gradient(states: torch.Tensor, hooked: bool, method: str, **options: object) -> torch.Tensor:
    """Gradient of the batch's loss with respect to weights in Fourier space."""
    w = torch.tensor([0.5 + 0.0j, 0.3 - 0.4j, 0.1 + 0.2j], dtype=torch.complex128)
    w.requires_grad_()
    calls: list[int] = []
    if hooked:
        w.register_hook(lambda g: calls.append(1) or 2.0 * g + 1.0j)
    solver = pnode.Solver(
        lambda t, y: torch.tanh(torch.fft.irfft(torch.fft.rfft(y) * w, n=4)) - y,
        params=[w], method=method, step_size=0.25, **options,
    )  # fmt: skip
    loss = solver(states, t).ys[-1].square().sum()
    loss = total(loss, comm) if "comm" in options else loss
    loss.backward()
    checks.true(len(calls) == hooked, "hooks", method, len(calls))
    assert w.grad is not None
    return w.grad


@pytest.mark.parametrize("method", ["rk4", "cn", "rodaspr", "bdf3"])
@pytest.mark.parametrize("hooked", [False, True])
def test_ranks_that_share_a_batch(method: str, hooked: bool) -> None:
    whole = gradient(batch, hooked, method)
    ours = gradient(share, hooked, method, comm=comm)
    # Newton's tolerance, relative to the first residual of the share and of the whole.
    bound = 1e-12 if method in ("rk4", "rodaspr") else 1e-7
    checks.below(float((ours - whole).abs().max()), bound, method, hooked)


def test_sums_of_complex_gradients() -> None:
    grad = torch.tensor([1.0 + 2.0j, 0.5 - 1.0j], dtype=torch.complex128)
    p = torch.zeros(2, dtype=torch.complex128, requires_grad=True)
    p.grad = grad * (1 + comm.rank)
    sum_gradients([p], comm)
    number = comm.size * (comm.size + 1) / 2
    checks.below(float((p.grad - number * grad).abs().max()), 1e-13, "sum_gradients")

    q = torch.tensor([1.0 + 1.0j, 2.0 - 1.0j], dtype=torch.complex128, requires_grad=True)
    (replicate(q, comm).conj() * grad).sum().real.backward()
    assert q.grad is not None
    checks.below(float((q.grad - comm.size * grad).abs().max()), 1e-13, "replicate")
