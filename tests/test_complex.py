"""Complex parameters of a real state, such as weights in Fourier space.

Against the same field with the real numbers of the parameter, torch.view_as_real, as the leaf:
torch's convention for the gradient of a real loss is dL/d Re w + i dL/d Im w.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import pnode
from pnode.parallel import sum_gradients
from pnode.testing import taylor_test

D = torch.float64
T = torch.linspace(0.0, 1.0, 3)
WAYS = {
    "euler, one step": {"method": "euler", "step_size": 1.0},
    "rk4": {"method": "rk4", "step_size": 0.25},
    "rk4, limit": {"method": "rk4", "step_size": 0.125, "checkpointing": 1000},
    "dopri5": {"method": "dopri5", "rtol": 1e-3},
    "dopri5, dense": {"method": "dopri5", "rtol": 1e-3, "dense": True},
    "ssp": {"method": "ssprk43", "step_size": 0.25},
    "beuler": {"method": "beuler", "step_size": 0.25},
    "cn": {"method": "cn", "step_size": 0.25},
    "cn, matrix-free": {"method": "cn", "step_size": 0.25, "jacobian": "matrix-free"},
    "cn, blocks, limit": {
        "method": "cn", "step_size": 0.125, "jacobian": "block", "checkpointing": 1000,
    },
    "es325, sparse": {"method": "es325", "rtol": 1e-2, "jacobian": "sparse"},
    "bdf": {"method": "bdf", "rtol": 1e-3},
    "rodaspr": {"method": "rodaspr", "rtol": 1e-3},
}  # fmt: skip


class Fourier(torch.nn.Module):
    """A layer of a Fourier neural operator, rows of the state apart."""

    def __init__(self, real=False, dtype=D, width=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        numbers = 0.5 * torch.randn(width // 2 + 1, 2, generator=generator, dtype=D).to(dtype)
        self.weight = torch.nn.Parameter(numbers if real else torch.view_as_complex(numbers))
        self.bias = torch.nn.Parameter(torch.linspace(-0.1, 0.1, width, dtype=dtype))

    def forward(self, t, y):
        weight = self.weight
        weight = weight if weight.is_complex() else torch.view_as_complex(weight)
        # Neither holomorphic nor linear in the weight.
        factor = weight * torch.exp(0.1 * weight.conj()) + weight.abs()
        mixed = torch.fft.irfft(torch.fft.rfft(y) * factor, n=y.shape[-1])
        return torch.tanh(mixed) * torch.cos(t) + self.bias - y


def gradients(field, dtype=D, **options):
    y0 = torch.linspace(-1.0, 1.0, 8, dtype=dtype).reshape(2, 4).requires_grad_()
    ys = pnode.Solver(field, **options)(y0, T.to(dtype)).ys
    found = torch.autograd.grad(ys.pow(3).sum(), (y0, *field.parameters()))
    return [torch.view_as_real(g) if g.is_complex() else g for g in found]


@pytest.mark.parametrize("way", WAYS)
def test_every_family_of_methods(way):
    found, expected = (gradients(Fourier(real), **WAYS[way]) for real in (False, True))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["rk4", "cn", "rodaspr"])
def test_single_precision(way):
    y0 = torch.zeros(2, 4)
    field = Fourier(dtype=torch.float32)
    pnode.Solver(field, **WAYS[way])(y0, T).ys.sum().backward()
    assert field.weight.grad.dtype is torch.complex64
    found, expected = (
        gradients(Fourier(real, torch.float32), torch.float32, **WAYS[way])
        for real in (False, True)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["rk4", "cn", "bdf"])
def test_compiled_solves_go_on_without_and_say_so(method):
    way = {"method": method, "step_size": 0.25} if method != "bdf" else {"method": "bdf"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gradients(Fourier(), compile=True, **way)
    assert len(caught) == 1
    assert "a parameter is complex" in str(caught[0].message)
    torch.testing.assert_close(found, gradients(Fourier(), **way), rtol=1e-12, atol=1e-12)


def test_the_parameter_of_one_euler_step():
    """y1 = y0 + h Re(w) Im(w) y0: dL/dRe + i dL/dIm = Im(w) + i Re(w)."""
    w = torch.tensor(1.0 + 2.0j, dtype=torch.complex128, requires_grad=True)
    solver = pnode.Solver(
        lambda t, y: w.real * w.imag * y, params=[w], method="euler", step_size=1.0
    )
    solver(torch.ones(1, dtype=D), torch.tensor([0.0, 1.0])).ys[-1].sum().backward()
    assert w.grad == 2.0 + 1.0j


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_parameters_that_are_conjugate_views_or_made_of_others(method):
    numbers = torch.tensor([0.3 - 0.2j, 0.1 + 0.4j], dtype=torch.complex128)
    leaf = torch.nn.Parameter(numbers.conj())
    assert leaf.is_conj()
    plain = torch.nn.Parameter(numbers.conj().resolve_conj())
    found = []
    for w in (leaf, plain):
        made = w.conj() * w
        made.register_hook(lambda g: 2.0 * g)
        solver = pnode.Solver(
            lambda t, y, w=w, made=made: (w.conj() * made * y).real - y * w.imag,
            params=[w, made], method=method, step_size=0.25,
        )  # fmt: skip
        loss = solver(torch.ones(2, dtype=D), T).ys.square().sum()
        found.append(torch.autograd.grad(loss, w)[0].resolve_conj())
    torch.testing.assert_close(*found, rtol=1e-13, atol=0.0)


def complex_forms(w):
    """Problems in which a complex parameter turns up."""

    def stiff(t, y):
        return -5.0 * w.abs() * y

    def rotated(t, y):
        return (w * torch.view_as_complex(y.reshape(-1, 2))).real.repeat_interleave(2)

    options = {"step_size": 0.125, "params": [w]}
    mass = torch.tensor([2.0, 1.0, 1.0, 3.0], dtype=D)
    return {
        "imex": pnode.Solver(implicit=stiff, explicit=rotated, method="ars443", **options),
        "mass": pnode.Solver(rotated, mass=mass, method="cn", **options),
        "residual": pnode.Solver(
            residual=lambda t, y, yp: yp - rotated(t, y) - stiff(t, y), method="beuler", **options
        ),
        "event": pnode.Solver(
            rotated, params=[w], rtol=1e-9, event_fn=lambda t, y: y[0] - 1.5 + 0.1 * w.imag
        ),
    }


@pytest.mark.parametrize("form", ["imex", "mass", "residual", "event"])
def test_every_form(form):
    real = torch.tensor([0.6, 0.3], dtype=D, requires_grad=True)
    leaf = torch.view_as_complex(real.detach().clone()).requires_grad_()
    found = []
    for w, by in ((leaf, leaf), (torch.view_as_complex(real), real)):
        solution = complex_forms(w)[form](torch.ones(4, dtype=D), 4.0 * T.double())
        loss = solution.ys[-1].square().sum()
        loss = loss if solution.event_time is None else loss + solution.event_time
        (gradient,) = torch.autograd.grad(loss, by)
        found.append(torch.view_as_real(gradient) if gradient.is_complex() else gradient)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_unused_and_frozen_complex_parameters():
    w, idle = (torch.ones(2, dtype=torch.complex128, requires_grad=True) for _ in range(2))
    frozen = torch.ones(2, dtype=torch.complex128)
    solver = pnode.Solver(
        lambda t, y: (w * frozen).real * y, params=[w, idle, frozen], method="rk4", step_size=0.5
    )
    solver(torch.ones(2, dtype=D), T).ys.sum().backward()
    assert idle.grad is None and w.grad.is_complex()


def test_sweeps_that_are_taken_up_again(tmp_path):
    field = Fourier()
    field.weight = torch.nn.Parameter(field.weight.detach().conj())
    limits = pnode.Checkpointing(memory=500, disk=tmp_path, resume="run")
    way = {"method": "rk4", "step_size": 0.125}
    found = gradients(field, checkpointing=limits, **way)
    torch.testing.assert_close(found, gradients(field, **way), rtol=1e-12, atol=1e-12)


def test_taylor_test_takes_complex_inputs():
    field = Fourier()
    y0 = torch.linspace(-1.0, 1.0, 4, dtype=D)
    solver = pnode.Solver(field, method="rk4", step_size=0.25)
    result = taylor_test(lambda: solver(y0, T).ys.square().sum(), list(field.parameters()))
    assert result.order > 1.9
    with torch.no_grad():
        field.weight.imag.add_(0.5)  # a gradient that ignored it would be seen
    wrong = taylor_test(
        lambda: solver(y0, T).ys.square().sum() + (field.weight.imag.detach() ** 2).sum(),
        list(field.parameters()),
    )
    assert wrong.order < 1.2


def test_sums_of_complex_gradients_over_ranks():
    from mpi4py import MPI

    w = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    b = torch.zeros(1, dtype=D, requires_grad=True)
    w.grad, b.grad = torch.tensor([1.0 + 2.0j, 3.0 - 1.0j]), torch.ones(1, dtype=D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sum_gradients([w, b], MPI.COMM_SELF)
    assert w.grad.tolist() == [1.0 + 2.0j, 3.0 - 1.0j] and b.grad.item() == 1.0
