"""States on a device, as far as a machine without one can tell; see docs/gpu.md.

The device is simulated (simulated_device.py): operations across device and host are errors there.
"""

from __future__ import annotations

import pytest
import torch
from simulated_device import DEVICE, OnDevice, bare, module_on_device, on_device, simulated

import pnode
from pnode.base.options import PETSc
from pnode.errors import ConfigurationError, VectorFieldError

TIMES = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)


class Field(torch.nn.Module):
    """A small network on a batch, with a time-dependent term."""

    def __init__(self, width=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(width, 5), torch.nn.Tanh(), torch.nn.Linear(5, width)
        ).double()

    def forward(self, t, y):
        return self.layers(y) + 0.1 * torch.sin(t) * y


class Pair(Field):
    """Positions and momenta."""

    def forward(self, t, y):
        q, p = y
        return p, -self.layers(q) - torch.sin(t)


def start(width=3):
    torch.manual_seed(1)
    return torch.randn(4, width, dtype=torch.float64, requires_grad=True)


def gradients(field, y0, make):
    """Solve, take a gradient, and return everything on the host."""
    solver = make(field)
    solution = solver(y0, TIMES)
    parts = solution.ys if isinstance(solution.ys, tuple) else (solution.ys,)
    sum((part * part).sum() for part in parts).backward()
    inputs = y0 if isinstance(y0, tuple) else (y0,)
    return solution, [
        *(part.detach() for part in parts),
        *(part.grad for part in inputs),
        *(parameter.grad for parameter in field.parameters()),
    ]


def agree(ours, theirs, rtol=1e-12):
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert isinstance(one, OnDevice)
        torch.testing.assert_close(bare(one), two, rtol=rtol, atol=1e-14)


FIXED = {"step_size": 0.1}
CASES = {
    "rk4": dict(method="rk4", **FIXED),
    "dopri5": dict(method="dopri5"),
    "dopri5 dense output": dict(method="dopri5", dense=True),
    "bosh3 dense output": dict(method="bosh3", dense=True),
    "tolerances by entry": dict(method="dopri5", atol=torch.full((4, 3), 1e-9)),
    "pid": dict(method="bosh3", controller="pid"),
    "ssp": dict(method="ssprk43", **FIXED),
    "beuler": dict(method="beuler", **FIXED),
    "beuler adaptive": dict(method="beuler", rtol=1e-3, atol=1e-3),
    "cn dense": dict(method="cn", jacobian="dense", **FIXED),
    "cn block": dict(method="cn", jacobian="block", **FIXED),
    "cn sparse": dict(method="cn", jacobian="sparse", **FIXED),
    "cn matrix-free": dict(method="cn", jacobian="matrix-free", **FIXED),
    "preconditioner": dict(
        method="cn", jacobian="matrix-free", preconditioner="block", **FIXED
    ),
    "given preconditioner": dict(
        method="cn", jacobian="matrix-free",
        preconditioner=lambda t, y: -torch.eye(12, dtype=y.dtype, device=y.device), **FIXED
    ),
    "reuse": dict(method="es325", jacobian="dense", jacobian_reuse="step", **FIXED),
    "midpoint": dict(method="implicit_midpoint", **FIXED),
    "es325": dict(method="es325"),
    "rosenbrock": dict(method="ra34pw2"),
    "rosenbrock sparse": dict(method="rodas3", jacobian="sparse", **FIXED),
    "bdf": dict(method="bdf"),
    "bdf by entry": dict(method="bdf", rtol=torch.full((4, 3), 1e-6)),
    "bdf2": dict(method="bdf2", **FIXED),
    "within a budget": dict(method="rk4", checkpointing=14 * 96, **FIXED),
    "continuous": dict(method="dopri5", gradient="continuous"),
    "continuous cn": dict(method="cn", gradient="continuous", **FIXED),
    "tape": dict(method="dopri5", checkpointing=pnode.Checkpointing(store="tape")),
}  # fmt: skip


@pytest.mark.parametrize("state", ["device", "host"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_host(case, state):
    def make(field):
        return pnode.Solver(field, device_state=state, **CASES[case])

    solution, expected = gradients(Field(), start(), make)
    with simulated(petsc=state == "device"):
        found, values = gradients(module_on_device(Field()), on_device(start()), make)
        agree(values, expected)
        assert found.stats.rhs == solution.stats.rhs
        assert (found.stats.copies > 0) == (state == "host")


FORMS = {
    "imex": lambda field, **keywords: pnode.Solver(
        implicit=lambda t, y: -2.0 * y, explicit=field, params=field.parameters(),
        method="imexl2", **FIXED, **keywords,
    ),
    "diagonal mass": lambda field, **keywords: pnode.Solver(
        field, mass=torch.linspace(1.0, 2.0, 12, dtype=torch.float64), method="cn",
        **FIXED, **keywords,
    ),
    "sparse mass": lambda field, **keywords: pnode.Solver(
        field, mass=torch.diag(torch.linspace(1.0, 2.0, 12, dtype=torch.float64)).to_sparse(),
        method="beuler", jacobian="sparse", **FIXED, **keywords,
    ),
    "residual": lambda field, **keywords: pnode.Solver(
        residual=lambda t, y, yp: yp - field(t, y), params=field.parameters(),
        method="bdf2", **FIXED, **keywords,
    ),
}  # fmt: skip


@pytest.mark.parametrize("state", ["device", "host"])
@pytest.mark.parametrize("form", FORMS)
def test_problem_forms(form, state):
    def make(field):
        return FORMS[form](field, device_state=state)

    _, expected = gradients(Field(), start(), make)
    with simulated(petsc=state == "device"):
        _, values = gradients(module_on_device(Field()), on_device(start()), make)
        agree(values, expected, 1e-11)


@pytest.mark.parametrize("case", [*CASES, *FORMS])
def test_torchs_default_device_is_not_asked(case):
    """``torch.set_default_device`` is the user's: what pnode makes has a device of its own."""

    def make(field):
        if case in FORMS:
            return FORMS[case](field)
        return pnode.Solver(field, **CASES[case])

    expected = gradients(Field(), start(), make)[1]
    field, y0, solver = Field(), start(), make
    made = solver(field)
    with torch.device("meta"):
        found = gradients(field, y0, lambda field: made)[1]
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


LAYOUTS = {
    "grid": lambda: pnode.parallel.Grid((12,), width=1, boundary="mirror"),
    "dm": lambda: PETSc.DMDA().create(
        dim=1,
        dof=1,
        sizes=(12,),
        boundary_type=(PETSc.DM.BoundaryType.PERIODIC,),
        stencil_width=1,
        comm=PETSc.COMM_SELF,
    ),
    "ghosts": lambda: pnode.parallel.GhostLayout(12, torch.tensor([3, 7])),
}


@pytest.mark.parametrize("state", ["device", "host"])
@pytest.mark.parametrize("solve", [{"method": "rk4"}, {"method": "cn", "jacobian": "matrix-free"},
                                   {"method": "cn", "jacobian": "sparse"}])  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_cells(layout, solve, state):
    if layout == "ghosts" and solve.get("jacobian") == "sparse":
        solve = {"method": "beuler", "jacobian": "matrix-free"}

    def field(t, y):
        inner = y[:12] if layout == "ghosts" else y[1:-1]
        return (y[12:].sum() - inner if layout == "ghosts" else y[2:] - 2 * inner + y[:-2]) * 3.0

    def run(y0):
        solver = pnode.Solver(
            field, layout=LAYOUTS[layout](), device_state=state, step_size=0.05, **solve
        )
        solution = solver(y0, TIMES)
        solution.ys.square().sum().backward()
        return solution.ys.detach(), y0.grad

    y0 = torch.linspace(0.0, 1.0, 12, dtype=torch.float64).sin()
    expected = run(y0.clone().requires_grad_())
    with simulated(petsc=state == "device"):
        found = run(on_device(y0).requires_grad_())
        agree(found, expected)


@pytest.mark.parametrize("state", ["device", "host"])
def test_pairs_and_symplectic_methods(state):
    def make(field):
        return pnode.Solver(field, method="velocity_verlet", device_state=state, **FIXED)

    _, expected = gradients(Pair(), (start(), start()), make)
    with simulated(petsc=state == "device"):
        y0 = (on_device(start()), on_device(start()))
        _, values = gradients(module_on_device(Pair()), y0, make)
        agree(values, expected)


@pytest.mark.parametrize("state", ["device", "host"])
def test_events_and_monitors_see_the_device(state):
    seen = []

    def monitor(step, t, y):
        seen.append(y)

    def event(t, y):
        return y.square().sum() - 15.0

    def solve(y0, field):
        solver = pnode.Solver(
            field, method="dopri5", event_fn=event, monitor=monitor, device_state=state
        )
        solution = solver(y0, torch.tensor([0.0, 50.0], dtype=torch.float64))
        (solution.ys[-1].sum() + solution.event_time.sum()).backward()
        return solution

    y0, field = start(), Field()
    expected = solve(y0, field)
    assert expected.reason == "event"
    seen.clear()
    with simulated(petsc=state == "device"):
        y1, moved = on_device(start()), module_on_device(Field())
        found = solve(y1, moved)
        assert all(isinstance(y, OnDevice) for y in seen)
        torch.testing.assert_close(bare(found.ys), expected.ys)
        torch.testing.assert_close(bare(y1.grad), y0.grad)
        for one, two in zip(moved.parameters(), field.parameters(), strict=True):
            torch.testing.assert_close(bare(one.grad), two.grad)


def test_sums_over_ranks_go_through_the_host():
    comm = pnode.parallel.MPI.COMM_SELF
    with simulated():
        field, value = module_on_device(Field()), on_device(start()).requires_grad_()
        total = pnode.parallel.total(value.square(), comm)
        total.sum().backward()
        torch.testing.assert_close(bare(value.grad), 2.0 * bare(value))
        field(0.0 * value[0, 0], value.detach()).sum().backward()
        before = [bare(parameter.grad).clone() for parameter in field.parameters()]
        pnode.parallel.sum_gradients(field, comm)
        pnode.parallel.broadcast_parameters(field, comm)
        for parameter, gradient in zip(field.parameters(), before, strict=True):
            torch.testing.assert_close(bare(parameter.grad), gradient)
        problem_ranks = pnode.base.ranks.Ranks(comm)
        assert isinstance(problem_ranks.sum(total), OnDevice)


# ------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("store", ["stages", "auto"])
def test_copies_are_counted(store):
    """rk4, one step: y0; four evaluations (t, y, f each); the output. Backward, each again.

    Not with the graphs of the forward sweep: the cotangents alone then.
    """
    with simulated(petsc=False) as counts:
        y0 = on_device(start())
        solver = pnode.Solver(
            module_on_device(Field()), method="rk4", step_size=1.0, device_state="host",
            checkpointing=pnode.Checkpointing(store=store),
        )  # fmt: skip
        solution = solver(y0, TIMES[[0, -1]])
        first = solution.stats
        assert first.copies == counts.to_device + counts.to_host
        # The first evaluation looks for undeclared tensors, whose graph is dropped.
        assert first.copies == 1 + 4 * 3 + 1
        assert first.copied_bytes == 8 * (12 + 4 * (1 + 12 + 12) + 2 * 12)
        counts.clear()
        solution.ys.sum().backward()
        assert first.backward.copies == counts.to_device + counts.to_host
        # The cotangent of ys; per stage t, y, f, and the cotangents of f and y; that of y0.
        assert first.backward.copies == 1 + 4 * (5 if store == "stages" else 2) + 1


@pytest.mark.parametrize("jacobian", ["matrix-free", "block"])
def test_copies_of_second_derivatives_are_counted(jacobian):
    with simulated(petsc=False) as counts:
        solver = pnode.Solver(
            module_on_device(Field()), method="cn", jacobian=jacobian, device_state="host", **FIXED
        )
        solution = solver(on_device(start()), TIMES)
        solution.ys.sum().backward()
        total = solution.stats.copies + solution.stats.backward.copies
        assert total == counts.to_device + counts.to_host


@pytest.mark.parametrize("method", ["rk4", "ssprk43"])
def test_fixed_explicit_steps_stay_on_the_device(method):
    """Nothing crosses per step, nor a number that the host would wait for."""
    field = module_on_device(Field())
    found = []
    for steps in (10, 20):
        with simulated() as counts, torch.no_grad():
            solver = pnode.Solver(field, method=method, step_size=1.0 / steps)
            solver(on_device(start()), TIMES[[0, -1]])
            assert counts.to_host == 0
            found.append((counts.to_device, counts.numbers))
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "verner8"])
def test_an_adaptive_step_asks_for_one_number(method):
    """Whether all its stages were finite; PETSc's error norm is another."""
    field = module_on_device(Field())
    with simulated() as counts, torch.no_grad():
        solver = pnode.Solver(field, method=method, first_step=0.05, rtol=1e-3, atol=1e-3)
        solution = solver(on_device(start()), TIMES[[0, -1]])
        assert counts.to_host == 0
        starts = counts.numbers - solution.stats.steps - solution.stats.rejected
        assert 0 <= starts <= 4


def test_nonfinite_stages_are_found_after_the_step():
    def field(t, y):
        return torch.where(y.abs().max() < 2.0, y * y, torch.nan)

    solver = pnode.Solver(field, method="dopri5")
    y0 = torch.ones(2, dtype=torch.float64)
    with pytest.raises(pnode.NonFiniteVectorField) as expected:
        solver(y0, torch.tensor([0.0, 2.0]))
    with simulated(), pytest.raises(pnode.NonFiniteVectorField) as found:
        pnode.Solver(field, method="dopri5")(on_device(y0), torch.tensor([0.0, 2.0]))
    assert str(found.value) == str(expected.value)


def test_a_backward_sweep_stays_on_the_device():
    field = module_on_device(Field())
    found = []
    for steps in (10, 20):
        with simulated() as counts:
            solver = pnode.Solver(field, method="rk4", step_size=1.0 / steps)
            solution = solver(on_device(start()).requires_grad_(), TIMES[[0, -1]])
            counts.clear()
            solution.ys.sum().backward()
            assert counts.to_host == 0
            found.append((counts.to_device, counts.numbers))
    assert found[0] == found[1]


# ----------------------------------------------------------------------------- what is refused


def test_a_petsc_without_the_device_names_both_ways_out():
    with simulated(petsc=False):
        solver = pnode.Solver(module_on_device(Field()), method="rk4", **FIXED)
        with pytest.raises(ConfigurationError, match=r"cuda:0.*--with-cuda.*device_state='host'"):
            solver(on_device(start()), TIMES)


@pytest.mark.parametrize(
    ("kind", "state"),
    [("meta", "device"), ("meta", "host"), ("mps", "device"), ("mps", "host"), ("xpu", "device")],
)
def test_other_devices(kind, state, monkeypatch):
    monkeypatch.setattr(OnDevice, "where", torch.device(kind, 0))
    y0 = OnDevice(torch.ones(3))
    solver = pnode.Solver(lambda t, y: -y, method="rk4", device_state=state, **FIXED)
    with pytest.raises(ConfigurationError, match=f"{kind}:0.*(device_state='host'|y0)"):
        solver(y0, TIMES)


@pytest.mark.parametrize("value", ["gpu", None, True, "cuda:0"])
def test_device_state_has_two_choices(value):
    with pytest.raises(ConfigurationError, match=r"device_state=.*'device', 'host'"):
        pnode.Solver(lambda t, y: -y, method="rk4", device_state=value, **FIXED)


def test_host_state_of_a_host_tensor_is_nothing_new():
    solver = pnode.Solver(Field(), method="rk4", device_state="host", **FIXED)
    assert solver(start(), TIMES).stats.copies == 0


@pytest.mark.parametrize("state", ["device", "host"])
def test_a_field_that_answers_from_the_host(state):
    with simulated(petsc=state == "device"), torch.no_grad():
        solver = pnode.Solver(
            lambda t, y: torch.zeros(3), method="rk4", device_state=state, **FIXED
        )
        with pytest.raises(VectorFieldError, match="tensor on cpu for a state on cuda:0"):
            solver(on_device(torch.ones(3)), TIMES)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("state", ["device", "host"])
def test_a_field_that_writes_into_its_input(state, gradient):
    with simulated(petsc=state == "device"), torch.set_grad_enabled(gradient):
        solver = pnode.Solver(lambda t, y: y.mul_(-1.0), method="rk4", device_state=state, **FIXED)
        with pytest.raises(VectorFieldError, match="wrote into its input"):
            solver(on_device(start()), TIMES)


def test_undeclared_parameters_on_the_device_are_found():
    with simulated(petsc=False):
        field = module_on_device(Field())
        solver = pnode.Solver(lambda t, y: field(t, y), method="rk4", device_state="host", **FIXED)
        with pytest.raises(ConfigurationError, match="requires grad and was not declared"):
            solver(on_device(start()), TIMES)


@pytest.mark.parametrize("state", ["device", "host"])
@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_compiling_is_refused_with_one_warning(method, state):
    with simulated(petsc=state == "device"), torch.no_grad():
        solver = pnode.Solver(
            module_on_device(Field()), method=method, compile=True, device_state=state, **FIXED
        )
        with pytest.warns(UserWarning, match=r"compile=True.*y0 is on a device") as record:
            solver(on_device(start()), TIMES)
            solver(on_device(start()), TIMES)
        assert len(record) == 1


def test_vec_type_is_for_devices():
    solver = pnode.Solver(Field(), method="rk4", petsc_options={"vec_type": "kokkos"}, **FIXED)
    with pytest.raises(ConfigurationError, match=r"vec_type='kokkos'.*on the host"):
        solver(start(), TIMES)


assert DEVICE.type == "cuda"


def test_stages_of_a_state_on_the_device():
    """There they are those of the host; of a state that is kept elsewhere they are refused."""

    def stages(field, y0, state):
        seen = []
        solution = pnode.Solver(field, method="rk4", device_state=state, **FIXED)(y0, TIMES)
        solution.stages(solution.ys.detach(), seen.append)
        return [part for stage in seen for part in (stage.state, stage.adjoint)]

    expected = stages(Field(), start(), "device")
    with simulated():
        agree(stages(module_on_device(Field()), on_device(start()), "device"), expected)
    with simulated(petsc=False), pytest.raises(pnode.BackwardError, match="device_state='host'"):
        stages(module_on_device(Field()), on_device(start()), "host")
