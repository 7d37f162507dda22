"""Independent samples with stiff methods, limits of memory, and rows that are left out."""

import pytest
import torch
from test_samples import TIMES, Y0, Oscillator, gradients

import pnode
from pnode.solvers.methods import find_method

D = torch.float64

# Rosenbrock: with df/dt; of W type; several matrices; an explicit stage. Newton: all kinds of ends.
CASES = [
    ("rodaspr", None), ("ra34pw2", 0.1), ("lassp3p4s2c", 0.03), ("rosw_ark3", None),
    ("es325", None), ("sdirk2", 0.1), ("dirk657a", 0.2), ("cn", 0.1),
    ("beuler", 0.1), ("implicit_midpoint", 0.1), ("cn", None), ("beuler", None),
    ("implicit_midpoint", None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "step"), CASES)
def test_rows_are_those_of_solves_alone(method, step):
    f = Oscillator()
    y0, t = Y0.clone().requires_grad_(), TIMES.clone().requires_grad_()
    # Of low order, whose steps are many.
    rtol = 1e-3 if method in ("beuler", "cn", "implicit_midpoint") else 1e-4
    options = {"method": method, "step_size": step, "compile": False, "rtol": rtol}
    found = pnode.Solver(f, samples="independent", **options)(y0, t)
    # With the Newton iterates of rows; both leave what Newton's tolerance does.
    tight = {} if find_method(method).linearly_implicit else {"jacobian_reuse": "iteration"}
    solver = pnode.Solver(f, **options, **tight)
    alone = [solver(y0[row], t[row]) for row in range(3)]
    ys = torch.stack([one.ys for one in alone], dim=1)
    # An ulp in y0 moves the second row by up to 4.5e-12 with ra34pw2's steps of 0.1 over its fast
    # part; LU of a batch and of one matrix differ by as much on some processors.
    close = 2e-11 if method == "ra34pw2" else 1e-12
    torch.testing.assert_close(found.ys, ys, rtol=close, atol=close)
    assert found.stats.steps == sum(one.stats.steps for one in alone)
    assert found.stats.rejected == sum(one.stats.rejected for one in alone)
    for one, other in zip(gradients(found.ys, y0, t, f.scale), gradients(ys, y0, t, f.scale),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def stiff(t, y):
    x, v, mu = y.unbind(-1)
    return torch.stack([v, mu * ((1 - x * x) * v - x), torch.zeros_like(mu)], dim=-1)


@pytest.mark.parametrize("method", ["rodaspr", "es325"])
def test_mixed_stiffness(method):
    """Rows between 1 and 1,000: each is what it is alone; others end early, and are left out."""
    damping = torch.logspace(0, 3, 9, dtype=D)
    y0 = torch.stack([torch.full_like(damping, 2.0), torch.zeros_like(damping), damping], dim=1)
    ends = torch.linspace(0.02, 0.7, 9, dtype=D).square()
    t = torch.stack([torch.zeros_like(ends), ends], dim=1)
    options = {"method": method, "compile": False, "rtol": 1e-3}
    y0.requires_grad_()
    found = pnode.Solver(stiff, samples="independent", **options)(y0, t)
    solver = pnode.Solver(stiff, **options)
    for row in (4, 8):
        alone = solver(y0[row], t[row])
        torch.testing.assert_close(found.ys[:, row], alone.ys, rtol=1e-9, atol=1e-11)
        one, other = (
            torch.autograd.grad(ys.sum(), y0, retain_graph=True)[0][row]
            for ys in (found.ys[:, row], alone.ys)
        )
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("method", ["dopri5", "rodas3", "es325"])
def test_rows_that_are_done_are_left_out(method):
    """Fewer rows reach f as others end, unless f has something of its own for each."""
    rows, sizes = 20, set()
    rate = torch.linspace(0.5, 2.0, rows, dtype=D)[:, None].requires_grad_()

    def gathered(t, y):
        sizes.add(len(y))
        return -y[:, 1:] * torch.cat([y[:, :1], 0.0 * y[:, 1:]], dim=1)

    def own(t, y):
        sizes.add(len(y))
        return -rate * torch.cat([y[:, :1], 0.0 * y[:, 1:]], dim=1)

    ends = torch.arange(1, rows + 1, dtype=D) ** 2 / 100
    t = torch.stack([torch.zeros(rows, dtype=D), ends], dim=1)
    y0 = torch.cat([torch.ones(rows, 1, dtype=D), rate.detach()], dim=1).requires_grad_()
    options = {"method": method, "samples": "independent", "rtol": 1e-4}
    first = pnode.Solver(gathered, **options)(y0, t)
    (by_y0,) = torch.autograd.grad(first.ys[-1, :, 0].sum(), y0)
    assert len(sizes) > 2 and min(sizes) < 5
    limited = pnode.Solver(gathered, checkpointing=6000, **options)(y0, t)
    (again,) = torch.autograd.grad(limited.ys[-1, :, 0].sum(), y0)
    torch.testing.assert_close(again, by_y0, rtol=1e-9, atol=1e-12)
    assert limited.stats.backward.recomputed and limited.stats.ram_bytes <= 6000
    sizes.clear()
    second = pnode.Solver(own, params=[rate], **options)(y0.detach(), t)
    (by_rate,) = torch.autograd.grad(second.ys[-1, :, 0].sum(), rate)
    torch.testing.assert_close(first.ys[..., 0], second.ys[..., 0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_y0[:, 1:], by_rate, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("method", ["dopri5", "rodas3", "es325"])
def test_limits_of_memory(method):
    f = Oscillator()

    def solved(limit):
        y0, t = Y0.clone().requires_grad_(), TIMES.clone()
        solver = pnode.Solver(
            f, samples="independent", method=method, checkpointing=limit, rtol=1e-3, atol=1e-5
        )
        solution = solver(y0, t)
        return gradients(solution.ys, y0, f.scale), solution.stats

    expected, free = solved(None)
    assert not free.backward.recomputed
    for limit in (free.ram_bytes // 2, free.ram_bytes // 4):
        found, stats = solved(limit)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert max(stats.ram_bytes, stats.backward.ram_bytes) <= limit
        assert stats.backward.recomputed
    found, stats = solved(pnode.Checkpointing(store="solutions"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert stats.ram_bytes <= free.ram_bytes
    with pytest.raises(pnode.errors.CheckpointError, match="limit of 300 bytes"):
        solved(300)


def square(t, y):
    return y * y


def test_a_row_that_fails():
    y0 = torch.tensor([[0.5], [2.0], [-1.0]], dtype=D, requires_grad=True)
    times = torch.tensor([0.0, 0.25, 1.0], dtype=D)
    for method in ("rodaspr", "es325"):
        options = {"samples": "independent", "method": method, "rtol": 1e-5}
        kept = pnode.Solver(square, on_failure="nan", **options)(y0, times)
        assert bool(kept.ys[2, 1].isnan().all())
        with pytest.raises(pnode.SolveError, match="row 1 of y0"):
            pnode.Solver(square, **options)(y0, times)
        alone = pnode.Solver(square, **options)(y0[[0, 2]], times)
        torch.testing.assert_close(kept.ys[:, [0, 2]], alone.ys, rtol=1e-13, atol=0.0)
        total = kept.ys[:, [0, 2]].sum() + kept.ys[1, 1].sum()
        (found,) = torch.autograd.grad(total, y0)
        start = y0.detach()
        assert bool((found[1] - 1 / (1 - 0.25 * start[1]) ** 2).abs() < 1e-3)
        exact = sum(1 / (1 - t * start[[0, 2]]) ** 2 for t in times)
        torch.testing.assert_close(found[[0, 2]], exact, rtol=1e-4, atol=1e-4)


def test_equations_without_solution():
    y0 = torch.tensor([[-1.0], [2.0]], dtype=D)
    options = {"samples": "independent", "method": "beuler", "step_size": 1.0}
    with pytest.raises(pnode.errors.NonlinearSolveFailed, match="row 1 of y0"):
        pnode.Solver(square, **options)(y0, [0.0, 1.0])
    kept = pnode.Solver(square, on_failure="nan", **options)(y0, [0.0, 1.0]).ys[1]
    golden = (1 - 5**0.5) / 2  # y = -1 + y^2
    assert abs(float(kept[0]) - golden) < 1e-12 and bool(kept[1].isnan())
    options |= {"method": "rosw_theta1"}  # I/h - J = 0
    with pytest.raises(pnode.errors.LinearSolveFailed, match="row 1 of y0"):
        pnode.Solver(lambda t, y: y * y.detach(), **options)(
            torch.tensor([[3.0], [1.0]], dtype=D), [0.0, 1.0]
        )
    with pytest.raises(pnode.errors.NonFiniteVectorField, match="row 1 of y0"):
        pnode.Solver(lambda t, y: torch.where(y > 1.0, torch.nan, y), **options)(2 * y0, [0.0, 0.1])


@pytest.mark.parametrize("method", ["trbdf2", "es325", "sdirk2", "cn"])
def test_short_steps_before_a_row_fails_leave_the_others_their_gradient(method):
    """Its steps end up at round-off of t, where a slope (y - z) / h is nothing but round-off."""

    def gradient(*start):
        y0, k = torch.tensor(start, dtype=D)[:, None], torch.tensor(1.1, dtype=D)
        y0, k = y0.requires_grad_(), k.requires_grad_()
        found = pnode.Solver(
            lambda t, y: torch.where(y < 3.0, k * y * y, torch.nan), params=[k], method=method,
            samples="independent", on_failure="nan", rtol=1e-3,
        )(y0, [0.0, 1.0]).ys[1, :, 0]  # fmt: skip
        assert found.isnan().tolist() == [False, True][: len(start)]
        return [*torch.autograd.grad(found[0], (y0, k))]

    (by_start, by_k), (start, k) = gradient(0.5, 2.0), gradient(0.5)
    torch.testing.assert_close(by_start, torch.cat([start, torch.zeros_like(start)]))
    torch.testing.assert_close(by_k, k)


def test_coupled_rows_are_refused():
    def f(t, y):
        return y.mean(dim=0, keepdim=True) - y

    for method in ("rodaspr", "es325"):
        with pytest.raises(pnode.ConfigurationError, match="couples them"):
            pnode.Solver(f, method=method, samples="independent")(Y0, [0.0, 1.0])


def test_hidden_time_is_told():
    def f(t, y):
        return torch.sin(5.0 * t.detach()) - y

    with pytest.warns(RuntimeWarning, match="depends on t"):
        pnode.Solver(f, method="rodaspr", samples="independent", rtol=1e-3)(Y0, [0.0, 0.3])


def test_single_precision():
    f, t = Oscillator().float(), TIMES.float()
    y0 = Y0.float().requires_grad_()
    for method in ("rodaspr", "es325"):
        options = {"method": method, "rtol": 1e-3, "atol": 1e-4, "compile": False}
        found = pnode.Solver(f, samples="independent", **options)(y0, t).ys[:, 1]
        alone = pnode.Solver(f, **options)(y0[1], t[1]).ys
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        one, other = (torch.autograd.grad(ys.sum(), y0)[0][1] for ys in (found, alone))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_changed_field_is_noticed():
    factor = [1.0]
    for method in ("rodas3", "es325"):
        factor[0] = 1.0
        y0 = Y0.clone().requires_grad_()
        solver = pnode.Solver(lambda t, y: -factor[0] * y, method=method, samples="independent")
        ys = solver(y0, [0.0, 1.0]).ys
        factor[0] = 2.0
        with pytest.raises(pnode.errors.FieldChanged):
            ys.sum().backward()


@pytest.mark.parametrize("method", ["rodaspr", "rodas3", "es325"])
def test_a_row_that_is_done_takes_no_step_out_of_the_domain(method):
    """Others go on; a step of any length from where it ends would give NaN."""
    p = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([[0.5], [2.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.0, 0.6], [0.0, 0.04], [0.0, 0.6]], dtype=torch.float64)
    solver = pnode.Solver(
        lambda t, y: torch.where(y > 2.2, torch.nan, p * y * y), params=[p], method=method,
        step_size=0.1, samples="independent",
    )  # fmt: skip
    together = torch.autograd.grad(solver(y0, t).ys[-1].sum(), (p, y0))
    rows = [solver(y0[i : i + 1], t[i : i + 1]).ys[-1].sum() for i in range(3)]
    for one, other in zip(together, torch.autograd.grad(sum(rows), (p, y0)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0.0)
