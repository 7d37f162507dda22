"""Solves in parts between break points beside everything else that a solve can have."""

import gc
import math
import weakref

import pytest
import torch

import pnode
from pnode import controls
from pnode.solvers.methods import METHODS

D = torch.float64
BREAKS = torch.tensor([0.4, 0.8], dtype=D)
TIMES = torch.tensor([0.0, 0.3, 0.8, 1.2], dtype=D)
VALUES = torch.tensor([1.0, -2.0, 0.5], dtype=D)
U = controls.hold(torch.tensor([0.0, 0.4, 0.8], dtype=D), VALUES)


def vector(*numbers):
    return torch.tensor(numbers, dtype=D)


class Field(torch.nn.Module):
    """y' = -a y^3 + u(t), with u for one part alone if it is given."""

    def __init__(self, a=None, u=None):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(1.3, dtype=D)) if a is None else a
        self.given = u

    def forward(self, t, y):
        u = U(t) if self.given is None else self.given
        return -self.a * y**3 + u


def solver(field, **options):
    options = {"method": "rk4", "step_size": 0.05, **options}
    return pnode.Solver(field, params=[field.a], compile=False, **options)


def chained(field, y0, times, breaks, **options):
    """Outputs at 0, 0.3, 0.8 and 1.2, by three solves; that at the break is of its own time."""
    first = solver(Field(field.a, VALUES[0]), **options)(
        y0, torch.stack([times[0], times[1], breaks[0]])
    ).ys
    own = solver(Field(field.a, VALUES[1]), **options)
    second = own(first[-1], torch.stack([breaks[0], times[2]])).ys
    again = own(first[-1], torch.stack([breaks[0], breaks[1]])).ys
    third = solver(Field(field.a, VALUES[2]), **options)
    last = third(again[-1], torch.stack([breaks[1], times[3]])).ys
    return torch.stack([y0, first[1], second[-1], last[-1]])


WEIGHTS = torch.linspace(1.0, 2.0, 4, dtype=D)[:, None]


def test_output_at_a_break_is_of_its_own_time():
    """It moves with its own time, and not with the break; later states do it the other way."""
    field = Field()
    y0, times = vector(0.5).requires_grad_(), TIMES.clone().requires_grad_()
    breaks = BREAKS.clone().requires_grad_()
    ys = solver(field)(y0, times, breakpoints=breaks).ys
    expected = chained(field, y0, times, breaks)
    torch.testing.assert_close(ys, expected, rtol=0.0, atol=0.0)
    for weights in (WEIGHTS, WEIGHTS * vector(0.0, 0.0, 1.0, 0.0)[:, None]):
        wanted = (y0, times, breaks, field.a)
        found = torch.autograd.grad((weights * ys).sum(), wanted, retain_graph=True)
        right = torch.autograd.grad((weights * expected).sum(), wanted, retain_graph=True)
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
    assert found[2][1] == 0.0 and found[1][2] != 0.0


def test_second_derivatives_and_forward_mode():
    """By everything at once, breaks and times included."""
    field = Field()

    def gradients(solve):
        y0, times = vector(0.5).requires_grad_(), TIMES.clone().requires_grad_()
        breaks = BREAKS.clone().requires_grad_()
        wanted = (y0, times, breaks, field.a)
        loss = (WEIGHTS * solve(y0, times, breaks)).square().sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        mixed = sum((one * one.detach().cos()).sum() for one in first)
        return [*first, *torch.autograd.grad(mixed, wanted)]

    own = solver(field)
    found = gradients(lambda y0, t, b: own(y0, t, breakpoints=b).ys)
    right = gradients(lambda y0, t, b: chained(field, y0, t, b))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    moved = (vector(0.7), vector(0.0, 0.1, -0.2, 0.3), vector(0.5, -0.4))

    def outputs(y0, times, breaks):
        return own(y0, times, breakpoints=breaks).ys

    given = (vector(0.5), TIMES, BREAKS)
    _, tangent = torch.func.jvp(outputs, given, moved)
    rows = [torch.func.vjp(outputs, *given)[1](torch.eye(4, dtype=D)[i][:, None]) for i in range(4)]
    along = [sum((g * v).sum().item() for g, v in zip(row, moved, strict=True)) for row in rows]
    torch.testing.assert_close(tangent[:, 0], torch.tensor(along, dtype=D), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "memory", "store"),
    [("rk4", 200, "auto"), ("rk4", 200, "solutions"), ("es325", 200, "auto"), ("bdf", 2500, "auto"),
     ("dopri5", 300, "disk"), ("rk4", None, "tape"), ("rk4", None, "stages")],
)  # fmt: skip
def test_budgets(method, memory, store, tmp_path):
    """The limit holds for all parts together, and the gradient is that without."""
    chosen = pnode.Checkpointing(
        memory, tmp_path if store == "disk" else None, "auto" if store == "disk" else store
    )
    options = {"method": method, "step_size": 0.02 if method == "rk4" else None, "rtol": 1e-5}

    def gradients(checkpointing):
        field, y0, breaks = Field(), vector(0.5).requires_grad_(), BREAKS.clone().requires_grad_()
        own = solver(field, checkpointing=checkpointing, **options)
        solution = own(y0, TIMES, breakpoints=breaks)
        found = torch.autograd.grad((WEIGHTS * solution.ys).sum(), (y0, breaks, field.a))
        return solution.stats, found

    free, expected = gradients(None)
    stats, found = gradients(chosen)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert stats.steps == free.steps == stats.backward.steps
    if memory is None:
        assert stats.backward.recomputed == 0
    else:
        assert 0 < stats.ram_bytes + stats.tape_bytes <= memory < free.ram_bytes
        assert stats.backward.recomputed > 0
        plenty = 4 * (free.ram_bytes + free.tape_bytes)
        recomputed = gradients(pnode.Checkpointing(memory=plenty))[0].backward.recomputed
        assert (recomputed == 0) is (method != "bdf")
    assert not any(tmp_path.iterdir())


def test_second_backward_and_ledger():
    field, y0 = Field(), vector(0.5).requires_grad_()
    solution = solver(field)(y0, TIMES, breakpoints=BREAKS)
    first = torch.autograd.grad(solution.ys.sum(), y0, retain_graph=True)[0]
    assert (solution.stats.steps, solution.stats.rhs) == (24, 96)
    assert (solution.stats.backward.steps, solution.stats.backward.vjp) == (24, 96)
    again = torch.autograd.grad(solution.ys.sum(), y0)[0]
    assert torch.equal(first, again)
    assert solution.stats.backward.steps == 48 and solution.stats.backward.recomputed == 24


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_dense_output(method):
    """Interpolated outputs between breaks, with derivatives by them."""
    times = torch.linspace(0.0, 1.2, 13, dtype=D)
    options = {"method": method, "step_size": None, "rtol": 1e-7, "atol": 1e-8}

    def solve(dense, times, y0, field, breaks):
        return solver(field, dense=dense, **options)(y0, times, breakpoints=breaks)

    field = Field()
    y0, breaks = vector(0.5).requires_grad_(), BREAKS.clone().requires_grad_()
    moving = times.clone().requires_grad_()
    dense = solve(True, moving, y0, field, breaks)
    hit = solve(False, moving, y0, field, breaks)
    torch.testing.assert_close(dense.ys, hit.ys, rtol=0.0, atol=1e-5)
    weights = torch.linspace(1.0, 2.0, 13, dtype=D)[:, None]
    wanted = (y0, breaks, moving, field.a)
    found = torch.autograd.grad((weights * dense.ys).sum(), wanted)
    right = torch.autograd.grad((weights * hit.ys).sum(), wanted)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert dense.stats.steps < hit.stats.steps


def test_events_of_several_parts():
    """y climbs, falls and climbs: it passes 0.6 three times; once the third ends the solve."""

    def f(t, y):
        return U(t).to(y) + 0.0 * y

    y0, breaks = vector(0.4).requires_grad_(), BREAKS.clone().requires_grad_()
    level = pnode.Event(lambda t, y: y[0] - 0.6, terminal=False)
    low = pnode.Event(lambda t, y: y[0] - 0.05, direction=1)
    own = pnode.Solver(f, method="rk4", step_size=0.1, event_fn=[level, low])
    solution = own(y0, vector(0.0, 0.4, 0.5, 1.0, 2.0), breakpoints=breaks)
    # y = 0.4 + t, then 0.8 - 2 (t - 0.4), then 0.5 (t - 0.8) from 0.
    assert solution.reason == "event" and solution.event == 1
    torch.testing.assert_close(solution.ts, vector(0.0, 0.4, 0.5, 0.9), rtol=0.0, atol=1e-11)
    torch.testing.assert_close(solution.ys[:, 0], vector(0.4, 0.8, 0.6, 0.05))
    torch.testing.assert_close(solution.events[0].times, vector(0.2, 0.5), rtol=0.0, atol=1e-11)
    torch.testing.assert_close(solution.events[1].states[:, 0], vector(0.05))
    # The end: y0 + b0 - 2 (b1 - b0) + (T - b1) / 2 = 0.05.
    found = torch.autograd.grad(solution.event_time, (y0, breaks), retain_graph=True)
    torch.testing.assert_close(found[0], vector(-2.0))
    torch.testing.assert_close(found[1], vector(-6.0, 5.0))
    # The second crossing: y0 + b0 - 2 (T - b0) = 0.6.
    found = torch.autograd.grad(solution.events[0].times[1], (y0, breaks))
    torch.testing.assert_close(found[0], vector(0.5))
    torch.testing.assert_close(found[1], vector(1.5, 0.0))


def test_event_at_a_break_is_found_once():
    seen = pnode.Event(lambda t, y: y[0] - 0.8, terminal=False)
    own = pnode.Solver(
        lambda t, y: U(t).to(y) + 0.0 * y, method="rk4", step_size=0.1, event_fn=seen
    )
    turned = own(vector(0.4), vector(0.0, 1.2), breakpoints=BREAKS)
    assert len(turned.events[0].times) <= 1
    through = pnode.Solver(
        lambda t, y: 1.0 + U(t).to(y).abs() + 0.0 * y, method="rk4", step_size=0.1,
        event_fn=pnode.Event(lambda t, y: y[0] - 0.8, terminal=False),
    )  # fmt: skip
    solution = through(vector(0.0), vector(0.0, 1.2), breakpoints=BREAKS)
    torch.testing.assert_close(solution.events[0].times, vector(0.4))


def test_states_costs_and_args():
    """A dict with a complex entry, a cost integral, and a call's own tensors."""

    def f(t, y, args):
        return {"z": 1j * y["z"] + U(t), "x": -args["k"] * y["x"] + U(t)}

    def cost(t, y, args):
        return args["k"] * y["x"] ** 2 + U(t)

    y0 = {"z": torch.tensor([1.0 + 0.5j], dtype=torch.complex128), "x": vector(0.3, 0.4)}
    k = torch.tensor(0.7, dtype=D, requires_grad=True)

    def solve(parts, k):
        own = pnode.Solver(f, cost=cost, method="rk4", step_size=0.05)
        if parts:
            solution = own(y0, TIMES, {"k": k}, breakpoints=BREAKS)
            return solution.ys["z"][-1], solution.ys["x"][-1], solution.costs
        y, costs, total = y0, [torch.zeros(2, dtype=D)], 0.0
        for value, times in zip(VALUES, ([0.0, 0.3, 0.4], [0.4, 0.8], [0.8, 1.2]), strict=True):
            field = pnode.Solver(
                lambda t, y, a, u=value: {"z": 1j * y["z"] + u, "x": -a["k"] * y["x"] + u},
                cost=lambda t, y, a, u=value: a["k"] * y["x"] ** 2 + u,
                method="rk4",
                step_size=0.05,
            )
            solution = field(y, vector(*times), {"k": k})
            costs += list(total + solution.costs[1:])
            total = costs[-1]
            y = {name: part[-1] for name, part in solution.ys.items()}
        return y["z"], y["x"], torch.stack([costs[i] for i in (0, 1, 3, 4)])

    found, expected = solve(True, k), solve(False, k)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)
    one, other = (
        torch.autograd.grad(z.real.sum() + x.sum() + costs.sum(), k)[0]
        for z, x, costs in (found, expected)
    )
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0.0)


def test_algebraic_unknowns_jump_with_f():
    """x' = z, 0 = z - u(t): z follows u, at once."""

    def f(t, y):
        return torch.stack([y[1], y[1] - U(t).to(y)])

    given = {"mass": vector(1.0, 0.0), "method": "radau5", "step_size": 0.1}
    own = pnode.Solver(f, consistent_start=True, **given)
    y0 = vector(0.0, 9.0).requires_grad_()
    ys = own(y0, vector(0.0, 0.4, 0.6, 1.2), breakpoints=BREAKS).ys
    torch.testing.assert_close(ys[1:, 0], vector(0.4, 0.0, -0.2))
    torch.testing.assert_close(ys[:, 1], vector(1.0, 1.0, -2.0, 0.5))
    torch.testing.assert_close(
        torch.autograd.grad(ys[-1, 0], y0)[0], vector(1.0, 0.0), rtol=0.0, atol=1e-14
    )
    with pytest.raises(pnode.ConfigurationError, match=r"break at t = 0\.4.*consistent_start=True"):
        pnode.Solver(f, **given)(vector(0.0, 1.0), vector(0.0, 1.2), breakpoints=BREAKS)


def test_which_error_estimates_come_over_a_jump_of_an_algebraic_unknown():
    """Where it jumps by 1 behind a step's start, h K_i = A^-1 1 for stages that are solved for."""
    found = set()
    for method in METHODS:
        scheme = method.scheme
        if method.ts_type == "dirk" and scheme.b_embedded is not None:
            first = int(scheme.A[0][0] == 0.0)
            A = torch.tensor(scheme.A, dtype=D)[first:, first:]
            slopes = torch.linalg.solve(A, torch.ones(len(A), dtype=D))
            defect = torch.tensor(scheme.b_embedded, dtype=D) - torch.tensor(scheme.b, dtype=D)
            if abs(float(defect[first:] @ slopes)) < 1e-12:
                found.add(method.name)
    assert found == {"esdirk3", "es325"}  # as docs/problems.md has it


def test_imex_residual_and_symplectic():
    times = vector(0.0, 1.2)
    split = pnode.Solver(
        implicit=lambda t, y: -2.0 * y, explicit=lambda t, y: U(t).to(y) + 0.0 * y, method="ark3",
        step_size=0.05,
    )(vector(0.5), times, breakpoints=U).ys[-1]  # fmt: skip
    residual = pnode.Solver(
        residual=lambda t, y, yp: yp + 2.0 * y - U(t).to(y), method="bdf", rtol=1e-8
    )(vector(0.5), times, breakpoints=U).ys[-1]
    y = 0.5
    for value in VALUES.tolist():
        y = value / 2.0 + (y - value / 2.0) * math.exp(-0.8)
    torch.testing.assert_close(split, vector(y), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(residual, vector(y), rtol=0.0, atol=1e-6)
    q, p = pnode.Solver(
        lambda t, y: (y[1], U(t).to(y[0]) + 0.0 * y[0]), method="velocity_verlet", step_size=0.05
    )((vector(0.0), vector(0.0)), times, breakpoints=BREAKS).ys
    torch.testing.assert_close(p[-1], vector(0.4 * float(VALUES.sum())))
    torch.testing.assert_close(q[-1], vector(0.08 + 0.0 + (-0.16 + 0.04)))


def test_steps_are_counted_through():
    seen = []
    own = solver(Field(), monitor=lambda step, t, y: seen.append((step, t)), max_steps=24)
    own(vector(0.5), TIMES, breakpoints=BREAKS)
    assert [step for step, _ in seen] == list(range(1, 25))
    assert [t for _, t in seen] == sorted(t for _, t in seen)
    with pytest.raises(pnode.StepLimitReached, match=r"max_steps=23.*step 23") as caught:
        solver(Field(), max_steps=23)(vector(0.5), TIMES, breakpoints=BREAKS)
    assert caught.value.step == 23 and caught.value.time == pytest.approx(1.15)


class Constrained(Field):
    """With p = y^2 + u beside it, which jumps at breaks."""

    def forward(self, t, y):
        rate = super().forward(t, y[:1])
        return torch.cat([rate, y[1:] - y[:1] ** 2 - U(t)])


@pytest.mark.parametrize("mode", ["forward", "adjoint"])
@pytest.mark.parametrize("constrained", [False, True])
def test_sensitivities_across_breaks(constrained, mode):
    """Break times are constants, also where there is no derivative by them."""
    more = {"mass": vector(1.0, 0.0), "consistent_start": True, "method": "cn"}
    field, start = (Constrained(), (0.5, 0.0)) if constrained else (Field(), (0.5,))
    own = solver(field, **more) if constrained else solver(field)
    found = pnode.sensitivities(own, vector(*start), TIMES, ("y0", "a"), mode, BREAKS)
    y0 = vector(*start).requires_grad_()
    ys = own(y0, TIMES, breakpoints=BREAKS).ys
    by_y0, by_a = torch.autograd.grad(ys[-1].sum(), (y0, field.a))
    torch.testing.assert_close(found["y0"][-1].sum(0), by_y0, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(found["a"][-1].sum(), by_a, rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("options", [{"method": "dopri5"}, {"method": "rk4", "step_size": 0.03},
                                     {"method": "bdf", "compile": False}])  # fmt: skip
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("late", [0.0, 1e-16, -1e-16, 1e-12, -1e-12, 1e-9, -1e-9])
def test_events_next_to_a_break_are_found_once(options, terminal, late):
    """y' = 1 from ``late`` meets 0.5 at 0.5 - late, a break at 0.5."""
    event = pnode.Event(lambda t, y: y[0] - 0.5, terminal=terminal)
    own = pnode.Solver(lambda t, y: torch.ones_like(y), event_fn=event, **options)
    solution = own(vector(late), vector(0.0, 0.2, 1.0), breakpoints=[0.5])
    assert solution.events[0].times.tolist() == pytest.approx([0.5 - late], abs=1e-12)
    assert solution.reason == ("event" if terminal else "t_end")


def test_a_jump_of_the_event_function_is_an_event():
    event = pnode.Event(lambda t, y: U(t) + 0.0 * y[0], terminal=False)
    own = pnode.Solver(lambda t, y: -y, method="rk4", step_size=0.1, event_fn=event)
    found = own(vector(0.5), vector(0.0, 1.2), breakpoints=U).events[0].times
    torch.testing.assert_close(found, BREAKS, rtol=0.0, atol=1e-11)


def test_an_event_without_end_comes_after_a_break():
    def f(t, y):
        return U(t).to(y) + 0.0 * y

    time, ys = pnode.odeint_event(
        f, vector(0.5), vector(0.0), event_fn=lambda t, y: y[0] - 1.0, breakpoints=BREAKS
    )
    torch.testing.assert_close(time, torch.tensor(2.6, dtype=D))  # 0.5 + 0.4 - 0.8 + 1.8 / 2
    torch.testing.assert_close(ys[-1], vector(1.0))


def test_a_module_that_keeps_its_solution_is_freed():
    field = Field()
    field.path = solver(field)(vector(0.5), TIMES, breakpoints=BREAKS)
    gone = weakref.ref(field)
    del field
    gc.collect()
    assert gone() is None
