"""Failures: typed errors that say where, the user's own exceptions, and a solver that lives on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import pnode

# Without graphs from the forward sweep f is evaluated, and can fail, on the way back.
STAGES = pnode.Checkpointing(store="stages")
SOLVERS = {
    "rk4": {"method": "rk4", "step_size": 0.1, "checkpointing": STAGES},
    "rk4-graphs": {"method": "rk4", "step_size": 0.1},
    "dopri5": {"method": "dopri5", "first_step": 0.1, "checkpointing": STAGES},
    "cn-dense": {"method": "cn", "step_size": 0.1, "jacobian": "dense"},
    "cn-matrix-free": {"method": "cn", "step_size": 0.1, "jacobian": "matrix-free"},
    "midpoint-adaptive": {"method": "implicit_midpoint", "rtol": 1e-3, "first_step": 0.1},
}
EVALUATING = [name for name in SOLVERS if name != "rk4-graphs"]
FIXED = ["rk4", "cn-dense", "cn-matrix-free"]
EXPLICIT = ["heun2", "bosh3", "fehlberg2", "fehlberg5", "dopri5", "verner8"]


def each_solver(names=SOLVERS):
    return pytest.mark.parametrize("name", list(names))


def state(*values, grad=False, dtype=torch.float64):
    return torch.tensor(values or (1.0, 0.5, -0.3), dtype=dtype, requires_grad=grad)


def times(*values):
    return torch.tensor(values or (0.0, 0.5, 1.0), dtype=torch.float64)


class Decay(torch.nn.Module):
    """A nonlinear decay that does something else once ``intrude`` is set."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.intrude = None
        self.calls_before = 0

    def forward(self, t, y):
        if self.intrude is not None:
            if self.calls_before == 0:
                return self.intrude(t, y)
            self.calls_before -= 1
        return -self.rate * y * (1.0 + 0.1 * y**2)


def value_and_gradients(solver, y0=None):
    """Solve, differentiate, and return everything that must be the same the next time."""
    y0 = state(grad=True) if y0 is None else y0
    ys = solver(y0, times()).ys
    gradients = torch.autograd.grad(ys.square().sum(), [y0, *solver.parameters()])
    return [ys.detach(), *gradients]


def assert_same(after, before):
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def assert_says_where(error, method):
    """Check that attributes and message agree on time, step and method."""
    assert error.method == method and isinstance(error.step, int) and math.isfinite(error.time)
    message = str(error)
    assert f"t = {error.time!r}" in message
    assert f"step {error.step}" in message
    assert f"method {method!r}" in message


# Exceptions of the user's code.


class Boom(Exception):
    pass


def out_of_memory():
    return torch.OutOfMemoryError("out of memory (pretended)")


EXCEPTIONS = {
    "custom": Boom,
    "keyboard-interrupt": KeyboardInterrupt,
    "system-exit": SystemExit,
    "out-of-memory": out_of_memory,
    "stop-iteration": StopIteration,
}


def raiser(error):
    def intrude(t, y):
        raise error

    return intrude


@each_solver()
def test_exception_in_forward_surfaces_as_itself(name):
    field = Decay()
    solver = pnode.Solver(field, **SOLVERS[name])
    before = value_and_gradients(solver)
    for kind, calls_before in itertools.product(EXCEPTIONS, (0, 1, 7)):
        error = EXCEPTIONS[kind]()
        field.intrude, field.calls_before = raiser(error), calls_before
        with pytest.raises(type(error)) as caught:
            solver(state(grad=True), times())
        assert caught.value is error, (kind, calls_before)
        field.intrude = None
        assert_same(value_and_gradients(solver), before)


@each_solver(EVALUATING)
def test_exception_in_backward_surfaces_as_itself(name):
    field = Decay()
    solver = pnode.Solver(field, **SOLVERS[name])
    before = value_and_gradients(solver)
    for kind, calls_before in itertools.product(EXCEPTIONS, (0, 1, 3)):
        ys = solver(state(grad=True), times()).ys
        error = EXCEPTIONS[kind]()
        field.intrude, field.calls_before = raiser(error), calls_before
        with pytest.raises(type(error)) as caught:
            ys.square().sum().backward()
        assert caught.value is error, (kind, calls_before)
        field.intrude = None
        assert_same(value_and_gradients(solver), before)


@each_solver()
def test_backward_succeeds_after_one_that_was_interrupted(name):
    field = Decay()
    solver = pnode.Solver(field, **SOLVERS[name])
    y0 = state(grad=True)
    ys = solver(y0, times()).ys
    (expected,) = torch.autograd.grad(ys.square().sum(), y0, retain_graph=True)
    field.intrude, field.calls_before = raiser(Boom()), 2
    with pytest.raises(Boom):
        torch.autograd.grad(ys.square().sum(), y0, retain_graph=True)
    field.intrude = None
    (again,) = torch.autograd.grad(ys.square().sum(), y0)
    torch.testing.assert_close(again, expected, rtol=1e-13, atol=1e-14)


class Fragile(torch.autograd.Function):
    """The identity; its derivative raises what ``error`` holds."""

    error: BaseException | None = None

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        if Fragile.error is not None:
            raise Fragile.error
        return gradient


@pytest.mark.parametrize("kind", list(EXCEPTIONS))
@each_solver()
def test_exception_in_a_derivative_surfaces_as_itself(name, kind, monkeypatch):
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    solver = pnode.Solver(lambda t, y: -rate * Fragile.apply(y), params=[rate], **SOLVERS[name])

    def solve():
        y0 = state(grad=True)
        ys = solver(y0, times()).ys
        return [ys.detach(), *torch.autograd.grad(ys.square().sum(), [y0, rate])]

    before = solve()
    error = EXCEPTIONS[kind]()
    monkeypatch.setattr(Fragile, "error", error)
    with pytest.raises(type(error)) as caught:
        solve()
    assert caught.value is error
    monkeypatch.setattr(Fragile, "error", None)
    assert_same(solve(), before)


@each_solver()
def test_exception_keeps_its_cause(name):
    def intrude(t, y):
        try:
            {}["missing"]
        except KeyError as error:
            raise Boom("no such entry") from error

    field = Decay()
    field.intrude = intrude
    with pytest.raises(Boom) as caught:
        pnode.Solver(field, **SOLVERS[name])(state(), times())
    assert isinstance(caught.value.__cause__, KeyError)


@each_solver()
def test_exception_in_the_monitor_surfaces_as_itself(name):
    error = Boom()

    def monitor(step, t, y):
        if step == 2 and armed:
            raise error

    armed = False
    solver = pnode.Solver(Decay(), monitor=monitor, **SOLVERS[name])
    before = value_and_gradients(solver)
    armed = True
    with pytest.raises(Boom) as caught:
        value_and_gradients(solver)
    assert caught.value is error
    armed = False
    assert_same(value_and_gradients(solver), before)


# What f may not return, and may not do.

WRONG_RESULTS = {
    "shape": (lambda t, y: y[:-1], r"shape \(2,\).*state of \(3,\)"),
    "extra-dimension": (lambda t, y: y[None], r"shape \(1, 3\)"),
    "scalar": (lambda t, y: y.sum(), r"shape \(\)"),
    "dtype": (lambda t, y: y.float(), r"float32.*float64"),
    "complex": (lambda t, y: y.to(torch.complex128), "complex128"),
    "integer": (lambda t, y: y.long(), "int64"),
    "device": (lambda t, y: y.to("meta"), "meta.*cpu"),
    "none": (lambda t, y: None, r"NoneType.*return one of shape \(3,\)"),
    "float": (lambda t, y: 1.0, "float"),
    "numpy": (lambda t, y: y.detach().numpy(), "ndarray"),
    "tuple": (lambda t, y: (y,), r"tuple.*torch\.stack"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("wrong", list(WRONG_RESULTS))
@each_solver()
def test_wrong_result_is_refused(name, wrong, grad):
    intrude, message = WRONG_RESULTS[wrong]
    field = Decay()
    solver = pnode.Solver(field, **SOLVERS[name])
    before = value_and_gradients(solver)
    field.intrude = intrude
    with torch.set_grad_enabled(grad), pytest.raises(pnode.VectorFieldError, match=message) as info:
        solver(state(grad=grad), times())
    assert isinstance(info.value, RuntimeError)
    assert 0.0 <= info.value.time <= 0.1
    field.intrude = None
    assert_same(value_and_gradients(solver), before)


@each_solver(EVALUATING)
def test_wrong_result_in_backward_is_refused(name):
    field = Decay()
    ys = pnode.Solver(field, **SOLVERS[name])(state(grad=True), times()).ys
    field.intrude = WRONG_RESULTS["shape"][0]
    with pytest.raises(pnode.VectorFieldError, match="shape"):
        ys.sum().backward()


@pytest.mark.parametrize(
    "result",
    [lambda t, y: (y[0],), lambda t, y: y[0], lambda t, y: (y[1], y[0]), lambda t, y: (y[0], 1.0)],
    ids=["too-few", "one-tensor", "swapped", "float"],
)
@each_solver(["rk4", "cn-dense"])
def test_wrong_tuple_is_refused(name, result):
    with pytest.raises(pnode.VectorFieldError):
        pnode.Solver(result, **SOLVERS[name])((state(), state(1.0)), times())


def write_directly(t, y):
    y.mul_(2.0)
    return -y


def write_through_a_view(t, y):
    y.reshape(-1)[0] = 3.0
    return -y


def write_out(t, y):
    torch.neg(y.detach(), out=y.detach())
    return y


WRITERS = {"direct": write_directly, "view": write_through_a_view, "out": write_out}


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("writer", list(WRITERS))
@each_solver()
def test_field_that_writes_into_its_input_is_refused(name, writer, grad):
    field = Decay()
    solver = pnode.Solver(field, **SOLVERS[name])
    before = value_and_gradients(solver)
    field.intrude = WRITERS[writer]
    y0 = state(grad=grad)
    with torch.set_grad_enabled(grad), pytest.raises(pnode.VectorFieldError, match="wrote into"):
        solver(y0, times())
    assert torch.equal(y0, state())
    field.intrude = None
    assert_same(value_and_gradients(solver), before)


@each_solver(["rk4", "cn-dense"])
def test_field_that_writes_into_one_part_of_a_tuple_is_refused(name):
    def field(t, y):
        y[1].add_(1.0)
        return (-y[0], -y[1])

    with pytest.raises(pnode.VectorFieldError, match="wrote into"):
        pnode.Solver(field, **SOLVERS[name])((state(), state(1.0)), times())


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("writer", list(WRITERS))
@each_solver()
def test_field_that_starts_writing_later_is_refused(name, writer, grad):
    field = Decay()
    field.intrude, field.calls_before = WRITERS[writer], 6
    with torch.set_grad_enabled(grad), pytest.raises(pnode.VectorFieldError, match="wrote into"):
        pnode.Solver(field, **SOLVERS[name])(state(grad=grad), times())


@each_solver()
def test_field_that_overwrites_a_state_it_kept(name):
    """f may have kept y, so a checkpoint is not the tensor f got, or the writing is noticed."""
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def solve(overwrites):
        kept, y0 = [], state(grad=True)

        def field(t, y):
            if overwrites:
                if len(kept) > 3:
                    kept[-3].zero_()
                kept.append(y.detach())
            return -rate * y * (1.0 + 0.1 * y**2)

        ys = pnode.Solver(field, params=[rate], **SOLVERS[name])(y0, times()).ys
        overwrites = False
        return [ys.detach(), *torch.autograd.grad(ys.square().sum(), [y0, rate])]

    expected = solve(overwrites=False)
    try:
        result = solve(overwrites=True)
    except RuntimeError:  # pnode's VectorFieldError, or torch's own
        return
    assert_same(result, expected)


@each_solver(EVALUATING)
def test_field_that_starts_writing_in_backward_is_refused(name):
    field = Decay()
    ys = pnode.Solver(field, **SOLVERS[name])(state(grad=True), times()).ys
    field.intrude = write_directly
    with pytest.raises(pnode.VectorFieldError, match="wrote into"):
        ys.sum().backward()


# Changes between forward and backward: torch's own check.


def change_state(y0, field):
    y0.mul_(2.0)


def change_parameter(y0, field):
    field.rate.mul_(2.0)


@pytest.mark.parametrize("change", [change_state, change_parameter], ids=["state", "parameter"])
@each_solver()
def test_tensor_changed_before_backward_is_torchs_error(name, change):
    field, y0 = Decay(), state(grad=True)
    solver = pnode.Solver(field, **SOLVERS[name])
    ys = solver(y0, times()).ys
    with torch.no_grad():
        change(y0, field)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as info:
        ys.sum().backward()
    assert not isinstance(info.value, pnode.PnodeError)
    value_and_gradients(solver)


def test_frozen_state_changed_before_backward_is_torchs_error():
    field, y0 = Decay(), state()
    ys = pnode.Solver(field, **SOLVERS["rk4"])(y0, times()).ys
    y0.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_frozen_parameter_changed_before_backward_is_torchs_error():
    field = Decay()
    field.rate.requires_grad_(False)
    ys = pnode.Solver(field, **SOLVERS["rk4"])(state(grad=True), times()).ys
    field.rate.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_output_changed_before_a_gradient_with_respect_to_time_is_torchs_error():
    t = times().requires_grad_()
    ys = pnode.Solver(Decay(), **SOLVERS["rk4"])(state(), t).ys
    loss = ys.square().sum()
    with torch.no_grad():
        ys.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Second derivatives.


@each_solver()
def test_create_graph_alone_gives_first_derivatives(name):
    field, y0 = Decay(), state(grad=True)
    solver = pnode.Solver(field, **SOLVERS[name])
    _, *expected = value_and_gradients(solver)
    loss = solver(y0, times()).ys.square().sum()
    gradients = torch.autograd.grad(loss, [y0, field.rate], create_graph=True)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.equal(gradient.detach(), wanted)


LOSSES = {"linear": torch.Tensor.sum, "quadratic": lambda ys: ys.square().sum()}


@pytest.mark.parametrize("source", ["state", "parameter", "time"])
@pytest.mark.parametrize("loss", list(LOSSES))
@each_solver(["rk4", "cn-dense"])
def test_second_derivative(name, loss, source):
    """Against a difference of gradients, also of what comes to the loss besides the solve."""
    field, y0, t = Decay(), state(), times()
    if source == "time":
        t *= 0.2
    field.rate.requires_grad_(source == "parameter")
    wanted = {"state": y0, "parameter": field.rate, "time": t}[source].requires_grad_()
    # By time the derivative is that of the exact flow, h^2 away: steps are small, and as many for
    # either end of the difference.
    options = SOLVERS[name] | {"step_size": 0.00201 if source == "time" else 0.1}
    solver = pnode.Solver(field, **options)

    def slope(create_graph):
        total = LOSSES[loss](solver(y0, t).ys) + wanted.pow(3).sum()
        (first,) = torch.autograd.grad(total, wanted, create_graph=create_graph)
        return first.sum()

    (found,) = torch.autograd.grad(slope(True), wanted)
    along = torch.linspace(0.5, 1.0, wanted.numel(), dtype=torch.float64).view(wanted.shape)
    ends = []
    for factor in (1e-5, -2e-5):
        with torch.no_grad():
            wanted.add_(factor * along)
        ends.append(float(slope(False)))
    expected = (ends[0] - ends[1]) / 2e-5
    assert float((found * along).sum()) == pytest.approx(expected, rel=1e-6)


# Newton's method and Krylov methods.


def wiggle(t, y):
    """A field on which Newton's method needs small steps."""
    return 40.0 * torch.sin(5.0 * y)


def test_newton_failure_at_a_fixed_step():
    hard = False
    solver = pnode.Solver(
        lambda t, y: wiggle(t, y) if hard else -y,
        method="cn", step_size=0.5, petsc_options={"snes_max_it": 3},
    )  # fmt: skip
    before = solver(state(), times()).ys
    hard = True
    with pytest.raises(pnode.NonlinearSolveFailed, match="Newton") as info:
        solver(state(), times())
    assert_says_where(info.value, "cn")
    assert (info.value.time, info.value.step) == (0.0, 0)
    assert info.value.reason == "DIVERGED_MAX_IT" and info.value.reason in str(info.value)
    hard = False
    assert torch.equal(solver(state(), times()).ys, before)


def test_newton_failure_names_the_later_step_in_the_users_time():
    def field(t, y):
        return torch.where(t < -0.45, wiggle(t, y), y)

    with pytest.raises(pnode.NonlinearSolveFailed) as info:
        pnode.Solver(field, method="cn", step_size=0.25, petsc_options={"snes_max_it": 3})(
            state(), times(0.0, -1.0)
        )
    assert_says_where(info.value, "cn")
    assert (info.value.time, info.value.step) == (-0.25, 1)


@pytest.mark.parametrize("jacobian", ["dense", "matrix-free"])
def test_newton_failure_with_adaptive_steps_is_tried_again(jacobian):
    y0 = state(0.1)
    solution = pnode.Solver(
        wiggle, method="cn", first_step=0.2, rtol=1e-6, jacobian=jacobian,
        petsc_options={"snes_max_it": 3},
    )(y0, times(0.0, 0.2))  # fmt: skip
    reference = pnode.odeint(wiggle, y0, times(0.0, 0.2), rtol=1e-10, atol=1e-10)
    assert solution.stats.rejected > 0
    torch.testing.assert_close(solution.ys[-1], reference[-1], rtol=1e-3, atol=0.0)


def test_newton_failure_that_smaller_steps_do_not_cure():
    with pytest.raises(pnode.StepSizeUnderflow) as info:
        pnode.Solver(
            wiggle, method="cn", first_step=0.5, min_step=0.3, petsc_options={"snes_max_it": 2}
        )(state(), times())
    assert_says_where(info.value, "cn")
    assert isinstance(info.value.__cause__, pnode.NonlinearSolveFailed)


def coupled(size=8):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return lambda t, y: y @ matrix.T - y


def test_krylov_failure():
    solver = pnode.Solver(
        coupled(), method="cn", step_size=0.5, jacobian="matrix-free",
        petsc_options={"ksp_max_it": 1},
    )  # fmt: skip
    for _ in range(2):
        with pytest.raises(pnode.LinearSolveFailed) as info:
            solver(torch.ones(8, dtype=torch.float64), times())
        assert_says_where(info.value, "cn")
        assert info.value.reason == "DIVERGED_MAX_IT"


def test_krylov_failure_with_adaptive_steps_is_tried_again():
    y0 = torch.ones(8, dtype=torch.float64)
    solution = pnode.Solver(
        coupled(), method="cn", first_step=0.5, rtol=1e-4, jacobian="matrix-free",
        petsc_options={"ksp_max_it": 3},
    )(y0, times())  # fmt: skip
    assert solution.stats.rejected > 0
    reference = pnode.odeint(coupled(), y0, times())
    torch.testing.assert_close(solution.ys, reference, rtol=1e-2, atol=1e-2)


def test_krylov_failure_in_the_adjoint():
    # The adjoint wants a far smaller residual than one iterate of Newton's method.
    solver = pnode.Solver(
        coupled(), method="cn", step_size=0.1, jacobian="matrix-free",
        petsc_options={"ksp_max_it": 6},
    )  # fmt: skip
    y0 = torch.ones(8, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        ys = solver(y0, times()).ys
        with pytest.raises(pnode.LinearSolveFailed, match="transposed") as info:
            ys.sum().backward()
        assert_says_where(info.value, "cn")
        assert info.value.step == 9
        assert info.value.reason == "DIVERGED_MAX_IT"


# NaN and infinity.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each_solver(FIXED)
def test_nonfinite_field_at_a_fixed_step_stops_at_once(name, bad):
    calls_after = 0
    armed = True

    def field(t, y):
        nonlocal calls_after
        if armed and t > 0.42:
            calls_after += 1
            return torch.full_like(y, bad) * y.abs()
        return -y

    solver = pnode.Solver(field, **SOLVERS[name])
    with pytest.raises(pnode.NonFiniteVectorField, match="NaN or infinity") as info:
        solver(state(), times())
    assert_says_where(info.value, solver.method)
    assert info.value.step == 4
    assert info.value.time == pytest.approx(0.4)
    assert calls_after <= 4
    armed = False
    assert torch.isfinite(solver(state(), times()).ys).all()


def near_the_solution(t, y):
    """y' = -y with y(0) = 1, defined in a neighbourhood of the solution only."""
    return torch.where((y - torch.exp(-t)).abs() < 0.3, -y, math.nan)


def check_near_the_solution(field, **keywords):
    y0, t = state(1.0, grad=True), times(0.0, 1.9)
    solver = pnode.Solver(field, rtol=1e-4, **keywords)
    solution = solver(y0, t)
    assert solution.stats.rejected > 0
    assert solution.ys[-1].item() == pytest.approx(math.exp(-1.9), abs=2e-3)
    (gradient,) = torch.autograd.grad(solution.ys[-1].sum(), y0)
    assert gradient.item() == pytest.approx(math.exp(-1.9), abs=2e-3)
    assert torch.equal(solver(y0, t).ys, solution.ys)


@pytest.mark.parametrize("name", EXPLICIT)
def test_domain_left_by_a_trial_step_only(name):
    check_near_the_solution(near_the_solution, method=name, first_step=1.9)


@pytest.mark.parametrize("jacobian", ["dense", "matrix-free"])
@pytest.mark.parametrize("name", ["cn", "implicit_midpoint"])
def test_domain_left_by_a_newton_iterate_only(name, jacobian):
    def field(t, y):
        # Newton's method starts from the last state, which is outside from t = 1 on.
        width = 1e-3 if t > 1.0 else 0.3
        return torch.where((y - torch.exp(-t)).abs() < width, -y, math.nan)

    check_near_the_solution(field, method=name, jacobian=jacobian)


@pytest.mark.parametrize("name", ["heun2", "bosh3", "fehlberg5", "dopri5", "bosh5", "verner7"])
def test_square_root_left_by_a_trial_step_only(name):
    solution = pnode.Solver(lambda t, y: -torch.sqrt(y), method=name, first_step=1.9)(
        state(1.0), times(0.0, 1.9)
    )
    assert solution.stats.rejected > 0
    assert solution.ys[-1].item() == pytest.approx((1.0 - 0.95) ** 2, abs=1e-5)


@pytest.mark.parametrize("name", EXPLICIT)
def test_trial_step_that_overflows_is_tried_again(name):
    solution = pnode.Solver(lambda t, y: -50.0 * y**3, method=name, first_step=1.0)(
        state(1.0), times(0.0, 1.0)
    )
    assert solution.stats.rejected > 0
    assert solution.ys[-1].item() == pytest.approx(101.0**-0.5, rel=1e-3)


@pytest.mark.parametrize("start", [0.0, 0.3], ids=["everywhere", "later"])
@pytest.mark.parametrize("name", ["dopri5", "bosh3", "cn"])
def test_nonfinite_field_that_smaller_steps_do_not_cure(name, start):
    def field(t, y):
        return torch.where(t >= start, math.nan, -y)

    with pytest.raises(pnode.NonFiniteVectorField) as info:
        pnode.Solver(field, method=name, rtol=1e-3)(state(), times())
    assert_says_where(info.value, name)
    assert info.value.time == pytest.approx(start, abs=1e-10)


# Step sizes.


@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", ["dopri5", "bosh3", "cn"])
def test_singularity_underflows_the_step_size(name, direction):
    hard = True
    solver = pnode.Solver(
        lambda t, y: direction * y * y if hard else -y, method=name, rtol=1e-3, atol=1e-6
    )
    with pytest.raises(pnode.StepSizeUnderflow) as info:
        solver(state(1.0), times(0.0, direction * 2.0))
    assert_says_where(info.value, name)
    assert info.value.time == pytest.approx(direction, abs=0.1)
    hard = False
    assert solver(state(1.0), times()).ys[-1].item() == pytest.approx(math.exp(-1.0), abs=1e-2)


def test_min_step_stops_the_controller():
    with pytest.raises(pnode.StepSizeUnderflow, match=r"0\.05|5\.00e-02") as info:
        pnode.Solver(lambda t, y: -1000.0 * y, min_step=0.05)(state(), times())
    assert_says_where(info.value, "dopri5")


@each_solver()
def test_max_steps(name):
    steps = []
    solver = pnode.Solver(
        Decay(), max_steps=4, monitor=lambda *arguments: steps.append(arguments),
        **SOLVERS[name] | ({} if "step_size" in SOLVERS[name] else {"max_step": 0.1}),
    )  # fmt: skip
    with pytest.raises(pnode.StepLimitReached, match="max_steps=4") as info:
        solver(state(), times())
    assert_says_where(info.value, solver.method)
    assert info.value.step == len(steps) == 4
    assert info.value.time == steps[-1][1]


def test_max_steps_that_just_suffice():
    solver = pnode.Solver(Decay(), method="rk4", step_size=0.1, max_steps=10)
    assert solver(state(), times()).stats.steps == 10


# Trainable tensors that nobody declared.


def closed_over_leaf():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    return lambda t, y: -weight * y


def closed_over_result():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    scaled = 2.0 * weight
    return lambda t, y: -scaled * y


def closed_over_module():
    return Decay().forward


def attribute_of_a_module():
    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = {"module": Decay()}

        def forward(self, t, y):
            return self.hidden["module"](t, y)

    return Field()


UNDECLARED = {
    "leaf": closed_over_leaf,
    "result": closed_over_result,
    "module": closed_over_module,
    "nested-module": attribute_of_a_module,
}


@pytest.mark.parametrize("grad", [False, True], ids=["frozen-state", "state"])
@pytest.mark.parametrize("kind", list(UNDECLARED))
@each_solver()
def test_undeclared_trainable_tensor_is_refused(name, kind, grad):
    solver = pnode.Solver(UNDECLARED[kind](), **SOLVERS[name])
    for _ in range(2):
        with pytest.raises(pnode.ConfigurationError, match=r"params=\[\.\.\.\]"):
            solver(state(grad=grad), times())
    with torch.no_grad():
        assert torch.isfinite(solver(state(grad=grad), times()).ys).all()


def test_undeclared_sibling_of_a_declared_tensor_is_refused():
    weights = torch.tensor([0.5, 0.7], dtype=torch.float64, requires_grad=True)
    first, second = weights.unbind()  # two outputs of one node
    with pytest.raises(pnode.ConfigurationError, match="params"):
        pnode.Solver(lambda t, y: -first * second * y, params=[first], **SOLVERS["rk4"])(
            state(), times()
        )


@each_solver()
def test_graph_outside_of_the_field_survives_or_is_refused(name):
    # exp keeps its result for the backward pass, which the field's VJPs must not free.
    weight = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    rate = weight.exp()
    solver = pnode.Solver(lambda t, y: -rate * y, params=[weight], **SOLVERS[name])
    try:
        ys = solver(state(), times()).ys
    except pnode.ConfigurationError:
        return
    (gradient,) = torch.autograd.grad(ys[-1].sum(), weight)
    expected = -(rate * torch.exp(-rate) * state().sum()).item()
    assert gradient.item() == pytest.approx(expected, rel=1e-2)


@each_solver()
def test_detached_tensor_needs_no_declaration(name):
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y0 = state(grad=True)
    ys = pnode.Solver(lambda t, y: -weight.detach() * y, **SOLVERS[name])(y0, times()).ys
    ys.sum().backward()
    assert weight.grad is None and y0.grad is not None


def test_every_error_is_a_pnode_error():
    for name in pnode.__all__:
        item = getattr(pnode, name)
        if isinstance(item, type) and issubclass(item, Exception):
            assert issubclass(item, pnode.PnodeError)
    assert issubclass(pnode.ConfigurationError, ValueError)
    assert issubclass(pnode.SolveError, RuntimeError)
