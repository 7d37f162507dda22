"""DMs, vectors, preconditioners and callbacks of PETSc's, against the same problem without."""

from __future__ import annotations

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode.base.options import PETSc
from pnode.errors import ConfigurationError, RankError
from pnode.parallel import DMLayout, total

D = torch.float64
ROWS, COLUMNS = 8, 6
PERIODIC = PETSc.DM.BoundaryType.PERIODIC


def start():
    y, x = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    return torch.stack([torch.sin(x + 0.3 * y), torch.cos(0.7 * y - x)], -1).to(D)


def solve(method, dm=None, **keywords):
    """Two fields on a torus, or this rank's part of it: the loss, d/dnu, and what made it."""
    nu = torch.tensor(2.0, dtype=D, requires_grad=True)

    def react(t, around, here):
        return nu * (around - 4.0 * here) + torch.sin(t + here.flip(-1))

    if dm is None:

        def rhs(t, u):
            return react(t, sum(u.roll(by, axis) for by in (1, -1) for axis in (0, 1)), u)

        y0, given = start(), {}
    else:

        def rhs(t, u):
            return react(
                t,
                u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:],
                u[1:-1, 1:-1],
            )

        (i, j), (ni, nj) = dm.getCorners()
        y0 = dm.createGlobalVec()
        y0.setArray(start()[j : j + nj, i : i + ni].reshape(-1).numpy())
        given = {"layout": dm}
    solver = pnode.Solver(rhs, params=[nu], method=method, compile=False, **given, **keywords)
    solution = solver(y0, [0.0, 0.25])
    loss = solution.ys[-1].square().sum()
    loss = loss if dm is None else total(loss, comm)
    loss.backward()
    return loss.item(), nu.grad.item(), solution


def torus():
    return PETSc.DMDA().create(
        dim=2, dof=2, sizes=(COLUMNS, ROWS), boundary_type=(PERIODIC, PERIODIC), stencil_width=1,
        stencil_type=PETSc.DMDA.StencilType.STAR, comm=PETSc.COMM_WORLD,
    )  # fmt: skip


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize(
    "method, keywords",
    [
        ("rk4", {"step_size": 0.05}),
        ("cn", {"step_size": 0.05}),
        ("es325", {"step_size": 0.05, "jacobian": "sparse"}),
        ("bdf2", {"step_size": 0.05, "jacobian": "sparse"}),
        ("dopri5", {"rtol": 1e-8, "atol": 1e-10}),
    ],
)
def test_a_dmda_gives_the_gradient_of_one_process_without(method, keywords):
    loss, slope, _ = solve(method, **{**keywords, "jacobian": "auto"})
    found, gradient, solution = solve(method, torus(), **keywords)
    checks.below(abs(found - loss), 1e-8 * loss, method, "loss")
    checks.below(abs(gradient - slope), 1e-7 * abs(slope), method, "gradient")
    checks.below(abs(solution.vec().norm() ** 2 - loss), 1e-8 * loss, "norm of the vector")


def mesh(of):
    """A DMPlex of squares with an unknown in each cell, and who is whose neighbour here."""
    dm = PETSc.DMPlex().createBoxMesh((4, 3), simplex=False, comm=of)
    dm.setBasicAdjacency(True, False)
    dm.distribute(overlap=1)
    section = PETSc.Section().create(comm=of)
    section.setChart(*dm.getChart())
    first, last = dm.getHeightStratum(0)
    for cell in range(first, last):
        section.setDof(cell, 1)
    section.setUp()
    dm.setLocalSection(section)
    faces = range(*dm.getHeightStratum(1))
    pairs = [tuple(dm.getSupport(face)) for face in faces if dm.getSupportSize(face) == 2]
    offsets = dict(enumerate(section.getOffset(cell) for cell in range(first, last)))
    owned = dm.getGlobalSection()
    mine = [cell for cell in range(first, last) if owned.getOffset(cell) >= 0]
    flux = torch.zeros(len(mine), last - first, dtype=D)
    for row, cell in enumerate(mine):
        for pair in pairs:
            if cell in pair:
                flux[row, offsets[pair[0] if pair[1] == cell else pair[1]]] += 1.0
                flux[row, offsets[cell]] -= 1.0
    places = torch.tensor([sum(dm.computeCellGeometryFVM(cell)[1] * (1.0, 7.0)) for cell in mine])
    return dm, flux, torch.sin(places).to(D)


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize("jacobian", ["matrix-free", "sparse"])
def test_a_plex_gives_the_gradient_of_one_process(jacobian):
    found = []
    for of in (PETSc.COMM_SELF, PETSc.COMM_WORLD):
        dm, flux, y0 = mesh(of)
        nu = torch.tensor(3.0, dtype=D, requires_grad=True)

        def rhs(t, u, flux=flux, nu=nu):
            return nu * (flux @ u) + torch.sin(3.0 * u)[: len(flux)]

        solver = pnode.Solver(
            rhs, params=[nu], method="cn", step_size=0.05, compile=False, layout=dm,
            jacobian=jacobian,
        )  # fmt: skip
        loss = solver(y0, [0.0, 0.2]).ys[-1].square().sum()
        loss = total(loss, comm) if of == PETSc.COMM_WORLD else loss
        loss.backward()
        found.append((loss.item(), nu.grad.item()))
    for one, other in zip(*found, strict=True):
        checks.below(abs(one - other), 1e-8 * abs(one), "on several ranks")


@pytest.mark.mpi(min_size=2, max_size=2)
def test_a_pc_of_all_ranks_preconditions_both_ways():
    dm = torus()
    matrix = dm.createMat()
    starts, columns, values = matrix.getValuesCSR()
    matrix.setValuesCSR(starts, columns, values - 1.0)
    matrix.assemble()
    matrix.shift(2.0 / 0.05 + 8.0)
    ksp = PETSc.KSP().create(comm=PETSc.COMM_WORLD)
    ksp.setOperators(matrix)
    ksp.getPC().setType("bjacobi")
    loss, slope, plain = solve("cn", step_size=0.05, jacobian="matrix-free")
    for given in (ksp.getPC(), ksp):
        found, gradient, solution = solve(
            "cn", dm, step_size=0.05, jacobian="matrix-free", preconditioner=given
        )
        checks.below(abs(found - loss), 1e-8 * loss, "loss")
        checks.below(abs(gradient - slope), 1e-7 * abs(slope), "gradient")
        checks.true(solution.stats.krylov < plain.stats.krylov, "iterations")


@pytest.mark.mpi(min_size=2, max_size=2)
def test_a_callback_that_fails_on_one_rank_is_an_error_on_all():
    def setup(ts):
        if comm.rank == 1 and broken:
            raise ZeroDivisionError("mine")
        ts.getSNES().getKSP().setType("bcgs")

    broken = [True]
    solver = pnode.Solver(
        lambda t, y: -y, method="cn", step_size=0.1, comm=comm, compile=False, petsc_setup=setup
    )
    y0 = torch.ones(3, dtype=D)
    with pytest.raises(RankError, match="mine") as caught:
        solver(y0, [0.0, 0.1])
    checks.true(isinstance(caught.value.__cause__, ZeroDivisionError) == (comm.rank == 1))
    broken.clear()
    checks.below(abs(float(solver(y0, [0.0, 0.1]).ys[-1, 0]) - 0.95 / 1.05), 1e-12, "afterwards")


@pytest.mark.mpi(min_size=2, max_size=2)
def test_what_does_not_fit_the_ranks_is_refused():
    dm = torus()
    shared, own = dm.createGlobalVec(), PETSc.Vec().createSeq(3)
    solver = pnode.Solver(lambda t, y: -y, method="rk4", step_size=0.1)
    with pytest.raises(ConfigurationError, match="2 ranks, and the solver has 1"):
        solver(shared, [0.0, 0.1])
    with pytest.raises(ConfigurationError, match="1 ranks, and the solver has 2"):
        pnode.Solver(lambda t, y: -y, method="rk4", step_size=0.1, comm=comm)(own, [0.0, 0.1])
    with pytest.raises(ConfigurationError, match="a Mat on 2 ranks"):
        pnode.Solver(
            lambda t, y: -y, method="cn", step_size=0.1, jacobian="matrix-free",
            preconditioner=dm.createMat(),
        )  # fmt: skip
    with pytest.raises(ConfigurationError, match="local section"):
        DMLayout(PETSc.DMPlex().createBoxMesh((2, 2), simplex=False, comm=PETSc.COMM_WORLD))
    with pytest.raises(ConfigurationError, match="petsc_setup differs"):
        solver = pnode.Solver(
            lambda t, y: -y, method="rk4", step_size=0.1, comm=comm,
            petsc_setup=print if comm.rank else None,
        )  # fmt: skip
        solver(torch.ones(2, dtype=D), [0.0, 0.1])
    checks.true(True, "all are refused")
