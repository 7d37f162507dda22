"""Derivatives of independent samples beyond the gradient: those of a loop of solves alone."""

import pytest
import torch
from test_samples import TIMES, Y0, Oscillator

import pnode

D = torch.float64
STEPS = [("heun2", 0.2), ("bosh3", None), ("es325", 0.2), ("cn", 0.2), ("rodaspr", None),
         ("ra34pw2", 0.2), ("grk4t", 0.1)]  # fmt: skip
Y = Y0 * torch.tensor([1.0, 1.0, 0.3], dtype=D)
GENERATOR = torch.Generator().manual_seed(7)
V, W = (torch.randn(3, 3, generator=GENERATOR, dtype=D) for _ in range(2))
ONE = torch.tensor(0.7, dtype=D)


def work(t, y):
    return y[..., :2].square()


def ways(f, **options):
    """Return the solve of all rows, and the loop, as functions of y0, t and the parameter."""
    alone = dict(options, compile=False)
    if options["method"] in ("es325", "cn"):
        alone["jacobian_reuse"] = "iteration"
    independent = pnode.Solver(f, samples="independent", **options)
    single = pnode.Solver(f, **alone)

    def outputs(solver, scale, *given):
        found = torch.func.functional_call(solver, {"rhs.scale": scale}, given)
        return found.ys if found.costs is None else torch.cat([found.ys, found.costs], dim=-1)

    def together(y, t, scale=f.scale):
        return outputs(independent, scale, y, t)

    def loop(y, t, scale=f.scale):
        return torch.stack([outputs(single, scale, y[row], t[row]) for row in range(3)], dim=1)

    return together, loop


def second(solve, f):
    """Return a Hessian-vector product."""
    inputs = (Y.clone().requires_grad_(), TIMES.clone().requires_grad_(), f.scale)
    loss = solve(*inputs).pow(3).sum()
    found = torch.autograd.grad(loss, inputs, create_graph=True)
    along = sum((one * v).sum() for one, v in zip(found, (V, W, ONE), strict=True))
    return torch.cat([one.reshape(-1) for one in torch.autograd.grad(along, inputs)])


def first(solve, f):
    """Return a tangent, by y0, t and a parameter."""
    return torch.func.jvp(solve, (Y, TIMES, f.scale), (V, W, ONE))[1]


def close(found, expected):
    # What Newton's method leaves of a residual is multiplied by curvatures.
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * scale)


@pytest.mark.parametrize(("method", "step"), STEPS)
def test_rows_are_those_of_solves_alone(method, step):
    f = Oscillator()
    together, loop = ways(f, method=method, step_size=step, cost=work, rtol=1e-3)
    close(first(together, f), first(loop, f))
    close(second(together, f), second(loop, f))


def test_split_fields():
    from test_samples_imex import Rest, Stiff

    f, g = Stiff(), Rest()

    def gradient(solve):
        inputs = (Y.clone().requires_grad_(), f.rate, g.weight)
        loss = solve(inputs[0]).pow(3).sum()
        found = torch.autograd.grad(loss, inputs, create_graph=True)
        along = sum((one * v).sum() for one, v in zip(found, (V, ONE, ONE), strict=True))
        return torch.cat([one.reshape(-1) for one in torch.autograd.grad(along, inputs)])

    options = {"implicit": f, "explicit": g, "method": "ars122", "step_size": 0.2}
    solver = pnode.Solver(compile=False, jacobian_reuse="iteration", **options)
    found = gradient(lambda y: pnode.Solver(samples="independent", **options)(y, TIMES).ys)
    close(found, gradient(
        lambda y: torch.stack([solver(y[row], TIMES[row]).ys for row in range(3)], dim=1)
    ))  # fmt: skip


@pytest.mark.parametrize("method", ["heun2", "cn"])
def test_transforms_of_torch(method):
    f = Oscillator()
    together, loop = ways(f, method=method, step_size=0.5)

    def loss(solve):
        return lambda y: solve(y, TIMES).pow(2).sum()

    jacobian = torch.func.jacfwd(lambda y: together(y, TIMES))(Y)
    close(jacobian, torch.func.jacfwd(lambda y: loop(y, TIMES))(Y))
    close(torch.func.jacrev(lambda y: together(y, TIMES))(Y), jacobian)
    close(torch.func.hessian(loss(together))(Y), torch.func.hessian(loss(loop))(Y))
    ys = together(Y.clone().requires_grad_(), TIMES)
    y0 = Y.clone().requires_grad_()
    ys = together(y0, TIMES)
    units = torch.eye(ys.numel(), dtype=D).view(-1, *ys.shape)
    (rows,) = torch.autograd.grad(ys, y0, units, is_grads_batched=True)
    close(rows.view(jacobian.shape), jacobian)


@pytest.mark.parametrize("method", ["heun2", "sdirk2", "rosw_theta2"])
def test_third_order_checks(method):
    y0 = torch.tensor([[0.4], [0.9]], dtype=D, requires_grad=True)
    rate = torch.tensor(1.3, dtype=D, requires_grad=True)
    t = torch.tensor([[0.0, 0.5], [0.2, -0.1]], dtype=D)
    solver = pnode.Solver(
        lambda t, y: -rate * y * y, params=[rate], method=method, step_size=0.25,
        samples="independent",
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(lambda y, r: solver(y, t).ys, (y0, rate))


@pytest.mark.parametrize(
    ("method", "limit"), [("bosh3", 4000), ("sdirk2", 4000), ("ra34pw2", 1500)]
)
def test_rows_that_are_done_within_limits_of_memory(method, limit):
    rows = 12
    ends = torch.arange(1, rows + 1, dtype=D) / 8
    t = torch.stack([torch.zeros(rows, dtype=D), ends], dim=1)
    rate = torch.tensor(1.3, dtype=D, requires_grad=True)
    y0 = torch.linspace(0.5, 1.5, rows, dtype=D)[:, None].requires_grad_()
    options = {"method": method, "step_size": 0.1, "params": [rate]}

    def f(t, y):
        return -rate * y * y

    def gradient(last):
        own, by = torch.autograd.grad(last.sum(), (y0, rate), create_graph=True)
        return torch.autograd.grad(own.square().sum() + by.square(), (y0, rate))

    found = []
    for bytes_ in (None, limit):
        solver = pnode.Solver(f, samples="independent", checkpointing=bytes_, **options)
        solution = solver(y0, t)
        found.append(gradient(solution.ys[-1]))
    assert solution.stats.backward.recomputed
    if method == "sdirk2":
        options["jacobian_reuse"] = "iteration"
    solver = pnode.Solver(f, compile=False, **options)
    found.append(gradient(torch.stack([solver(y, s).ys[-1] for y, s in zip(y0, t, strict=True)])))
    for one, other, alone in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one, alone, rtol=1e-8, atol=1e-9)


def test_machine_code_is_taken_again_in_torch():
    f = Oscillator()
    options = {"method": "heun2", "step_size": 0.2}
    together, loop = ways(f, compile=True, **options)
    close(first(together, f), first(loop, f))
    close(second(together, f), second(loop, f))


def test_sensitivities():
    solver = pnode.Solver(Oscillator(), method="heun2", step_size=0.5, samples="independent")
    found = [pnode.sensitivities(solver, Y, TIMES, ("scale",), way) for way in ("auto", "adjoint")]
    assert found[0].mode == "forward" and found[0]["scale"].shape == (3, 3, 3)
    close(found[0]["scale"], found[1]["scale"])
    with pytest.raises(pnode.ConfigurationError, match=r"wrt=\('y0',\) has 'y0'"):
        pnode.sensitivities(solver, Y, TIMES)


def test_what_is_refused():
    f = Oscillator()
    ys = pnode.Solver(f, method="bdf", samples="independent", compile=True)(Y, TIMES).ys
    (found,) = torch.autograd.grad(ys.sum(), f.scale, create_graph=True)
    with pytest.raises(pnode.BackwardError, match="tangents of method='bdf'"):
        found.backward()
    y0 = Y.clone().requires_grad_()
    solver = pnode.Solver(Oscillator(), method="heun2", step_size=0.5, samples="independent",
                          dense=True)  # fmt: skip
    with pytest.raises(pnode.BackwardError, match="second derivatives"):
        torch.autograd.grad(solver(y0, TIMES[0]).ys.sum(), y0, create_graph=True)
    with pytest.raises(pnode.ConfigurationError, match="dense=True has reverse mode alone"):
        torch.func.jvp(lambda y: solver(y, TIMES[0]).ys, (Y,), (V,))


def test_a_changed_field_is_noticed():
    factor = [1.0]
    y0 = Y.clone().requires_grad_()
    for method in ("heun2", "sdirk2"):
        solver = pnode.Solver(
            lambda t, y: -factor[0] * y, method=method, step_size=0.5, samples="independent"
        )
        factor[0] = 1.0
        (found,) = torch.autograd.grad(solver(y0, [0.0, 1.0]).ys.pow(3).sum(), y0,
                                       create_graph=True)  # fmt: skip
        factor[0] = 2.0
        with pytest.raises(pnode.errors.FieldChanged):
            found.sum().backward()


def test_second_derivatives_by_times_beside_a_row_that_failed():
    """Those of the other rows and of the parameter; NaN times zero was the latter's."""
    scale = torch.nn.Parameter(ONE.clone())

    def square(t, y):
        return scale * y * y * (1.0 + 0.1 * t)

    start = torch.tensor([[0.3, 0.2], [4.0, 1.0], [-0.5, 0.1]], dtype=D)
    clock = torch.tensor([[0.0, 0.4, 1.0], [0.0, 0.5, 1.2], [0.0, 0.6, 0.8]], dtype=D)
    solver = pnode.Solver(
        square, samples="independent", on_failure="nan", params=[scale], compile=False
    )
    found = []
    for rows in ([0, 1, 2], [0, 2]):
        t, y0 = clock[rows].requires_grad_(), start[rows].requires_grad_()
        ys = solver(y0, t).ys
        failed = ys.isnan().any(dim=0).any(dim=1)
        loss = torch.where(ys.isnan(), 0.0, ys).pow(3).sum()
        (by_time,) = torch.autograd.grad(loss, t, create_graph=True)
        second = torch.autograd.grad((by_time * V[rows]).sum(), [t, y0, scale])
        _, along = torch.func.jvp(lambda t, y0=y0: solver(y0, t).ys, (t.detach(),), (V[rows],))
        good = ~failed
        assert len(rows) - int(good.sum()) == len(rows) - 2
        kept = [second[0][good], second[1][good], second[2], along[:, good]]
        found.append([by_time[good].detach(), *(one.detach() for one in kept)])
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
