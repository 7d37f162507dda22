"""The method table against PETSc's own data and against measured orders of convergence."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from replica import arkimex_tableau, dirk_tableau, petsc_tableau

import pnode
from pnode.base.options import PETSc
from pnode.solvers.methods import LEFT_OUT, METHODS, REFUSED, find_method

EXPLICIT = [method for method in METHODS if method.ts_type == "rk"]


def names(methods):
    return [method.name for method in methods]


def test_every_explicit_rk_type_of_petsc_is_in_the_table():
    types = {
        value
        for name, value in vars(PETSc.TS.RKType).items()
        if name.startswith("RK") and isinstance(value, str)
    }
    assert types - {method.subtype for method in EXPLICIT} == set()


def test_every_dirk_type_of_petsc_is_in_the_table():
    types = {
        value
        for name, value in vars(PETSc.TS.DIRKType).items()
        if not name.startswith("_") and isinstance(value, str) and name != "__doc__"
    }
    assert types == {method.subtype for method in METHODS if method.ts_type == "dirk"}


DIRK = [m for m in METHODS if m.ts_type == "dirk" and m.name not in ("esdirk3", "dirk8616sal")]


@pytest.mark.parametrize("method", DIRK, ids=names(DIRK))
def test_measured_dirk_tableau_has_the_order_and_the_shared_end(method):
    tableau = dirk_tableau(method)
    assert np.allclose(np.triu(tableau["A"], 1), 0.0)
    assert np.allclose(tableau["A"].sum(axis=1), tableau["c"], atol=1e-14)
    for k in range(1, method.order + 1):
        assert tableau["b"] @ tableau["c"] ** (k - 1) == pytest.approx(1 / k, abs=1e-13)
    explicit_first = tableau["A"][0, 0] == 0.0
    stiffly_accurate = bool(np.allclose(tableau["A"][-1], tableau["b"], atol=1e-14))
    assert method.shares_ends == (explicit_first and stiffly_accurate)


EVERY = [m for m in METHODS if m.scheme is not None]


def test_what_a_checkpoint_holds_follows_from_the_coefficients():
    """Against the facts of each family, written down."""
    symplectic = {"symplectic_euler": 2, "velocity_verlet": 3, "ruth3": 6, "forest_ruth": 7}
    fsal = {"bosh3", "dopri5", "tsit5", "bosh5", "verner6"}
    esdirk = {"es122", "trbdf2", "esdirk3", "es325", "esdirk6", "esdirk7", "esdirk8"}
    stiff = {"dirk658a", "sdirk6", "dirk7510sal", "sdirk7"}
    for method in METHODS:
        name, units = method.name, method.stages
        if method.multistep or method.ts_type == "rosw":
            units = 1
        elif method.ts_type == "basicsymplectic":
            units = symplectic[name]
        elif name in fsal:
            units -= 1
        elif name == "beuler":  # with the start, whose difference is the rate of a residual
            units = 2
        ends = name in esdirk or name in ("beuler", "cn")
        assert method.stage_units == units, name
        assert method.fsal == (name in fsal), name
        assert method.shares_ends == ends, name
        assert method.holds_end == (ends or name in stiff or "radau" in name), name


@pytest.mark.parametrize("method", EVERY, ids=names(EVERY))
def test_scheme_has_the_stages_and_the_kind_of_the_table(method):
    scheme = method.scheme
    assert scheme.explicit == (method.kind == "explicit")
    assert scheme.stages == method.stages + (method.name == "beuler")
    assert {len(row) for row in scheme.A} == {scheme.stages}
    assert np.allclose(np.triu(scheme.A, 1), 0.0) == (not method.coupled)
    assert (scheme.A_explicit is not None) == (method.kind == "imex")
    assert scheme.reference
    if method.name == "beuler":  # compiled sweeps leave out the start
        assert scheme.without_idle_stages().stages == method.stages


@pytest.mark.parametrize("method", DIRK, ids=names(DIRK))
def test_scheme_is_what_a_step_of_pnodes_is(method):
    tableau, scheme = dirk_tableau(method), method.scheme
    for name in ("A", "b", "c"):
        assert np.allclose(getattr(scheme, name), tableau[name], rtol=0, atol=2e-15), name
    assert scheme.b_embedded is not None
    assert sum(scheme.b_embedded) == pytest.approx(1.0, abs=1e-12)


IMEX = [m for m in METHODS if m.ts_type == "arkimex"]


@pytest.mark.parametrize("method", IMEX, ids=names(IMEX))
def test_scheme_of_both_parts_is_what_a_step_of_pnodes_is(method):
    tableau, scheme = arkimex_tableau(method), method.scheme
    pairs = {"A": "At", "b": "bt", "c": "ct", "A_explicit": "A", "b_explicit": "b",
             "c_explicit": "c"}  # fmt: skip
    for ours, theirs in pairs.items():
        found = getattr(scheme, ours)
        assert np.allclose(found, tableau[theirs], rtol=0, atol=2e-15), ours


def test_every_arkimex_type_of_petsc_is_in_the_table():
    types = {
        value for name, value in vars(PETSc.TS.ARKIMEXType).items() if name.startswith("ARKIMEX")
    }
    ours = {method.subtype for method in METHODS if method.ts_type == "arkimex"}
    assert types - ours == {"bpr3"}  # PETSc's coefficients have a slip; pnode registers its own
    assert ours - types == {find_method("bpr3").subtype}


def test_every_ts_type_of_petsc_is_in_the_table_or_left_out_with_a_reason():
    types = {
        value
        for name, value in vars(PETSc.TS.Type).items()
        if isinstance(value, str) and not name.startswith("_")
    }
    ours = {method.ts_type for method in METHODS}
    assert not ours & set(LEFT_OUT)
    assert types - ours - set(LEFT_OUT) <= set()


def test_names_and_aliases_are_unique():
    every = [name for method in METHODS for name in (method.name, *method.aliases)]
    assert len(every) == len(set(every))
    assert not set(every) & set(REFUSED)
    assert set(REFUSED.values()) <= set(names(METHODS))


@pytest.mark.parametrize("method", EXPLICIT, ids=names(EXPLICIT))
def test_table_agrees_with_petsc_tableau(method):
    tableau = petsc_tableau(method)
    assert len(tableau["b"]) == method.stages
    assert tableau["fsal"] == method.fsal
    assert (tableau["b_embedded"] is not None) == method.adaptive
    assert np.allclose(tableau["A"].sum(axis=1), tableau["c"], atol=1e-14)
    assert np.allclose(np.triu(tableau["A"]), 0.0)
    # Quadrature conditions: sum b c^(k-1) = 1/k up to the order.
    for k in range(1, method.order + 1):
        assert tableau["b"] @ tableau["c"] ** (k - 1) == pytest.approx(1 / k, abs=1e-13)


def pendula(t, state):
    """A driven pair of them, both halves depending on time."""
    q, p = state
    return p * torch.cos(t) + p * p * torch.sin(2 * t), torch.exp(-t) - (1 + t * t) * q.sin()


@cache
def precise(f):
    """The states of a field at the times of START, to some units of round-off."""
    with torch.no_grad():
        return pnode.odeint(f, *START[f], method="verner8", rtol=1e-13, atol=1e-13)


def pendulum_error_at(method, steps):
    """Error at t = 1."""
    with torch.no_grad():
        ours = pnode.odeint(pendula, *START[pendula], method=method.name, step_size=1.0 / steps)
    return float((torch.cat(ours, dim=1) - torch.cat(precise(pendula), dim=1)).norm())


def error_at(method, steps):
    """Error at t = 1 of a non-autonomous nonlinear pair with solution (exp(sin t), cos t)."""

    if "separable" in method.forms:
        return pendulum_error_at(method, steps)

    def f(t, y):
        u, v = y[0], y[1]
        return torch.stack([u * torch.cos(t), -torch.sin(t) + (v * v - torch.cos(t) ** 2)])

    solver = pnode.Solver(
        f, method=method.name, step_size=1.0 / steps,
        petsc_options={"snes_rtol": 1e-14, "snes_stol": 1e-14} if method.implicit else None,
    )  # fmt: skip
    y0 = torch.tensor([1.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        y = solver(y0, torch.tensor([0.0, 1.0])).ys[-1]
    exact = torch.tensor([math.exp(math.sin(1.0)), math.cos(1.0)], dtype=torch.float64)
    return float((y - exact).norm())


def van_der_pol(t, y):
    """The oscillator with mu = 1."""
    return torch.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])


START = {
    pendula: (
        (torch.tensor([0.3, 0.5], dtype=torch.float64), torch.tensor([0.2, -0.4]).double()),
        torch.tensor([0.0, 1.0]),
    ),
    van_der_pol: (torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 3.0])),
}

ORDINARY = [method for method in METHODS if "rhs" in method.forms]


# Of this one the leading term of the error prevails at steps where round-off does already.
ROUND_OFF_FIRST = [method for method in ORDINARY if method.name == "dopri8"]
SLOPES = [method for method in ORDINARY if method not in ROUND_OFF_FIRST]


@pytest.mark.parametrize("method", ROUND_OFF_FIRST, ids=names(ROUND_OFF_FIRST))
def test_order_of_convergence_over_a_longer_time(method):
    """y' = -y^2 cos(t) / 2, of which 1 / y = 1 + sin(t) / 2."""
    y0, t = torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 10.0], dtype=torch.float64)
    counts, errors = (20, 28, 40, 56), []
    for count in counts:
        steps = {"method": method.name, "options": {"step_size": 10.0 / count}}
        y = pnode.odeint(lambda t, y: -0.5 * y * y * torch.cos(t), y0, t, **steps)[-1]
        errors.append(abs(float(y) - 1.0 / (1.0 + 0.5 * math.sin(10.0))))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert method.order - 0.2 < slope < method.order + 1.2, (slope, errors)


@pytest.mark.parametrize("method", SLOPES, ids=names(SLOPES))
def test_order_of_convergence(method):
    # High orders reach round-off quickly: fewer, longer steps for them. Those with wide stages
    # show their order only at steps that these do not need.
    special = {
        "dirk8614a": (10, 12, 14, 16),
        "dirk8616sal": (6, 8, 10, 12),
        "esdirk8": (4, 5, 6, 8),
        **dict.fromkeys(("bdf5", "bdf6", "bdf"), (24, 32, 48, 64)),  # not one-step: h < T / order
        "veldd4": (16, 32, 64),
    }
    counts = {1: (64, 128, 256), 2: (32, 64, 128), 3: (16, 32, 64), 4: (8, 16, 32)}.get(
        method.order, (8, 12, 16, 24) if method.order < 7 else (2, 3, 4, 5)
    )
    counts = special.get(method.name, counts)
    errors = [error_at(method, count) for count in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    # One-sided: a method may do better on one problem (its leading error term may be small).
    assert slope > method.order - 0.2, (slope, errors)
    assert slope < method.order + 1.2, (slope, errors)


@pytest.mark.parametrize(
    "method", [m for m in ORDINARY if m.adaptive], ids=[m.name for m in ORDINARY if m.adaptive]
)
def test_adaptive_error_falls_with_the_tolerance(method):
    """A tolerance 100 times smaller gives a clearly smaller error."""
    errors = []
    for tol in (1e-3, 1e-5) if method.order > 1 else (1e-4, 1e-6):
        with torch.no_grad():
            ours = pnode.odeint(
                van_der_pol, *START[van_der_pol], method=method.name, rtol=tol, atol=tol
            )
        errors.append(float((ours[-1] - precise(van_der_pol)[-1]).norm()))
    # The local error is controlled, so an order p method's error falls at least as tol^(p/(p+1)),
    # 1/10 for p = 1; a factor 2 is left for the constant.
    assert errors[1] < 0.2 * errors[0], errors


def test_methods_lists_the_table():
    rows = pnode.methods()
    assert rows[: len(METHODS)] == METHODS  # then those of pnode.tableau
    assert {"dopri5", "cn", "beuler", "rk4"} <= {row.name for row in rows}
    assert find_method("5dp") is find_method("dopri5")
    assert find_method("crank_nicolson").ts_type == "cn"
