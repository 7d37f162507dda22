"""DMs of PETSc's as layouts: the gradients of the same problems without, and refusals."""

from __future__ import annotations

import pytest
import torch
from diffusing import CLOSE, SIZE, D, close, gradients, ripple, solver

import pnode
from pnode.base.options import PETSc
from pnode.parallel import DMLayout

PERIODIC, GHOSTED = PETSc.DM.BoundaryType.PERIODIC, PETSc.DM.BoundaryType.GHOSTED


def grid(size, method="cn", dof=1, **keywords):
    dm = PETSc.DMDA().create(dim=1, dof=dof, sizes=(size,), boundary_type=(PERIODIC,),
                             stencil_width=1, comm=PETSc.COMM_SELF)  # fmt: skip
    nu = torch.tensor(3.0, dtype=D, requires_grad=True)

    def rhs(t, u):
        here = u[1:-1]
        return nu * (u[2:] + u[:-2] - 2.0 * here) + torch.sin(t) * here - 0.1 * here**3

    keywords = {"step_size": 0.1, "compile": False} | keywords
    return pnode.Solver(rhs, params=[nu], method=method, layout=dm, **keywords), nu, dm


@pytest.mark.parametrize("jacobian", ["matrix-free", "sparse"])
@pytest.mark.parametrize("method", ["rk4", "cn", "bdf2", "es325"])
def test_a_dmda_gives_the_gradients_of_the_same_problem_without(method, jacobian):
    given = {} if method == "rk4" else {"jacobian": jacobian}
    close(gradients(grid(SIZE, method, **given)[:2]), gradients(solver(method)))


DM_SOLVES = {
    "float32": ({}, torch.float32, [0.0, 0.3]),
    "adaptive": ({"step_size": None, "rtol": 1e-6}, D, [0.0, 0.3]),
    "backwards": ({}, D, [0.3, 0.2]),
    "dense": ({"dense": True}, D, [0.0, 0.17, 0.3]),
    "memory": ({"checkpointing": pnode.Checkpointing(memory=10 * SIZE * 8)}, D, [0.0, 0.9]),
    "events": ({"event_fn": pnode.Event(lambda t, u: u[0] - 1.0, terminal=False)}, D, [0.0, 0.3]),
    # With ghost cells or without, the cell in the middle.
    "cost": (
        {"cost": lambda t, u: u[len(u) // 2] ** 2, "event_fn": lambda t, u: u[0] - t - 0.9},
        D,
        [0.0, 0.3],
    ),
}


@pytest.mark.parametrize("name", list(DM_SOLVES))
def test_a_dm_goes_with_what_else_a_solve_may_do(name):
    keywords, dtype, times = DM_SOLVES[name]
    found = []
    for make in (lambda: grid(SIZE, "es325", **keywords)[:2], lambda: solver("es325", **keywords)):
        made, nu = make()
        y0 = ripple().to(dtype).requires_grad_()
        solution = made(y0, times)
        ys, costs = solution.ys, solution.costs
        loss = ys.square().sum() + (0.0 if costs is None else costs[-1])
        found.append((ys, *torch.autograd.grad(loss, [nu, y0])))
    tolerance = {} if dtype == D else {"rtol": 2e-4, "atol": 1e-4}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **(CLOSE | tolerance))


def test_second_derivatives_and_breaks_with_a_dm():
    found = []
    for made in (grid(SIZE)[:2], solver()):
        one, nu = made
        (first,) = torch.autograd.grad(
            one(ripple(), [0.0, 0.2], breakpoints=[0.13]).ys[-1].square().sum(), nu,
            create_graph=True,
        )  # fmt: skip
        found.append((first.detach(), *torch.autograd.grad(first, nu)))
    close(*found)


def test_boxes_of_a_dmda_are_those_of_its_c_arrays():
    dm = PETSc.DMDA().create(dim=3, dof=2, sizes=(5, 4, 3), boundary_type=(PERIODIC, GHOSTED, 0),
                             stencil_width=1, comm=PETSc.COMM_SELF)  # fmt: skip
    layout = DMLayout(dm)
    assert layout.shape == (3, 4, 5, 2) and layout.ghosted_shape == (3, 6, 7, 2)
    x = torch.randn(layout.shape, dtype=D)
    seen = layout.gather(x)
    assert torch.equal(seen[:, 1:-1, 1:-1], x)
    assert torch.equal(seen[:, 1:-1, 0], x[:, :, -1]) and not seen[:, 0].any()
    dm.setUniformCoordinates(0.0, 5.0, 0.0, 3.0, 0.0, 2.0)  # x is periodic
    places = torch.from_numpy(dm.getCoordinates().array_r.copy()).view(*layout.shape[:3], 3)
    assert torch.equal(places[2, 1, 4].round(), torch.tensor([4.0, 1.0, 2.0], dtype=D))


def test_geometric_multigrid_of_a_dm():
    options = {"ksp_type": "gmres", "pc_type": "mg", "pc_mg_levels": 3,
               "pc_mg_galerkin": "both", "mg_levels_pc_type": "jacobi"}  # fmt: skip
    plain, multigrid = (
        grid(32, jacobian="sparse", linear_solver=chosen, step_size=0.3)
        for chosen in ({"ksp_type": "gmres", "pc_type": "none"}, options)
    )
    found = [gradients(made[:2], ripple(32).requires_grad_()) for made in (plain, multigrid)]
    close(*found)
    counts = [made[0](ripple(32), [0.0, 0.3]).stats.krylov for made in (plain, multigrid)]
    assert counts[1] < counts[0]


def plex():
    """3 x 4 squares with two unknowns in each cell, and the neighbours of each cell."""
    dm = PETSc.DMPlex().createBoxMesh((3, 4), simplex=False, comm=PETSc.COMM_SELF)
    dm.setBasicAdjacency(True, False)
    section = PETSc.Section().create(comm=PETSc.COMM_SELF)
    section.setChart(*dm.getChart())
    first, last = dm.getHeightStratum(0)
    for cell in range(first, last):
        section.setDof(cell, 2)
    section.setUp()
    dm.setLocalSection(section)
    sides = [dm.getSupport(face) for face in range(*dm.getHeightStratum(1))]
    return dm, torch.tensor([tuple(pair) for pair in sides if len(pair) == 2])


@pytest.mark.parametrize("jacobian", ["matrix-free", "sparse"])
def test_a_plex_gives_the_gradients_of_the_same_problem_without(jacobian):
    dm, pairs = plex()
    flux = torch.zeros(12, 12, dtype=D)
    for one, other in pairs.tolist():
        flux[one, one] -= 1.0
        flux[other, other] -= 1.0
        flux[one, other] = flux[other, one] = 1.0
    results = []
    for given in ({}, {"layout": dm, "jacobian": jacobian}):
        nu = torch.tensor(0.5, dtype=D, requires_grad=True)

        def rhs(t, u, nu=nu):
            cells = u.view(12, 2)
            return (nu * (flux @ cells) + torch.sin(cells.flip(1))).view(-1)

        made = pnode.Solver(rhs, params=[nu], method="cn", step_size=0.1, compile=False, **given)
        results.append(gradients((made, nu), ripple(24).requires_grad_()))
    close(*results)


def test_a_vec_of_a_dm():
    made, _, dm = grid(SIZE)
    vec = dm.createGlobalVec()
    vec.setArray(ripple().numpy())
    solution = made(vec, [0.0, 0.3])
    assert torch.equal(solution.ys, made(ripple(), [0.0, 0.3]).ys)
    assert solution.vec().getDM() and solution.vec(0).equal(vec)
    longer = PETSc.Vec().createSeq(SIZE + 1)
    with pytest.raises(pnode.ConfigurationError, match="the layout has"):
        made(longer, [0.0, 0.1])


def test_dms_that_cannot_be_layouts_are_refused():
    with pytest.raises(pnode.ConfigurationError, match="section"):
        DMLayout(PETSc.DMPlex().createBoxMesh((2, 2), simplex=False, comm=PETSc.COMM_SELF))
    with pytest.raises(pnode.ConfigurationError, match="give a PETSc DM"):
        DMLayout("dm")
    for empty in (PETSc.DM(), PETSc.DMDA().create((4,), comm=PETSc.COMM_SELF).destroy()):
        with pytest.raises(pnode.ConfigurationError, match="is empty"):
            pnode.Solver(lambda t, y: y, layout=empty)
    with pytest.raises(pnode.ConfigurationError, match="or a PETSc DM"):
        pnode.Solver(lambda t, y: y, layout=PETSc.Vec())


def test_dms_whose_transfers_are_no_transposes_are_refused(monkeypatch):
    class Doubled(DMLayout):
        def _scatter(self, ghosted):
            return 2.0 * super()._scatter(ghosted)

    class Moved(DMLayout):
        def _gather(self, owned):
            return super()._gather(owned) + 1.0

    for kind in (Doubled, Moved):
        with pytest.raises(pnode.ConfigurationError, match="transposes"):
            kind(grid(SIZE)[2])
