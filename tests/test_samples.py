"""Independent samples: each row is what its solve alone is, and so are its gradients."""

import pytest
import torch

import pnode

D = torch.float64


class Oscillator(torch.nn.Module):
    """Van der Pol with a damping that the row brings along, and a force."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.3, dtype=D))

    def forward(self, t, y):
        x, v, mu = y.unbind(-1)
        force = torch.cos(t.reshape(t.shape[:1])) if t.dim() else torch.cos(t)
        rate = mu * self.scale * (1 - x * x) * v - x + 0.3 * force
        return torch.stack([v, rate, torch.zeros_like(mu)], dim=-1)


Y0 = torch.tensor([[2.0, 0.0, 0.5], [1.0, -1.0, 8.0], [0.3, 0.2, 3.0]], dtype=D)
TIMES = torch.tensor([[0.0, 0.7, 2.0], [0.5, 0.6, 3.0], [1.0, 0.2, -0.4]], dtype=D)
FIXED = [("euler", 0.01), ("rk4", 0.03), ("dopri5", 0.03)]
CASES = [*FIXED, ("dopri5", None), ("bosh3", None), ("tsit5", None), ("fehlberg5", None)]


def gradients(ys, *tensors):
    weights = torch.linspace(-1.0, 2.0, ys.numel(), dtype=D).view(ys.shape)
    return torch.autograd.grad((weights * ys).sum(), tensors, retain_graph=True)


@pytest.mark.parametrize(("method", "step"), CASES)
def test_rows_are_those_of_solves_alone(method, step):
    f = Oscillator()
    y0, t = Y0.clone().requires_grad_(), TIMES.clone().requires_grad_()
    options = {"method": method, "step_size": step, "compile": False}
    found = pnode.Solver(f, samples="independent", **options)(y0, t)
    alone = [pnode.Solver(f, **options)(y0[row], t[row]) for row in range(3)]
    ys = torch.stack([one.ys for one in alone], dim=1)
    torch.testing.assert_close(found.ys, ys, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.ts, t.t())
    assert found.stats.steps == sum(one.stats.steps for one in alone)
    assert found.stats.rejected == sum(one.stats.rejected for one in alone)
    for one, other in zip(gradients(found.ys, y0, t, f.scale), gradients(ys, y0, t, f.scale),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_shared_output_times():
    f, y0 = Oscillator(), Y0.clone()
    t = torch.tensor([0.0, 0.5, 1.0], dtype=D, requires_grad=True)
    solver = pnode.Solver(f, samples="independent")
    found = solver(y0, t)
    again = solver(y0, t.expand(3, 3))
    assert torch.equal(found.ys, again.ys)
    assert found.ts.shape == (3, 3)
    assert torch.equal(*(gradients(one.ys, t)[0] for one in (found, again)))


@pytest.mark.parametrize("step", [0.05, None])
def test_a_row_that_fails(step):
    def square(t, y):
        return y * y

    y0 = torch.tensor([[0.5], [2.0], [-1.0]], dtype=D, requires_grad=True)
    times = torch.tensor([0.0, 0.25, 1.0], dtype=D)
    options = {"samples": "independent", "step_size": step, "max_steps": 10_000}
    kept = pnode.Solver(square, on_failure="nan", **options)(y0, times)
    good = [0, 2]
    if step is None:  # fixed steps may jump over the pole
        assert bool(kept.ys[2, 1].isnan().all())
        with pytest.raises(pnode.SolveError, match="row 1 of y0"):
            pnode.Solver(square, **options)(y0, times)
    alone = pnode.Solver(square, **options)(y0[good], times)
    assert torch.equal(kept.ys[:, good], alone.ys)
    (found,) = torch.autograd.grad(kept.ys[:, good].sum() + kept.ys[1].sum(), y0)
    (expected,) = torch.autograd.grad(alone.ys.sum() + alone.ys[1].sum(), y0)
    assert torch.equal(found[good], expected[good])
    exact = 1 / (1 - 0.25 * 2.0) ** 2
    assert abs(float(found[1]) - exact) < 1e-3


def test_nonfinite_row_is_named():
    def f(t, y):
        return torch.where(y > 1.2, torch.nan, y)

    y0 = torch.tensor([[0.1], [1.0]], dtype=D)
    with pytest.raises(pnode.errors.NonFiniteVectorField, match="row 1 of y0"):
        pnode.Solver(f, method="rk4", step_size=0.1, samples="independent")(y0, [0.0, 1.0])
    with pytest.raises(pnode.errors.StepLimitReached, match="row 0 of y0"):
        pnode.Solver(f, samples="independent", max_steps=1)(0.1 * y0, [0.0, 1.0])


REFUSED = [
    ({"method": "ra3pw"}, "method='ra3pw'"), ({"method": "radau5"}, "method='radau5'"),
    ({"method": "bdf"}, "method='bdf'"),
    ({"checkpointing": pnode.Checkpointing(store="tape")}, "checkpointing: store='tape'"),
    ({"checkpointing": pnode.Checkpointing(memory=99, disk="/tmp")}, "checkpointing: disk="),
    ({"method": "es325", "jacobian": "dense"}, "jacobian='dense'"),
    ({"event_fn": lambda t, y: y}, "event_fn="), ({"controller": "pi"}, "controller="),
    ({"gradient": "continuous"}, "gradient="), ({"monitor": print}, "monitor="),
    ({"petsc_options": {"ts_monitor": None}}, "petsc_options"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "named"), REFUSED)
def test_what_is_refused(options, named):
    with pytest.raises(pnode.ConfigurationError, match=named):
        solver = pnode.Solver(lambda t, y: -y, samples="independent", **options)
        solver(Y0, [0.0, 1.0])


def test_bad_input():
    solver = pnode.Solver(lambda t, y: -y, samples="independent")
    with pytest.raises(pnode.ConfigurationError, match=r"t has shape \(2, 2\)"):
        solver(Y0, torch.zeros(2, 2))
    with pytest.raises(pnode.ConfigurationError, match=r"in row 2"):
        solver(Y0, torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]]))
    with pytest.raises(pnode.ConfigurationError, match=r"y0 has the shapes \[\(3, 3\), \(2, 3\)\]"):
        solver((Y0, Y0[:2]), [0.0, 1.0])
    with pytest.raises(pnode.ConfigurationError, match="on_failure='nan'"):
        pnode.Solver(lambda t, y: -y, on_failure="nan")
    with pytest.raises(pnode.ConfigurationError, match="samples='all'"):
        pnode.Solver(lambda t, y: -y, samples="all")


def normalized(t, y):
    return (y - y.mean(0)) / y.std(0)


def neighbour(t, y):
    return -y + 1e-3 * torch.cat([y[4:5], torch.zeros_like(y[1:])])


def softmax(t, y):
    return torch.softmax(y, 0)


def to_the_mean(t, y):
    return y.detach().mean() - y


@pytest.mark.parametrize("f", [normalized, neighbour, softmax, to_the_mean])
@pytest.mark.parametrize("differentiate", [True, False])
def test_rows_that_depend_on_others_are_refused(f, differentiate):
    y0 = torch.linspace(-1.0, 2.0, 18, dtype=D).view(6, 3).requires_grad_(differentiate)
    for step in (0.1, None):
        solver = pnode.Solver(f, samples="independent", step_size=step)
        with pytest.raises(pnode.ConfigurationError, match=r"couples them \(row \d moves"):
            solver(y0, [0.0, 1.0])


def test_rows_that_come_to_depend_on_others_are_refused():
    norm = torch.nn.BatchNorm1d(3, dtype=D, track_running_stats=True).eval()
    solver = pnode.Solver(lambda t, y: norm(y), samples="independent", params=norm.parameters())
    y0 = torch.linspace(-1.0, 2.0, 18, dtype=D).view(6, 3)
    solver(y0, [0.0, 1.0])
    norm.train()
    before = {name: each.clone() for name, each in norm.named_buffers()}
    with pytest.raises(pnode.ConfigurationError, match="couples them"):
        solver(y0, [0.0, 1.0])
    assert int(norm.num_batches_tracked) == 1  # of the solve's own evaluation
    assert torch.allclose(norm.running_mean, 0.9 * before["running_mean"] + 0.1 * y0.mean(0))


class Counting(torch.nn.Module):
    """Counts its calls, and draws a number in each."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, t, y):
        self.calls += 1
        self.drawn = torch.rand(1)
        return -y


@pytest.mark.parametrize("keywords", [
    {"samples": "independent", "compile": False}, {"method": "rk4", "compile": True}
])  # fmt: skip
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.filterwarnings("ignore:compile=True has no effect")
def test_looks_at_f_leave_buffers_and_random_numbers(keywords, wrapped):
    """Both are then what the steps' own evaluations have made of them."""
    counting = Counting()
    f = (lambda t, y: counting(t, y)) if wrapped else counting
    torch.manual_seed(0)
    with torch.no_grad():
        pnode.Solver(f, step_size=0.25, **keywords)(Y0, [0.0, 1.0])
    last, calls = counting.drawn, int(counting.calls)
    torch.manual_seed(0)
    assert calls == 4 * {"rk4": 4}.get(keywords.get("method"), 6) + (calls % 4 == 1)
    assert torch.equal(torch.rand(calls)[-1:], last)


@pytest.mark.parametrize("buffer", [
    torch.empty(3, device="meta"), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    torch.ones(1 << 17),
], ids=["without values", "nested", "large"])  # fmt: skip
def test_buffers_that_are_not_looked_at(buffer, monkeypatch):
    """Their values cannot be compared, or are too many to be copied for each look."""
    counting = Counting()
    counting.register_buffer("other", buffer)
    copied = []
    monkeypatch.setattr(torch.Tensor, "clone", _noting(torch.Tensor.clone, copied))
    with torch.no_grad():
        solver = pnode.Solver(counting, step_size=0.5, samples="independent", compile=False)
        solver(Y0, [0.0, 1.0])
    assert copied and max(copied) < 1 << 16
    assert 0 < int(counting.calls) < 20


def _noting(clone, copied):
    def noted(tensor, *arguments, **keywords):
        copied.append(tensor.numel())
        return clone(tensor, *arguments, **keywords)

    return noted


def test_a_field_with_a_domain_is_looked_at_within_it():
    def root(t, y):
        if bool((y > 1.0).any()):
            raise ValueError("outside")
        return -torch.sqrt(y)

    y0 = torch.ones(4, 1, dtype=D)
    ys = pnode.Solver(root, samples="independent")(y0, [0.0, 1.0]).ys
    torch.testing.assert_close(ys[-1], 0.25 * y0, rtol=1e-5, atol=0.0)


def test_a_changed_field_is_noticed():
    factor = [1.0]
    y0 = Y0.clone().requires_grad_()
    ys = pnode.Solver(lambda t, y: -factor[0] * y, samples="independent")(y0, [0.0, 1.0]).ys
    factor[0] = 2.0
    with pytest.raises(pnode.errors.FieldChanged):
        ys.sum().backward()


def test_single_precision_and_tolerances():
    f, t = Oscillator().float(), TIMES.float()
    y0 = Y0.float().requires_grad_()
    solver = pnode.Solver(f, samples="independent", rtol=1e-4, atol=torch.full((3,), 1e-4))
    found = solver(y0, t)
    alone = pnode.Solver(f, rtol=1e-4, atol=1e-4, compile=False)(y0[1], t[1])
    assert found.ys.dtype is torch.float32
    torch.testing.assert_close(found.ys[:, 1], alone.ys, rtol=1e-5, atol=1e-5)
    one, other = (torch.autograd.grad(ys.sum(), y0)[0][1] for ys in (found.ys[:, 1], alone.ys))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(pnode.ConfigurationError, match="atol has infinite"):
        pnode.Solver(f, samples="independent", atol=torch.tensor([1.0, 1.0, torch.inf]))(y0, t)


def test_arguments_and_complex_states():
    def rotate(t, y, args):
        return (args["omega"] * 1j - 0.1 * t) * y

    omega = torch.tensor([[1.0], [2.0], [0.5]], dtype=D, requires_grad=True)
    y0 = torch.tensor([[1.0 + 1j, 2.0], [0.5, 1j], [1.0, -1.0]], dtype=torch.complex128)
    y0.requires_grad_()
    t = torch.tensor([[0.0, 1.0], [1.0, 0.2], [0.0, 2.0]], dtype=D)
    found = pnode.Solver(rotate, samples="independent", compile=False)(y0, t, {"omega": omega})
    alone = pnode.Solver(rotate, compile=False)
    ys = torch.stack([alone(y0[row], t[row], {"omega": omega[row]}).ys for row in range(3)], dim=1)
    assert found.ys.dtype is torch.complex128
    torch.testing.assert_close(found.ys, ys, rtol=1e-12, atol=1e-12)
    wanted = [torch.autograd.grad((ys.real * ys.imag).sum(), (y0, omega)) for ys in (found.ys, ys)]
    torch.testing.assert_close(*wanted, rtol=1e-10, atol=1e-11)


def test_what_is_no_batch():
    solver = pnode.Solver(lambda t, y: -y, method="rk4", step_size=0.5, samples="independent")
    y0 = torch.ones(3, 2, dtype=D)
    one = torch.tensor(1.0, dtype=D)
    for wrong in (one, one + 1j, {"a": y0, "b": one + 0j}, (y0, one), [y0, y0[:1]]):
        with pytest.raises(pnode.ConfigurationError, match="y0"):
            solver(wrong, torch.tensor([0.0, 1.0]))


class Pendulum(torch.nn.Module):
    """A dict of angle, complex phase and a matrix, each with rows."""

    def __init__(self):
        super().__init__()
        self.g = torch.nn.Parameter(torch.tensor(2.0, dtype=D))

    def forward(self, t, y):
        angle, matrix = y["angle"], y["more"][0]
        force = -self.g * torch.sin(angle) + 0.1 * t.reshape(
            angle.shape[:1] + (1,) * (angle.dim() - 1)
        )
        rate = torch.stack([matrix[..., 0, 1], force], dim=-1)[..., None] * matrix
        return {
            "angle": matrix[..., 0, 0] - 0.1 * angle,
            "more": (rate - matrix, 1j * y["more"][1]),
        }


@pytest.mark.parametrize(("method", "step"), [("dopri5", None), ("cn", 0.1)])
def test_structures(method, step):
    """Any structure of tensors of as many rows: each row is its solve alone, tolerances too."""
    f, rows = Pendulum(), 3
    parts = torch.linspace(-1.0, 1.5, 8 * rows, dtype=D).view(rows, 8)
    parts.requires_grad_()

    def state(x):
        phase = torch.complex(x[..., 5], x[..., 6])
        return {"angle": x[..., 0], "more": (x[..., 1:5].unflatten(-1, (2, 2)), phase)}

    atol = (1e-4, torch.full((2, 2), 1e-6, dtype=D), 1e-5)
    alone = pnode.Solver(f, method=method, step_size=step, atol=atol, compile=False)
    ys = [alone(state(parts[row]), TIMES[row]).ys for row in range(rows)]
    atol = (1e-4, atol[1].expand(rows, 2, 2), 1e-5)
    solver = pnode.Solver(f, method=method, step_size=step, atol=atol, samples="independent")
    found = solver(state(parts), TIMES).ys
    assert found["more"][0].shape == (3, rows, 2, 2)
    flat = [
        torch.cat([one.flatten() for one in
                   (x["angle"], x["more"][0], x["more"][1].real, x["more"][1].imag)])
        for x in (found, torch.utils._pytree.tree_map(lambda *x: torch.stack(x, 1), *ys))
    ]  # fmt: skip
    # Newton's method is content with 1e-8 of a residual that it makes 1e-2 or less in each iterate.
    torch.testing.assert_close(*flat, rtol=1e-11 if step is None else 1e-9, atol=1e-12)
    for one, other in zip(*(gradients(x, parts, f.g) for x in flat), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_structures_that_f_changes():
    y0 = (torch.ones(3, dtype=D), torch.ones(3, 2, dtype=D))
    for f in (lambda t, y: y[1], lambda t, y: (y[1], y[0]), lambda t, y: (y[0] * t, y[1])):
        with pytest.raises(pnode.VectorFieldError, match="return the same"):
            pnode.Solver(f, samples="independent")(y0, [0.0, 1.0])
