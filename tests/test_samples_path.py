"""Independent samples between the ends of their steps, and at them: as in solves alone."""

import pytest
import torch
from test_samples import TIMES, Y0, Oscillator, gradients

import pnode

D = torch.float64
# With interpolants of their own; Hermite, with slopes inside; through states of partial steps.
CASES = [
    ("dopri5", None), ("tsit5", None), ("dopri5", 0.07), ("rk4", 0.06), ("bosh3", None),
    ("fehlberg5", None), ("verner7", None), ("rodaspr", None), ("es325", None), ("esdirk6", 0.25),
]  # fmt: skip
INSIDE = torch.tensor([[0.0, 0.1, 0.33, 0.9, 1.0]], dtype=D)


def inner(t):
    return t[:, :1] + (t[:, -1:] - t[:, :1]) * INSIDE


def solved(method, step, dense=True, **more):
    f = Oscillator()
    y0, t = Y0.clone().requires_grad_(), TIMES.clone().requires_grad_()
    options = {"method": method, "step_size": step, "compile": False, "rtol": 1e-4}
    options["dense"] = dense
    tight = {"jacobian_reuse": "iteration"} if method.startswith("es") else {}
    found = pnode.Solver(f, samples="independent", **options)(y0, t, **more)
    alone = pnode.Solver(f, **options, **tight)
    return f, y0, t, found, [alone(y0[row], t[row], **more) for row in range(3)]


def same(found, expected, *inputs, bound=1e-12):
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound, equal_nan=True)
    for one, other in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e3 * bound, atol=100 * bound)


@pytest.mark.parametrize(("method", "step"), CASES)
def test_rows_are_those_of_solves_alone(method, step):
    f, y0, t, found, alone = solved(method, step)
    same(found.ys, torch.stack([one.ys for one in alone], dim=1), y0, t, f.scale)
    assert found.stats.steps == sum(one.stats.steps for one in alone)
    when = inner(TIMES).requires_grad_()
    inputs = [y0, t, f.scale, when]
    for order, bound in (("__call__", 1e-12), ("derivative", 1e-11)):
        if order == "derivative":  # not in the short first step: round-off over its length squared
            when = when[:, 1:]
        expected = torch.stack(
            [getattr(one, order)(when[row]) for row, one in enumerate(alone)], dim=1
        )
        same(getattr(found, order)(when), expected, *inputs, bound=bound)
    before = torch.stack([one.derivative(inner(TIMES)[row], "before") for row, one in
                          enumerate(alone)], dim=1)  # fmt: skip
    # At the start round-off over the length of the first step.
    torch.testing.assert_close(found.derivative(inner(TIMES), "before"), before, rtol=1e-10,
                               atol=1e-9)  # fmt: skip
    assert torch.equal(found(TIMES)[[0, -1]], found.ys[[0, -1]])


@pytest.mark.parametrize(("method", "step"), [("dopri5", None), ("rk4", 0.06), ("rodaspr", None)])
@pytest.mark.parametrize("dense", [False, True])
def test_ends_of_steps(method, step, dense):
    f, y0, t, found, alone = solved(method, step, dense, at="steps")
    most = max(len(one.ts) for one in alone)
    assert found.ys.shape == (most, 3, 3) and found.ts.shape == (most, 3)
    # Adaptive steps are as long as errors say, in which round-off is 1e-16 of a state of size one,
    # and the tolerance 1e-8 to 1e-4 of it.
    bound = 1e-12 if step else 1e-8
    for row, one in enumerate(alone):
        number = len(one.ts)
        assert bool(found.ts[number:, row].isnan().all() and found.ys[number:, row].isnan().all())
        same(found.ys[:number, row], one.ys, y0, t, f.scale, bound=bound)
        same(found.ts[:number, row], one.ts, t, bound=bound)
        assert found.ts[0, row] == t[row, 0] and found.ts[number - 1, row] == t[row, -1]
    assert dense == (found.path is not None)
    with pytest.raises(pnode.ConfigurationError, match="dense=True"):
        solved("dopri5", None, False)[3](0.5)


def test_times_of_any_kind():
    """One time, times that rows share, with gradients; those outside are refused by the row."""
    y0 = torch.tensor([[1.0], [2.0]], dtype=D, requires_grad=True)
    solver = pnode.Solver(lambda t, y: -y, samples="independent", dense=True, rtol=1e-10)
    solution = solver(y0, [0.0, 1.0])
    assert solution(0.5).shape == (2, 1) and solution([0.5, 0.2, 0.1]).shape == (3, 2, 1)
    t = torch.tensor([0.3, 0.3, 1.0], dtype=D, requires_grad=True)
    exact = y0 * torch.exp(-t)[:, None, None]
    for found, expected in ((solution(t), exact), (solution.derivative(t), -exact)):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-7)
        for one, other in zip(gradients(found, y0, t), gradients(expected, y0, t), strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5)
    assert solution(torch.zeros(0)).shape == (0, 2, 1)
    for wrong, named in (
        (1.1, r"t = 1.1 is not in the interval of row 0"), (torch.nan, "t = nan"),
        (torch.tensor([[0.5], [-0.5]]), "interval of row 1"), (torch.zeros(3, 1), "give times of"),
    ):  # fmt: skip
        with pytest.raises(pnode.ConfigurationError, match=named):
            solution(wrong)
    one = solver(y0, torch.tensor([0.5]))
    assert torch.equal(one.ys, y0[None]) and torch.equal(one(0.5), y0)


def test_a_row_that_fails_is_unknown_from_there_on():
    y0 = torch.tensor([[0.5], [2.0], [-1.0]], dtype=D, requires_grad=True)
    for method in ("dopri5", "rodaspr"):
        solver = pnode.Solver(
            lambda t, y: y * y, samples="independent", dense=True, on_failure="nan", method=method
        )
        solution = solver(y0, [0.0, 0.25, 1.0])
        assert solution.ys.isnan()[..., 0].tolist() == [
            [False] * 3,
            [False] * 3,
            [False, True, False],
        ]
        known = solution([0.3, 0.9])
        assert known.isnan()[..., 0].tolist() == [[False] * 3, [False, True, False]]
        (found,) = torch.autograd.grad(known[0].sum() + known[1, [0, 2]].sum(), y0)
        exact = sum((1 / (1 - t * y0.detach()) ** 2 * on for t, on in (
            (0.3, torch.ones(3, 1)), (0.9, torch.tensor([[1.0], [0.0], [1.0]]))
        )))  # fmt: skip
        torch.testing.assert_close(found, exact.to(D), rtol=1e-4, atol=0.0)
    from_start = pnode.Solver(
        lambda t, y: torch.where(y > 1.2, torch.nan, y), samples="independent", dense=True,
        on_failure="nan", method="rk4", step_size=0.5,
    )(torch.tensor([[0.1], [1.1]], dtype=D), [0.0, 0.5])  # fmt: skip
    assert from_start(0.2).isnan()[:, 0].tolist() == [False, True]
    assert from_start(0.0).tolist() == [[0.1], [1.1]]


@pytest.mark.parametrize("rows", [{}, {"samples": "independent"}])
def test_a_slope_that_no_step_has_taken_may_not_be_finite(rows):
    """At t = 1 f is NaN: only outputs inside of the last step of the midpoint method ask for it."""
    solver = pnode.Solver(
        lambda t, y: -y * (1.0 - t) / (1.0 - t), method="midpoint", step_size=0.125, dense=True,
        compile=False, **rows,
    )  # fmt: skip
    exact = [[(1.0 - 0.125 + 0.125**2 / 2.0) ** n] for n in (0, 4, 7, 8)]
    solution = solver(torch.ones(1, 1, dtype=D), [0.0, 0.5, 0.875, 1.0])
    torch.testing.assert_close(solution.ys[..., 0], torch.tensor(exact, dtype=D))
    for asked in (lambda: solution([0.9]), lambda: solver(solution.ys[0], [0.0, 0.9, 1.0])):
        with pytest.raises(pnode.NonFiniteVectorField, match="at an end of th"):
            asked()


def test_rows_that_are_done_are_left_out_with_their_integrals():
    """Many rows of other lengths, a limit of memory, costs inside of steps."""
    rows = 12
    ends = torch.arange(1, rows + 1, dtype=D) ** 2 / 50
    t = torch.stack([torch.zeros(rows, dtype=D), 0.4 * ends, ends], dim=1)
    y0 = torch.ones(rows, 1, dtype=D, requires_grad=True)
    for method in ("dopri5", "es325"):
        found, limit = [], None
        for _ in range(2):
            solver = pnode.Solver(
                lambda t, y: -y, samples="independent", dense=True, cost=lambda t, y: y[:, 0],
                method=method, rtol=1e-7, atol=1e-8, checkpointing=limit,
            )  # fmt: skip
            solution = solver(y0, t)
            exact = 1.0 - torch.exp(-t.t())
            torch.testing.assert_close(solution.costs, exact, rtol=0.0, atol=1e-6)
            found.append(torch.autograd.grad(solution.costs[1].sum(), y0)[0])
            torch.testing.assert_close(found[-1][:, 0], exact[1], rtol=0.0, atol=1e-6)
            limit = solution.stats.ram_bytes // 2
        assert solution.stats.backward.recomputed
        torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_single_precision_and_complex_states():
    y0 = torch.tensor([[1.0 + 1j], [0.5 - 1j]], dtype=torch.complex64, requires_grad=True)
    solution = pnode.Solver(lambda t, y: 1j * y, samples="independent", dense=True)(y0, [0.0, 2.0])
    found = solution(0.7)
    turned = torch.tensor(0.7j).exp()
    assert found.dtype is torch.complex64
    torch.testing.assert_close(found, y0 * turned, rtol=1e-5, atol=1e-5)
    (by_y0,) = torch.autograd.grad(found.real.sum(), y0)
    torch.testing.assert_close(by_y0, turned.conj().expand(2, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dopri5", "rodas3"])
def test_a_changed_field_is_noticed(method):
    factor, rate = [1.0], torch.tensor(1.0, dtype=D, requires_grad=True)
    y0 = Y0.clone().requires_grad_()
    solver = pnode.Solver(
        lambda t, y: -factor[0] * rate * y, samples="independent", dense=True, method=method,
        params=[rate],
    )  # fmt: skip
    solution = solver(y0, [0.0, 0.5, 1.0])
    factor[0] = 2.0
    with pytest.raises(pnode.errors.FieldChanged):
        solution(0.4).sum().backward()
    factor[0] = 1.0
    solution = solver(y0, [0.0, 0.5, 1.0])
    with torch.no_grad():
        rate.mul_(2.0)
    with pytest.raises(pnode.errors.FieldChanged, match="written into"):
        solution(0.4)


def test_what_is_refused():
    y0 = Y0.clone().requires_grad_()
    for method in ("dopri5", "rodas3"):
        solver = pnode.Solver(lambda t, y: -y, samples="independent", dense=True, method=method)
        found = solver(y0, [0.0, 1.0])(0.4)
        with pytest.raises(pnode.BackwardError, match="second derivatives"):
            (first,) = torch.autograd.grad(found.sum(), y0, create_graph=True)
            torch.autograd.grad(first.sum(), y0)
    options = {"samples": "independent", "dense": True, "compile": True}
    with pytest.warns(UserWarning, match="dense=True"):
        pnode.Solver(lambda t, y: -y, **options)(Y0, [0.0, 1.0])
    with pytest.raises(pnode.ConfigurationError, match="dense=True"):
        pnode.Solver(lambda t, y: -y, method="bdf", **options)(Y0, [0.0, 1.0])


@pytest.mark.parametrize("method", ["rk4", "rodas3", "dopri5"])
def test_what_was_asked_without_a_graph_is_asked_again_with_one(method: str) -> None:
    p, steps = torch.tensor(1.0, dtype=D, requires_grad=True), {"step_size": 0.25}
    found = []
    for first in (True, False):
        y0 = torch.ones(2, 1, dtype=D, requires_grad=True)
        solver = pnode.Solver(
            lambda t, y: -p * y, params=[p], method=method, samples="independent", dense=True,
            **steps if method == "rk4" else {},
        )  # fmt: skip
        solution = solver(y0, torch.tensor([0.0, 1.0], dtype=D), at="steps")
        if first:
            with torch.no_grad():
                solution(0.4)
        found.append(torch.autograd.grad(solution.derivative(0.4).sum(), (p, y0)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["rk4", "trbdf2"])
def test_interpolants_are_those_of_the_field_that_was_solved(method: str) -> None:
    factor, steps = [1.0], {"step_size": 0.05} if method == "rk4" else {"rtol": 1e-9}
    solver = pnode.Solver(
        lambda t, y: -factor[0] * y, method=method, samples="independent", dense=True, **steps
    )
    with torch.no_grad():
        solution = solver(torch.ones(2, 1, dtype=D), [0.0, 1.0], at="steps")
        factor[0] = 3.0
        assert torch.allclose(solution(0.4), torch.tensor(0.4, dtype=D).neg().exp(), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, D])
def test_shapes_and_types_of_what_is_asked(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for at in ("times", "steps"):
        solver = pnode.Solver(lambda t, y: -y, samples="independent", dense=True)
        solution = solver(torch.ones(shape, dtype=dtype), torch.tensor([0.0, 0.5, 1.0]), at=at)
        assert solution.ys.dtype is dtype and solution.ys.shape[1:] == shape
        assert solution(0.4).shape == shape and solution([0.4]).shape == (1, *shape)
        assert solution([0.4, 0.5]).shape == (2, *shape) and solution(0.4).dtype is dtype
