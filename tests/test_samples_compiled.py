"""Independent samples in machine code: each row is what its solve alone is, on any number of
threads."""

import pytest
import torch
from test_samples import TIMES, Y0, Oscillator, gradients

import pnode

D = torch.float64


def independent(f, **options):
    return pnode.Solver(f, samples="independent", compile=True, **options)


# Explicit: FSAL, idle stages, fixed steps; theta; coupled stages; several steps.
CASES = [
    ("dopri5", None), ("bosh3", 0.05), ("verner8", None), ("es325", None), ("rodaspr", None),
    ("cn", 0.1), ("bdf", None), ("radau5", None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "step"), CASES)
def test_rows_are_those_of_solves_alone(method, step):
    f = Oscillator()
    y0, t = Y0.clone().requires_grad_(), TIMES.clone().requires_grad_()
    options = {"method": method, "step_size": step, "rtol": 1e-5}
    found = independent(f, **options)(y0, t)
    same = {} if method in ("bdf", "radau5") else {"samples": "independent"}
    # In torch; where that has no such rows, one after the other in machine code.
    solver = pnode.Solver(f, compile=not same, **options, **same)
    alone = [solver(y0, t)] if same else [solver(y0[row], t[row]) for row in range(3)]
    ys = alone[0].ys if same else torch.stack([one.ys for one in alone], dim=1)
    torch.testing.assert_close(found.ys, ys, rtol=1e-10, atol=1e-11)
    assert found.stats.steps == sum(one.stats.steps for one in alone)
    assert found.stats.rejected == sum(one.stats.rejected for one in alone)
    for one, other in zip(gradients(found.ys, y0, t, f.scale), gradients(ys, y0, t, f.scale),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_threads_give_the_same_bits():
    """150 rows in groups of three: sums over rows are in the same order whoever takes them."""
    f = Oscillator()
    y0 = Y0.repeat(50, 1) + torch.linspace(0.0, 0.5, 150, dtype=D)[:, None]
    y0.requires_grad_()
    solver, before, found = independent(f), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            ys = solver(y0, [0.0, 0.5, 1.0]).ys
            found.append((ys, *gradients(ys, y0, f.scale), *gradients(ys, y0, f.scale)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(found[0][1], found[0][3])  # a second backward sweep


def square(t, y):
    return y * y


@pytest.mark.parametrize("method", ["dopri5", "bdf"])
def test_a_row_that_fails(method):
    y0 = torch.tensor([[0.5], [2.0], [-1.0]], dtype=D, requires_grad=True)
    times = torch.tensor([0.0, 0.25, 1.0], dtype=D)
    kept = independent(square, method=method, on_failure="nan")(y0, times).ys
    assert bool(kept[2, 1].isnan().all())
    torch.testing.assert_close(kept[1], 1 / (1 / y0.detach() - 0.25), rtol=1e-3, atol=0.0)
    (found,) = torch.autograd.grad(kept[:, [0, 2]].sum() + kept[1].sum(), y0)
    alone = independent(square, method=method)(y0[[0, 2]], times).ys
    (expected,) = torch.autograd.grad(alone.sum() + alone[1].sum(), y0)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert abs(float(found[1]) - 1 / (1 - 0.25 * 2.0) ** 2) < 1e-2
    with pytest.raises(pnode.errors.StepSizeUnderflow, match="row 1 of y0") as error:
        independent(square, method=method)(y0, times)
    assert abs(error.value.time - 0.5) < 1e-2


def test_errors_name_the_row_and_the_cause():
    def f(t, y):
        return torch.where(y > 1.2, torch.nan, y)

    y0 = torch.tensor([[0.1], [1.0]], dtype=D)
    for options in ({"method": "rk4", "step_size": 0.1}, {"method": "dopri5"}):
        with pytest.raises(pnode.errors.NonFiniteVectorField, match="row 1 of y0"):
            independent(f, **options)(y0, [0.0, 1.0])
    with pytest.raises(pnode.errors.StepLimitReached, match="row 0 of y0"):
        independent(f, max_steps=1)(0.1 * y0, [0.0, 1.0])
    assert torch.equal(independent(f)(y0, [0.0]).ys[0], y0)  # no steps at all


def test_tolerances_of_rows():
    f, y0 = Oscillator(), Y0.clone().requires_grad_()
    atol = torch.tensor([[1e-3], [1e-6], [1e-9]], dtype=D).expand(3, 3)
    for method in ("dopri5", "bdf"):
        found = independent(f, method=method, rtol=1e-9, atol=atol)(y0, [0.0, 1.0])
        for row in range(3):
            alone = pnode.Solver(
                f, method=method, rtol=1e-9, atol=atol[row], compile=method == "bdf"
            )
            expected = alone(y0[row], [0.0, 1.0]).ys
            torch.testing.assert_close(found.ys[:, row], expected, rtol=1e-12, atol=1e-12)


def mixed(t, y):
    return -y + 0.1 * y.mean(dim=0)


def mixed_later(t, y):
    """Nothing of it is to be seen at the start, and at most times."""
    return torch.where((t > 0.45) & (t < 0.46), y.flip(0), -y)


def mixed_times(t, y):
    return -y * t.reshape(-1).flip(0)[:, None]


def sliced(t, y):
    return -torch.arange(1.0, 4.0, dtype=D)[: len(y), None] * y


def other_row(t, y):
    return torch.cat([-y[:1], -2.0 * y[1:]])


def looks(t, y):
    return -y if float(y.sum()) > 0 else y


FIELDS = [
    (mixed, "mixes rows"), (mixed_later, "mixes rows"),
    (mixed_times, "depends on others|mixes rows"),
    (sliced, "different things"), (other_row, "different things"), (looks, "depends on values"),
]  # fmt: skip


@pytest.mark.parametrize(("f", "reason"), FIELDS)
def test_fields_that_are_no_rows(f, reason):
    """They are not compiled: the solve goes on in torch, or there is an error where it cannot."""
    y0 = torch.tensor([[1.0, 2.0], [0.5, 3.0], [0.1, 0.2]], dtype=D)
    with pytest.warns(UserWarning, match="compile=True has no effect.*" + reason):
        if f is mixed:
            with pytest.raises(pnode.ConfigurationError, match="couples them"):
                independent(f, step_size=0.1, method="rk4")(y0, [0.0, 0.5])
        else:
            found = independent(f, step_size=0.1, method="rk4")(y0, [0.0, 0.5])
            expected = pnode.Solver(f, step_size=0.1, method="rk4", samples="independent")
            assert torch.equal(found.ys, expected(y0, [0.0, 0.5]).ys)
    with pytest.raises(pnode.ConfigurationError, match="method='bdf' with samples=.*" + reason):
        independent(f, method="bdf")(y0, [0.0, 0.5])


class Reactors(torch.nn.Module):
    """What belongs to rows (first, last, several dimensions) beside what they share."""

    def __init__(self, rows):
        super().__init__()
        noise = torch.linspace(0.1, 1.0, 40, dtype=D)
        self.rates = torch.nn.Parameter(noise[:rows].clone())
        self.couplings = torch.nn.Parameter(0.3 * noise[: 9 * rows].sin().view(rows, 3, 3))
        self.columns = torch.nn.Parameter(noise[: 3 * rows].cos().view(3, rows))
        self.shared = torch.nn.Parameter(torch.eye(3, dtype=D) + 0.1)
        self.bias = torch.nn.Parameter(torch.tensor([0.1, 0.2, -0.3], dtype=D))
        self.inner = torch.nn.Linear(3, 4, dtype=D)
        self.outer = torch.nn.Linear(4, 3, dtype=D)
        with torch.no_grad():
            for number, one in enumerate((*self.inner.parameters(), *self.outer.parameters())):
                one.copy_(0.1 * torch.arange(one.numel()).add(number).cos().view(one.shape))
        self.register_buffer("heat", 1.0 + noise[:rows, None])

    def forward(self, t, y):
        own = torch.bmm(self.couplings, y[..., None])[..., 0] + self.columns.t() * t
        net = self.outer(torch.tanh(self.inner(y)))
        return own - self.rates[:, None] * y @ self.shared + self.bias * self.heat + 0.1 * net

    def alone(self, t, y, args):
        """Return the field of one row; what belongs to the row is in ``args``."""
        coupling, column, rate, heat = args
        net = self.outer(torch.tanh(self.inner(y)))
        return coupling @ y + column * t - rate * y @ self.shared + self.bias * heat + 0.1 * net

    def of(self, row):
        """Return what belongs to a row."""
        return self.couplings[row], self.columns[:, row], self.rates[row], self.heat[row]


@pytest.mark.parametrize("rows", [4, 3])  # three rows of three entries: any axis may be theirs
@pytest.mark.parametrize(
    ("method", "step"), [("bosh3", None), ("cn", 0.2), ("rodaspr", None), ("bdf", None)]
)
def test_tensors_of_rows(method, step, rows):
    """Values and gradients are those of each row's solve alone, by what is its own and shared."""
    f, options = Reactors(rows), {"method": method, "step_size": step, "rtol": 1e-4}
    y0 = torch.linspace(-1.0, 1.0, 3 * rows, dtype=D).view(rows, 3).requires_grad_()
    times = torch.stack([torch.tensor([0.0, 0.3, 1.0 - 0.1 * k], dtype=D) for k in range(rows)])
    found = independent(f, **options)(y0, times).ys
    shared = [f.shared, f.bias, *f.inner.parameters(), *f.outer.parameters()]
    alone = pnode.Solver(f.alone, params=shared, compile=method == "bdf", **options)
    ys = torch.stack([alone(y0[k], times[k], f.of(k)).ys for k in range(rows)], dim=1)
    torch.testing.assert_close(found, ys, rtol=1e-9, atol=1e-10)
    inputs = (y0, *f.parameters())
    for one, other in zip(gradients(found, *inputs), gradients(ys, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    with torch.no_grad():  # values are read anew in each solve
        f.heat.mul_(2.0)
        again = independent(f, **options)(y0, times).ys
        assert float((again - found).abs().max()) > 0.01


def test_tensors_of_rows_in_args():
    """New ones in each call, and any number of rows: one program."""

    def f(t, y, args):
        return -args["k"] * y + args["n"] * t

    solver = independent(f, method="heun2", step_size=0.05)
    for rows in (2, 5, 5, 6):
        y0 = torch.ones(rows, 2, dtype=D)
        k = torch.linspace(0.5, 2.0, rows, dtype=D).view(rows, 1).requires_grad_()
        ys = solver(y0, [0.0, 1.0], {"k": k, "n": 0.5}).ys
        plain = pnode.Solver(f, method="heun2", step_size=0.05, samples="independent")
        expected = plain(y0, [0.0, 1.0], {"k": k, "n": 0.5}).ys
        torch.testing.assert_close(ys, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(*(gradients(one, k)[0] for one in (ys, expected)))
    compiler = solver._engine.row_compiler
    assert len(compiler._traces) == 3
    assert len(compiler.backends[0]._texts) == 1
    before = ys
    k.data.mul_(2.0)  # what is written into after the solve is noticed, in its own tensor
    with pytest.raises(pnode.errors.FieldChanged, match="written into"):
        before.sum().backward()


def test_tensors_that_f_has_besides_args():
    k = torch.tensor([[1.0], [2.0]], dtype=D, requires_grad=True)
    y0 = torch.ones(2, 1, dtype=D)
    solver = independent(lambda t, y, args: -k * args * y, method="heun2", step_size=0.05)
    found = solver(y0, [0.0, 1.0], k).ys
    plain = pnode.Solver(solver.rhs, method="heun2", step_size=0.05, samples="independent")
    (one,), (other,) = (gradients(ys, k) for ys in (found, plain(y0, [0.0, 1.0], k).ys))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_tuples():
    """A tuple of tensors of rows is the program of its entries."""

    def f(t, y):
        x, v = y
        return v[:, 0], torch.stack([-x + 0.1 * t[:, 0], -v[:, 1] * x], dim=1)

    def joined(t, y):
        x, v, w = y.unbind(-1)
        return torch.stack([v, -x + 0.1 * t.reshape(v.shape), -w * x], dim=-1)

    y0 = Y0.clone().requires_grad_()
    atol = torch.tensor([1e-4, 1e-6, 1e-8], dtype=D)
    solver = independent(f, atol=(torch.full((3,), 1e-4, dtype=D), atol[1:].expand(3, 2)))
    x, v = solver((y0[:, 0], y0[:, 1:]), TIMES).ys
    found = torch.cat([x[..., None], v], dim=2)
    expected = independent(joined, atol=atol.expand(3, 3))(y0, TIMES).ys
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        gradients(found, y0), gradients(expected, y0), rtol=1e-10, atol=1e-11
    )


def test_a_limit_of_memory():
    """What is enough is kept to; less is kept to in torch, with one reason, or refused."""
    f, y0 = Oscillator(), Y0.clone().requires_grad_()
    free = independent(f)(y0, TIMES)
    most = free.stats.ram_bytes
    assert most == 8 * 3 * 6 * free.stats.steps
    for limit in (most, most - 1):
        solver = independent(f, checkpointing=limit)
        if limit == most:
            found = solver(y0, TIMES)
            assert torch.equal(found.ys, free.ys)
        else:
            with pytest.warns(UserWarning, match="does not hold the steps of all samples") as seen:
                found = solver(y0, TIMES)
                solver(y0, TIMES)
            assert len(seen) == 1
        for one, other in zip(gradients(found.ys, y0, f.scale),
                              gradients(free.ys, y0, f.scale), strict=True):  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
        assert max(found.stats.ram_bytes, found.stats.backward.ram_bytes) <= limit
    with pytest.raises(pnode.errors.CheckpointError, match="raise memory"):
        independent(f, method="bdf", checkpointing=1000)(y0, TIMES)
    with torch.no_grad():  # nothing is kept
        independent(f, method="bdf", checkpointing=1000)(y0, TIMES)


def test_what_is_not_compiled():
    y0 = torch.ones(2, 2, dtype=D, requires_grad=True)
    for options, state, text in (
        ({"checkpointing": pnode.Checkpointing(store="solutions")}, y0, "checkpointing"),
        ({}, y0.float(), "float64"),
        ({}, y0 + 0j, "complex"), ({}, torch.ones(2, 40, dtype=D), "32 state entries"),
    ):  # fmt: skip
        with pytest.warns(UserWarning, match=text):
            independent(lambda t, y: -y, **options)(state, [0.0, 0.5])
    with pytest.raises(pnode.ConfigurationError, match="give compile=True"):
        pnode.Solver(lambda t, y: -y, method="bdf", samples="independent")


def test_numbers_that_change_and_undeclared_tensors():
    factor = [1.0]
    solver = independent(lambda t, y: -factor[0] * y)
    y0 = Y0.clone().requires_grad_()
    for factor[0] in (1.0, 2.0):
        ys = solver(y0, [0.0, 1.0]).ys
        torch.testing.assert_close(ys[-1], y0 * torch.tensor(-factor[0]).exp(), rtol=1e-4, atol=0)
    factor[0] = 3.0  # too late for this solve, which is code
    (found,) = torch.autograd.grad(ys[-1].sum(), y0)
    torch.testing.assert_close(found, torch.full_like(y0, -2.0).exp(), rtol=1e-4, atol=0)
    hidden = torch.tensor(1.0, dtype=D, requires_grad=True)
    with pytest.raises(pnode.ConfigurationError):
        independent(lambda t, y: -hidden * y)(y0, [0.0, 1.0])


def test_shapes_and_inference_mode():
    """Rows of one number each, and tensors that torch keeps no versions of."""
    with torch.inference_mode():
        y0 = torch.tensor([1.0, 2.0, -3.0], dtype=D)
        exact = y0 * torch.tensor(-0.5, dtype=D).exp()
        for options in ({"compile": True}, {"method": "es325"}):
            solver = pnode.Solver(lambda t, y: -t * y, samples="independent", **options)
            ys = solver(y0, [0.0, 1.0]).ys
            torch.testing.assert_close(ys[-1], exact, rtol=1e-4, atol=0.0)


class Scaled(torch.nn.Module):
    """y' = -n k y t, n a buffer of integers."""

    def __init__(self):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor([0.5, 1.5], dtype=D))
        self.register_buffer("n", torch.tensor(1))

    def forward(self, t, y):
        return -self.n * self.k * y * t


def test_numbers_that_are_written_into():
    f = Scaled()
    solver, y0 = independent(f), torch.tensor([[1.0, 2.0], [0.5, 0.1]], dtype=D)
    for number in (1, 3):
        f.n.fill_(number)  # part of the machine code's text
        ys = solver(y0, [0.0, 1.0]).ys
        expected = y0 * torch.exp(-0.5 * number * f.k)
        torch.testing.assert_close(ys[-1], expected, rtol=1e-5, atol=1e-7)
    f.k.data.mul_(3.0)
    with pytest.raises(pnode.errors.FieldChanged, match="written into"):
        ys.sum().backward()


def test_a_backward_sweep_after_one_that_was_interrupted(monkeypatch):
    """It begins anew: nothing of the first is left in its sums."""
    f, y0 = Oscillator(), Y0.repeat(20, 1).requires_grad_()
    ys = independent(f)(y0, [0.0, 1.0]).ys
    expected = gradients(ys, y0, f.scale)
    node = ys.grad_fn
    while not hasattr(node, "runs"):
        node = node.next_functions[0][0]
    sweep = node.runs[0].sweep._compiled
    library = sweep._library

    class Interrupting:
        def __getattr__(self, name):
            return getattr(library, name)

        def pnode_rows_reverse(self, *arguments):
            library.pnode_rows_reverse(*arguments[:-2], 0.0, arguments[-1])
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "_library", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        gradients(ys, y0, f.scale)
    monkeypatch.undo()
    for one, other in zip(gradients(ys, y0, f.scale), expected, strict=True):
        assert torch.equal(one, other)


def test_a_first_slope_that_is_not_finite():
    """A row that fails before its first step, of a method that takes the slope there."""

    def f(t, y):
        return torch.where(y > 1.2, torch.full_like(y, torch.nan), y)

    y0 = torch.tensor([[0.1], [2.0]], dtype=D)
    with pytest.raises(pnode.NonFiniteVectorField, match="row 1"):
        independent(f, method="radau5")(y0, [0.0, 1.0])


def test_more_stages_than_there_is_room_for():
    stages = 18
    A = [[1.0 / (i + 1)] * i for i in range(stages)]
    pnode.tableau("eighteen", A=A, b=[1.0 / stages] * stages, order=1)
    y0 = torch.tensor([[1.0]], dtype=D)
    with pytest.warns(UserWarning, match="more than 16 stages"):
        found = independent(lambda t, y: -y, method="eighteen", step_size=0.1)(y0, [0.0, 1.0])
    assert abs(found.ys[-1].item() - 0.37) < 0.1
