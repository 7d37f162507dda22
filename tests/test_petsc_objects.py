"""PETSc's own objects: what a callback sets up, vectors in and out, preconditioners."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusing import SIZE, D, close, gradients, ripple, solver

import pnode
from pnode.adjoint.stages import ExplicitAdjoint
from pnode.base.options import PETSc
from pnode.solvers.petsc import integrator as integrators
from pnode.solvers.petsc.library import stage_vectors

METHODS = ["cn", "bdf2", "es325", "rodaspr", "ark4"]


# petsc_setup.


@pytest.mark.parametrize("method", METHODS)
def test_what_a_callback_sets_lasts_on_the_way_forward_and_back(method):
    seen = []

    def setup(ts):
        ksp = ts.getSNES().getKSP()
        ksp.setType("bcgs")
        ksp.setTolerances(rtol=1e-13)
        ksp.getPC().setType("jacobi")
        seen.append(ksp)

    close(gradients(solver(method, petsc_setup=setup)), gradients(solver(method)))
    kinds = [(ksp.getType(), ksp.getPC().getType()) for ksp in seen]
    assert len(kinds) >= 2 and set(kinds) == {("bcgs", "jacobi")}


def test_a_callback_is_called_once_for_each_ts_and_hears_the_options():
    types = []
    options = {"ksp_type": "gmres", "ksp_rtol": 1e-12}
    made, nu = solver(
        petsc_options=options, petsc_setup=lambda ts: types.append(ts.getSNES().getKSP().getType())
    )
    for _ in range(2):
        gradients((made, nu))
    assert types == ["gmres", "gmres"]  # one forward, one adjoint
    with torch.no_grad():
        copy.deepcopy(made)(ripple(), [0.0, 0.1])
    assert len(types) == 3


def test_monitors_of_a_callback_look_at_forward_sweeps():
    times = []

    def setup(ts):
        ts.setMonitor(lambda ts, step, t, u: times.append((step, t)))

    made, _ = solver("es325", step_size=None, rtol=1e-4, petsc_setup=setup,
                     checkpointing=pnode.Checkpointing(memory=6 * SIZE * 8))  # fmt: skip
    y0 = ripple()
    solution = made(y0, [0.0, 0.3])
    assert len(times) == solution.stats.steps + 1
    solution.ys.sum().backward()
    assert solution.stats.backward.recomputed and len(times) == solution.stats.steps + 1


def test_second_derivatives_and_costs_beside_a_callback():
    def setup(ts):
        ts.getSNES().getKSP().getPC().setType("jacobi")
        ts.getSNES().getKSP().setType("bcgs")
        ts.getSNES().getKSP().setTolerances(rtol=1e-13)

    found = []
    for given in ({}, {"petsc_setup": setup}):
        made, nu = solver(cost=lambda t, u: u.square().sum(), **given)
        solution = made(ripple(), [0.0, 0.2])
        (first,) = torch.autograd.grad(
            solution.ys[-1].square().sum() + solution.costs[-1], nu, create_graph=True
        )
        found.append((first.detach(), *torch.autograd.grad(first, nu)))
    close(*found)


@pytest.mark.parametrize(
    "method, change, named",
    [
        ("cn", lambda ts: ts.setType("beuler"), "ts_type='beuler'"),
        ("cn", lambda ts: ts.setTolerances(rtol=1e-2), "the tolerances"),
        ("rk4", lambda ts: ts.setTimeStep(0.5), "the times"),
        ("rk4", lambda ts: ts.setRKType("3bs"), "'3bs'"),
        ("rk4", lambda ts: ts.setRHSFunction(lambda *a: None), "callbacks"),
        ("cn", lambda ts: ts.setSolution(ts.getSolution().duplicate()), "the solution vector"),
        ("cn", lambda ts: ts.setOptionsPrefix("mine_"), "the options prefix"),
        ("bdf", lambda ts: ts.getSNES().setTolerances(rtol=0.1), "SNES"),
    ],
)
def test_a_callback_that_changes_the_method_is_refused(method, change, named):
    steps = {} if method == "bdf" else {"step_size": 0.1}
    made = pnode.Solver(lambda t, y: -y, method=method, petsc_setup=change, compile=False, **steps)
    with pytest.raises(pnode.ConfigurationError, match=named):
        made(ripple(), [0.0, 0.1])


def test_what_a_callback_raises_comes_through_and_the_solver_works_afterwards():
    answers = [ZeroDivisionError("mine"), None]

    def setup(ts):
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    made, _ = solver(petsc_setup=setup)
    with pytest.raises(ZeroDivisionError, match="mine"):
        made(ripple(), [0.0, 0.1])
    assert torch.equal(made(ripple(), [0.0, 0.1]).ys, solver()[0](ripple(), [0.0, 0.1]).ys)


def test_a_callback_where_it_has_no_effect_is_refused():
    for keywords in ({"method": "radau5"}, {"samples": "independent"}):
        with pytest.raises(pnode.ConfigurationError, match="petsc_setup="):
            pnode.Solver(lambda t, y: -y, petsc_setup=print, **keywords)(
                torch.ones(2, 1, dtype=D), [0.0, 1.0]
            )


def test_nothing_is_compiled_past_a_callback():
    called = []
    with pytest.warns(RuntimeWarning, match="petsc_setup="):
        made = pnode.Solver(decay, method="rk4", step_size=0.1, compile=True,
                            petsc_setup=called.append)  # fmt: skip
    made(ripple(), [0.0, 0.1])
    assert called


def test_ts_view_shows_what_a_callback_has_set(capfd):
    made, _ = solver(petsc_options={"ts_view": None},
                     petsc_setup=lambda ts: ts.getSNES().getKSP().setType("bcgs"))  # fmt: skip
    made(ripple(), [0.0, 0.1])
    shown = capfd.readouterr().out
    assert "TS Object" in shown and "type: bcgs" in shown


# Preconditioners.


def laplacian(size=SIZE):
    identity = torch.eye(size, dtype=D)
    return identity.roll(1, 0) + identity.roll(-1, 0) - 2.0 * identity


def as_mat(matrix, sparse=True):
    mat = PETSc.Mat().createDense(tuple(matrix.shape), array=matrix.numpy(), comm=PETSc.COMM_SELF)
    mat.assemble()
    return mat.convert("aij", PETSc.Mat()) if sparse else mat


@pytest.mark.parametrize("sparse", [True, False])
def test_a_mat_preconditions_as_its_values_do(sparse):
    matrix = 3.0 * laplacian()
    given = matrix.to_sparse() if sparse else matrix
    ends = []
    for preconditioner in (as_mat(matrix, sparse), given):
        made = solver(jacobian="matrix-free", preconditioner=preconditioner)
        ends.append((*gradients(made), made[0](ripple(), [0.0, 0.3]).stats.krylov))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][:3], ends[1][:3], strict=True))
    assert ends[0][3] == ends[1][3]
    close(ends[0][:3], gradients(solver()))


def test_a_mat_is_a_pattern():
    made = solver(jacobian="sparse", jacobian_pattern=as_mat(laplacian()))
    close(gradients(made), gradients(solver()))
    assert "colors=" in repr(made[0])


def test_a_mat_without_values_is_refused():
    shell = PETSc.Mat().createPython((SIZE, SIZE), None, comm=PETSc.COMM_SELF)
    for mat in (shell, PETSc.Mat().createAIJ((SIZE, SIZE), comm=PETSc.COMM_SELF)):
        with pytest.raises(pnode.ConfigurationError, match="preconditioner is a Mat"):
            solver(jacobian="matrix-free", preconditioner=mat)


def shifted(kind, step=0.1):
    """A PC or KSP of the matrix of cn's stages, without the reaction, not symmetric."""
    matrix = (2.0 / step) * torch.eye(SIZE, dtype=D) - 3.0 * laplacian()
    matrix = matrix + torch.diag(torch.arange(SIZE - 1, dtype=D), 1)
    ksp = PETSc.KSP().create(comm=PETSc.COMM_SELF)
    ksp.setOperators(as_mat(matrix))
    ksp.setType("preonly" if kind == "exact" else "gmres")
    ksp.setTolerances(rtol=1e-2)
    ksp.getPC().setType("lu" if kind in ("exact", "PC") else "jacobi")
    return ksp.getPC() if kind == "PC" else ksp


@pytest.mark.parametrize("method", ["cn", "bdf2", "es325"])
@pytest.mark.parametrize("kind", ["PC", "exact", "KSP"])
def test_a_pc_or_ksp_preconditions_both_ways(method, kind):
    given = shifted(kind)
    made = solver(method, jacobian="matrix-free", preconditioner=given)
    close(gradients(made), gradients(solver(method)))
    with torch.no_grad():
        ends = [one(ripple(), [0.0, 0.3]).ys[-1] for one in (made[0], copy.deepcopy(made[0]))]
    assert torch.equal(*ends)


def decay(t, y):
    return -y


def test_a_pc_cannot_be_pickled():
    made = pnode.Solver(decay, method="cn", step_size=0.1, jacobian="matrix-free",
                        preconditioner=shifted("PC"))  # fmt: skip
    with pytest.raises(pnode.ConfigurationError, match="pickle"):
        pickle.dumps(made)


def test_second_derivatives_use_the_pc():
    found = []
    for given in ({}, {"jacobian": "matrix-free", "preconditioner": shifted("PC")}):
        made, nu = solver(**given)
        loss = made(ripple(), [0.0, 0.2]).ys[-1].square().sum()
        (first,) = torch.autograd.grad(loss, nu, create_graph=True)
        found.append(torch.autograd.grad(first, nu))
    close(*found)


def test_a_solver_that_does_not_fit_is_refused():
    cases = [
        ("pc_type='jacobi'", shifted("PC"), {"petsc_options": {"pc_type": "jacobi"}}),
        ("ksp_type='gmres'", shifted("KSP"), {"linear_solver": "gmres"}),
        ("local size", PETSc.PC().create(comm=PETSc.COMM_SELF), {}),
    ]
    for named, given, keywords in cases:
        made, _ = solver(jacobian="matrix-free", preconditioner=given, **keywords)
        with pytest.raises(pnode.ConfigurationError, match=named):
            made(ripple(), [0.0, 0.1])
    made, _ = solver(jacobian="matrix-free", preconditioner=shifted("PC"))
    with pytest.raises(pnode.ConfigurationError, match="local size"):
        made(ripple(SIZE + 1), [0.0, 0.1])
    with pytest.raises(pnode.ConfigurationError, match="linear_solver is a PETSc KSP"):
        solver(linear_solver=shifted("KSP"))


# Vectors.


def vector(values):
    return PETSc.Vec().createWithArray(values.clone().numpy(), comm=PETSc.COMM_SELF)


def test_a_vec_goes_in_and_comes_out():
    made, nu = solver("rk4")
    given = vector(ripple())
    solution = made(given, [0.0, 0.2, 0.3])
    given.set(0.0)  # y0 is a copy
    solution.ys[-1].square().sum().backward()
    end, slope, _ = gradients(solver("rk4"), ripple().requires_grad_())
    assert torch.equal(solution.ys[0], ripple()) and solution.ys.shape == (3, SIZE)
    close((solution.ys[-1], nu.grad), (end, slope))
    for index in (0, 1, -1):
        assert (solution.vec(index).array_r == solution.ys[index].detach().numpy()).all()
    copied = solution.vec()
    copied.set(0.0)
    assert solution.vec().norm() > 0.0


def test_a_vec_of_a_tuple_has_its_parts_one_after_the_other():
    made = pnode.Solver(lambda t, y: (-y[0], y[1]), method="rk4", step_size=0.1, compile=False)
    solution = made((torch.ones(2, 2), torch.tensor(3.0)), [0.0, 0.1])
    expected = torch.cat([solution.ys[0][-1].reshape(-1), solution.ys[1][-1:]]).double()
    assert (solution.vec().array_r == expected.numpy()).all()


def test_vectors_that_do_not_fit_are_refused():
    with pytest.raises(pnode.ConfigurationError, match=r"complex.*solution\.ys"):
        pnode.Solver(lambda t, y: 1j * y, method="rk4", step_size=0.1, compile=False)(
            torch.ones(2, dtype=torch.complex128), [0.0, 0.1]
        ).vec()
    with pytest.raises(pnode.ConfigurationError, match="y0"):
        pnode.Solver(lambda t, y: -y, samples="independent")(vector(ripple()), [0.0, 1.0])
    for empty in (PETSc.Vec(), PETSc.Vec().create(), vector(ripple()).destroy()):
        with pytest.raises(pnode.ConfigurationError, match="without entries"):
            pnode.Solver(lambda t, y: -y)(empty, [0.0, 1.0])


# Work vectors.


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_stages_but_the_first_are_one_vector_unless_a_callback_may_look(method, monkeypatch):
    made = []
    build = integrators.build_ts
    monkeypatch.setattr(
        integrators, "build_ts",
        lambda *given, **more: made.append(build(*given, **more)) or made[-1],
    )  # fmt: skip
    found = []
    for setup in (None, lambda ts: None):
        # A large step is rejected: what a TS goes back to is no stage.
        steps = {"first_step": 0.5} if method == "dopri5" else {"step_size": 0.01}
        solve = pnode.Solver(
            lambda t, y: -50 * (y - torch.cos(t)), method=method, petsc_setup=setup, compile=False,
            **steps,
        )  # fmt: skip
        y0 = torch.linspace(0, 1, 5, dtype=torch.float64, requires_grad=True)
        solution = solve(y0, [0.0, 0.3, 0.5])
        assert method == "rk4" or solution.stats.rejected
        found.append((solution.ys.detach(), *torch.autograd.grad(solution.ys.sum(), y0)))
        (ts,) = made
        stages = {vector.handle for vector in stage_vectors(ts)}
        assert len(stages) == (2 if setup is None else {"rk4": 4, "dopri5": 7}[method])
        made.clear()
    assert all(map(torch.equal, *found))


def test_a_step_is_repeated_without_what_the_adjoint_of_the_next_one_needed(monkeypatch):
    step, attempt = ExplicitAdjoint.step, integrators.TimeIntegrator.attempt
    known, seen = [], []

    def noted(self, *given):
        known[:] = [self]
        step(self, *given)

    def looked(self, *given, **more):
        seen.extend(len(one.checkpoint.stages) + len(one._graphs or ()) for one in known)
        return attempt(self, *given, **more)

    monkeypatch.setattr(ExplicitAdjoint, "step", noted)
    monkeypatch.setattr(integrators.TimeIntegrator, "attempt", looked)
    y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
    solve = pnode.Solver(
        lambda t, y: -y, method="rk4", step_size=0.1, compile=False,
        checkpointing=pnode.Checkpointing(24 * y0.nbytes, store="solutions"),
    )  # fmt: skip
    solve(y0, [0.0, 1.0]).ys[-1].sum().backward()
    assert seen and not any(seen)
    assert torch.allclose(y0.grad, solve(y0, [0.0, 1.0]).ys[-1], rtol=1e-13)
