"""``gradient="continuous"``: the adjoint equation, integrated backwards in time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from small_net import SmallNet
from torch.autograd import grad

import pnode

D = torch.float64
T = torch.tensor([0.1, 0.5, 1.2], dtype=D)


class Field(SmallNet):
    def forward(self, t, y):
        return self.net(y) * torch.cos(3.0 * t) - 0.5 * y


def weights(ys):
    return torch.linspace(-1.0, 2.0, ys.numel(), dtype=ys.dtype).reshape(ys.shape)


def gradients(f, t=T, **options):
    """Return the gradients by y0, t and the parameters, and the solution."""
    y0 = torch.tensor([0.6, -0.4, 0.2], dtype=D, requires_grad=True)
    t = t.clone().requires_grad_()
    solution = pnode.Solver(f, **options)(y0, t)
    loss = (weights(solution.ys) * solution.ys).sum()
    return grad(loss, [y0, t, *f.parameters()]), solution


def difference(found, expected):
    found, expected = (torch.cat([one.reshape(-1) for one in all_]) for all_ in (found, expected))
    return float((found - expected).norm() / expected.norm())


def exact(t=T):
    return gradients(Field(), t, method="dopri5", rtol=1e-12, atol=1e-13)[0]


@pytest.mark.parametrize(
    ("method", "order"),
    [("euler", 1), ("rk4", 4), ("beuler", 1), ("cn", 2), ("trbdf2", 2), ("ra34pw2", 3)],
)
def test_converges_with_the_order_of_the_method(method, order):
    """To the gradient of the exact flow, by y0, t and parameters."""
    reference = exact()
    errors = [
        difference(gradients(Field(), method=method, step_size=h, gradient="continuous")[0],
                   reference)
        for h in (0.05, 0.025)
    ]  # fmt: skip
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("method", ["dopri5", "es325", "bdf"])
def test_adaptive_steps_approach_the_exact_flow(method):
    """As the tolerance goes to zero, and they differ from the discrete gradient before."""
    reference, errors = exact(), []
    for rtol in (1e-3, 1e-6, 1e-9):
        options = {"method": method, "rtol": rtol, "atol": rtol}
        found, _ = gradients(Field(), gradient="continuous", **options)
        errors.append(difference(found, reference))
        if rtol == 1e-3:
            discrete, _ = gradients(Field(), **options)
            assert difference(found, discrete) > 1e-6
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-6


def test_is_the_adjoint_equation_as_scipy_solves_it():
    f, w, times = Field(), weights(torch.empty(3, 3, dtype=D)).numpy(), T.tolist()
    parameters = list(f.parameters())

    def field(t, y):
        with torch.no_grad():
            return f(torch.tensor(t, dtype=D), torch.tensor(y)).numpy()

    def adjoint(t, x):
        y = torch.tensor(x[:3], requires_grad=True)
        value = f(torch.tensor(t, dtype=D), y)
        found = grad(value, [y, *parameters], torch.tensor(x[3:6]))
        return np.concatenate([value.detach(), *(-one.reshape(-1) for one in found)])

    tight = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}
    start = np.array([0.6, -0.4, 0.2])
    ys = solve_ivp(field, (times[0], times[-1]), start, t_eval=times, **tight).y.T
    number = sum(one.numel() for one in parameters)
    x = np.concatenate([ys[-1], np.zeros(3 + number)])
    for i in (2, 1):
        x[3:6] += w[i]
        x = solve_ivp(adjoint, (times[i], times[i - 1]), x, **tight).y[:, -1]
    slopes = [w[i] @ field(times[i], ys[i]) for i in (1, 2)]
    by_t = [-x[3:6] @ field(times[0], start), *slopes]
    found, _ = gradients(f, method="dopri5", rtol=1e-11, atol=1e-12, gradient="continuous")
    expected = [x[3:6] + w[0], by_t, x[6:]]
    got = [found[0], found[1], torch.cat([one.reshape(-1) for one in found[2:]])]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-9, atol=1e-10)


def test_euler_step_by_hand():
    """y' = p y: one step back from y1, of y, lambda and mu."""
    p = torch.tensor(0.7, dtype=D, requires_grad=True)
    y0 = torch.tensor([2.0], dtype=D, requires_grad=True)
    h = 0.25
    solver = pnode.Solver(
        lambda t, y: p * y, params=[p], method="euler", step_size=h, gradient="continuous"
    )
    y1 = solver(y0, torch.tensor([0.0, h], dtype=D)).ys[1]
    by_y0, by_p = grad(y1.sum(), [y0, p])
    assert by_y0.item() == pytest.approx(1.0 + h * 0.7, rel=1e-15)
    assert by_p.item() == pytest.approx(h * y1.item(), rel=1e-15)  # the discrete one has h y0


def test_decreasing_times():
    backwards = T.flip(0)
    found, _ = gradients(
        Field(), backwards, method="dopri5", rtol=1e-10, atol=1e-11, gradient="continuous"
    )
    assert difference(found, exact(backwards)) < 1e-8


def test_state_of_several_tensors_and_float32():
    f = Field()
    y0 = torch.tensor([0.6, -0.4, 0.2], dtype=D)
    options = {"method": "rk4", "step_size": 0.1, "gradient": "continuous"}

    def split(t, x):
        value = f(t, torch.cat([x[0], x[1].reshape(-1)]))
        return value[:1], value[1:].reshape(2, 1)

    parts = (y0[:1].clone().requires_grad_(), y0[1:].reshape(2, 1).clone().requires_grad_())
    ys = pnode.Solver(split, params=list(f.parameters()), **options)(parts, T).ys
    joined = torch.cat([ys[0], ys[1].reshape(3, 2)], 1)
    found = grad((weights(joined) * joined).sum(), [*parts, *f.parameters()])
    expected, _ = gradients(f, **options)
    assert difference(found, [expected[0], *expected[2:]]) < 1e-14
    single = Field().float()
    y = y0.float().requires_grad_()
    ys = pnode.Solver(single, **options)(y, T.float()).ys
    found = grad((weights(ys) * ys).sum(), [y, *single.parameters()])
    assert all(one.dtype is torch.float32 for one in found)
    assert difference([one.double() for one in found], [expected[0], *expected[2:]]) < 1e-5


def test_complex_parameters_and_made_ones():
    """Torch's convention, and each way to a parameter once."""
    w = torch.tensor([0.5, 0.3 - 0.4j, 0.1j], dtype=torch.complex128, requires_grad=True)
    v = torch.tensor(0.3, dtype=D, requires_grad=True)
    made = torch.exp(v)

    def f(t, y):
        return torch.tanh(torch.fft.irfft(torch.fft.rfft(y) * w, n=4)) - made * v * y

    def solve(**options):
        y0 = torch.linspace(-1.0, 1.0, 4, dtype=D)
        ys = pnode.odeint(
            f, y0, T, params=[w, v, made], method="dopri5", rtol=1e-10, atol=1e-11, **options
        )
        return grad((weights(ys) * ys).sum(), [w, v], retain_graph=True)

    for one, other in zip(solve(gradient="continuous"), solve(), strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-9)


def test_unused_parameters_and_outputs():
    """None where f does not use a parameter; nothing is integrated that no output depends on."""
    f = Field()
    f.idle = torch.nn.Parameter(torch.ones(2, dtype=D))
    y0 = torch.ones(3, dtype=D, requires_grad=True)
    solver = pnode.Solver(f, method="rk4", step_size=0.1, gradient="continuous")
    solution = solver(y0, T)
    solution.ys[1].sum().backward()
    assert f.idle.grad is None
    assert y0.grad is not None
    assert solution.stats.backward.steps == 4
    one = solver(y0, T[:1])
    assert torch.equal(grad(one.ys.sum(), y0)[0], torch.ones(3, dtype=D))


@pytest.mark.parametrize(("method", "stages"), [("rk4", 4), ("beuler", None)])
def test_its_own_ledger_and_nothing_kept(method, stages):
    found, solution = gradients(Field(), method=method, step_size=0.05, gradient="continuous")
    stats, back = solution.stats, solution.stats.backward
    assert stats.ram_bytes == stats.tape_bytes == back.ram_bytes == back.recomputed == 0
    assert back.steps == stats.steps == 22
    if stages:
        assert back.rhs == stages * back.steps + 3  # and f at each output, for the times
        assert back.vjp == stages * back.steps
    else:
        assert back.newton > 0
        assert back.jacobians > 0
    assert found[0].isfinite().all()


def test_memory_does_not_grow_with_the_number_of_steps():
    """What the node keeps: outputs and parameters, and no checkpoints."""
    y0 = torch.ones(3, dtype=D, requires_grad=True)
    for step_size in (0.1, 0.001):
        solver = pnode.Solver(Field(), method="rk4", step_size=step_size, gradient="continuous")
        solution = solver(y0, T)
        run = solution.ys.grad_fn.run
        assert run.sweep.trajectory is None


def test_backward_twice_and_batches_of_gradients():
    f = Field()
    y0 = torch.ones(3, dtype=D, requires_grad=True)
    ys = pnode.Solver(f, method="rk4", step_size=0.1, gradient="continuous")(y0, T).ys
    inputs = [y0, *f.parameters()]
    seeds = torch.stack([weights(ys), torch.ones_like(ys)])
    one_by_one = [grad(ys, inputs, seed, retain_graph=True) for seed in seeds]
    batched = grad(ys, inputs, seeds, retain_graph=True, is_grads_batched=True)
    for k in range(2):
        for one, other in zip(batched, one_by_one[k], strict=True):
            assert torch.equal(one[k], other)


def test_hooks_of_parameters_act_once():
    f, calls = Field(), []
    expected, _ = gradients(f, method="rk4", step_size=0.1, gradient="continuous")
    f.net[0].weight.register_hook(lambda g: calls.append(1) or 2.0 * g)
    found, _ = gradients(f, method="rk4", step_size=0.1, gradient="continuous")
    assert len(calls) == 1
    assert torch.equal(found[2], 2.0 * expected[2])
    assert torch.equal(found[3], expected[3])


def test_surroundings_are_those_of_the_forward_solve():
    class Dropping(Field):
        def forward(self, t, y):
            return super().forward(t, y) * (1.0 if self.training else 0.5)

    f = Dropping()
    options = {"method": "rk4", "step_size": 0.1, "gradient": "continuous"}
    expected, _ = gradients(f, **options)
    y0 = torch.tensor([0.6, -0.4, 0.2], dtype=D, requires_grad=True)
    ys = pnode.Solver(f, **options)(y0, T).ys
    f.eval()
    assert torch.equal(grad((weights(ys) * ys).sum(), y0)[0], expected[0])


def test_compiled_forward_solve():
    """Takes compiled steps, and the same backwards as without."""
    f = Field()
    options = {"method": "beuler", "step_size": 0.1, "gradient": "continuous"}
    compiled, _ = gradients(f, compile=True, **options)
    plain, _ = gradients(f, **options)
    assert difference(compiled, plain) < 1e-8  # by what Newton's method leaves


def test_odeint_and_odeint_adjoint():
    f, y0 = Field(), torch.ones(3, dtype=D, requires_grad=True)
    keywords = {"method": "rk4", "options": {"step_size": 0.1}, "gradient": "continuous"}
    found = grad(pnode.odeint(f, y0, T, **keywords).sum(), y0)[0]
    with pytest.warns(UserWarning, match="adjoint_rtol ignored: the continuous adjoint takes"):
        ys = pnode.odeint_adjoint(f, y0, T, adjoint_rtol=1e-3, **keywords)
    assert torch.equal(grad(ys.sum(), y0)[0], found)
    assert not torch.equal(grad(pnode.odeint(f, y0, T, method="rk4", step_size=0.1).sum(), y0)[0],
                           found)  # fmt: skip


def test_a_solver_without_gradients_is_as_ever():
    y0 = torch.ones(3, dtype=D)
    options = {"method": "rk4", "step_size": 0.1}
    with torch.no_grad():
        found = pnode.Solver(Field(), gradient="continuous", **options)(y0, T).ys
        assert torch.equal(found, pnode.Solver(Field(), **options)(y0, T).ys)


# ------------------------------------------------------------------------------ what is refused

F = staticmethod(lambda t, y: -y)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"gradient": "exact"}, "gradient='exact'"),
        ({"rhs": None, "implicit": F, "explicit": F, "method": "ark3"}, "imex="),
        ({"mass": torch.ones(1, dtype=D), "method": "beuler"}, "mass="),
        ({"rhs": None, "residual": lambda t, y, yp: yp + y, "method": "beuler"}, "residual="),
        ({"method": "velocity_verlet"}, "method='velocity_verlet'"),
        ({"event_fn": lambda t, y: y[0] - 0.5}, "event_fn="),
        ({"dense": True}, "dense="),
        ({"cost": lambda t, y: y}, "cost="),
        ({"checkpointing": "1MiB"}, "checkpointing="),
        ({"layout": pnode.parallel.Grid((4,))}, "layout="),
        ({"rtol": torch.ones(2, dtype=D), "step_size": None}, "rtol"),
        ({"method": "beuler", "jacobian": "block"}, "jacobian='block'"),
        ({"method": "beuler", "jacobian": "sparse"}, "jacobian='sparse'"),
        (
            {"method": "beuler", "jacobian": "matrix-free", "preconditioner": "dense"},
            "preconditioner=",
        ),
    ],
)
def test_refusals(options, names):
    keywords = {"rhs": F, "method": "dopri5", "step_size": 0.1, "gradient": "continuous"} | options
    with pytest.raises(pnode.ConfigurationError, match=names) as caught:
        pnode.Solver(**keywords)
    assert "discrete" in str(caught.value)


def test_second_derivatives_and_forward_mode_are_refused():
    y0 = torch.ones(3, dtype=D, requires_grad=True)
    solver = pnode.Solver(Field(), method="rk4", step_size=0.1, gradient="continuous")
    (first,) = grad(solver(y0, T).ys.square().sum(), y0, create_graph=True)
    with pytest.raises(pnode.BackwardError, match="gradient='discrete'"):
        first.sum().backward()
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(pnode.ConfigurationError, match="backward\\(\\) alone"):
            transform(lambda y: solver(y, T).ys.sum())(y0.detach())


def test_a_parameter_that_was_replaced_is_that_of_the_forward_solve():
    def gradients(replace):
        f = Field()
        y0 = torch.ones(3, dtype=D, requires_grad=True)
        weight = f.net[0].weight
        ys = pnode.Solver(f, method="rk4", step_size=0.1, gradient="continuous")(y0, T).ys
        if replace:
            f.net[0].weight = torch.nn.Parameter(torch.ones(4, 3, dtype=D))
        return grad(ys.sum(), (y0, weight))

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, expected)


def test_a_backward_solve_that_fails_says_so():
    """Backwards a strong contraction explodes."""
    y0 = torch.ones(1, dtype=D, requires_grad=True)
    solver = pnode.Solver(lambda t, y: -300.0 * y.clamp(-1e3, 1e3) ** 3, method="beuler",
                          step_size=0.5, gradient="continuous", max_steps=100)  # fmt: skip
    ys = solver(y0, torch.tensor([0.0, 50.0], dtype=D)).ys
    with pytest.raises(pnode.SolveError):
        ys[-1].sum().backward()
