"""The table of methods. A method that is not in it does not exist.

Tests, the README table and ``pnode.methods()`` are generated from :data:`METHODS`.

Orders, stages and embedded pairs are those of PETSc's ``TSRKRegisterAll`` and ``TSTHETA``; the
tests check them against PETSc's own tableaus and against measured orders of convergence.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pnode.base.errors import ConfigurationError
from pnode.solvers.firk.tableaus import GAUSS4, GAUSS6, RADAU3, RADAU5
from pnode.solvers.own_tableaus import BPR3, DOPRI8, FEHLBERG2, HEUN3, TSIT5
from pnode.solvers.petsc.coefficients import find_scheme
from pnode.solvers.rosenbrock_tableaus import ROSENBROCK
from pnode.solvers.scheme import Scheme
from pnode.solvers.symplectic_schemes import SYMPLECTIC, HalfUpdate

__all__ = [
    "LEFT_OUT",
    "METHODS",
    "REFUSED",
    "Method",
    "add",
    "check_form",
    "check_mass",
    "find_method",
    "markdown_table",
    "methods",
]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes
    ----------
    name : str
        pnode's name.
    ts_type : str
        PETSc's TS type.
    order : int
        Order of convergence.
    stages : int
        Stages per step as PETSc counts them.
    aliases : tuple of str
        Other names: PETSc's, torchdiffeq's, the textbook's.
    subtype : str
        PETSc's subtype (``-ts_rk_type``), empty where there is none.
    kind : {"explicit", "implicit", "imex"}
        What a step costs: evaluations only, or nonlinear solves too; or solves for one part of
        the right-hand side and evaluations of the other.
    adaptive : bool
        Whether there is an error estimate to choose step sizes with.
    forms : tuple of str
        Problem forms; "separable" is a pair (q, p) with dq/dt = g(t, p), dp/dt = f(t, q).
    adjoint : {"stages", "multistep"}
        Which discrete adjoint it has: a pass over the stages of each step, or over its history.
    same_bits : bool
        Whether recomputing a step from (t, h, u) gives the same bits as the first pass.
    own : Scheme or None
        Coefficients, where PETSc lacks the method (or has them wrong) and pnode registers it.
    """

    name: str
    ts_type: str
    order: int
    stages: int
    aliases: tuple[str, ...] = ()
    subtype: str = ""
    kind: str = "explicit"
    adaptive: bool = False
    forms: tuple[str, ...] = ("rhs",)
    adjoint: str = "stages"
    same_bits: bool = True
    own: Scheme | None = field(default=None, repr=False, hash=False)

    @cached_property
    def scheme(self) -> Scheme | None:
        """Coefficients of a method of one step of the Runge-Kutta family; None of others."""
        if self.multistep or self.symplectic:
            return None
        if self.own is not None:
            return self.own
        return find_scheme(self.ts_type, self.subtype, self.stages, self.order, self.adaptive)

    @cached_property
    def multistep(self) -> bool:
        """Whether a step looks at more states than the last."""
        return self.adjoint == "multistep"

    @cached_property
    def coupled(self) -> bool:
        """Whether all stages of a step are solved for at once."""
        return self.own is not None and self.own.coupled

    @property
    def solves_to_tolerance(self) -> bool:
        """Whether adaptive steps, repeated too, are solved no better than their tolerances ask."""
        return self.multistep or self.coupled

    @cached_property
    def symplectic(self) -> bool:
        """Whether a step is made of half-updates of a pair (q, p)."""
        return "separable" in self.forms

    @cached_property
    def linearly_implicit(self) -> bool:
        """Whether a stage is one linear solve, with the Jacobian at the start of the step."""
        return self.ts_type == "rosw"

    @property
    def extrapolates(self) -> bool:
        """Whether errors are differences to what the steps before extrapolate to: of order 2."""
        return self.ts_type in ("beuler", "cn", "theta")

    @cached_property
    def carries_slope(self) -> bool:
        """Whether a step begins with the slope that ended the last; the first one solves for it."""
        return self.ts_type == "dirk"

    @cached_property
    def half_updates(self) -> tuple[HalfUpdate, ...]:
        """Of a symplectic method: the parts of a step; none of others."""
        return SYMPLECTIC[self.subtype].half_updates() if self.symplectic else ()

    @cached_property
    def fsal(self) -> bool:
        """First Same As Last: a step's first stage is the one before's last."""
        return self.scheme is not None and self.scheme.fsal

    @property
    def keeps_stages(self) -> bool:
        """Whether a checkpoint holds the stages of a step; or else one state."""
        return not self.multistep and not self.linearly_implicit

    @cached_property
    def stage_units(self) -> int:
        """How many states a step's checkpoint holds if it shares none with its neighbours."""
        if self.half_updates:
            return len(self.half_updates)
        if self.scheme is None or not self.keeps_stages:
            return 1
        return self.scheme.stages - self.fsal

    @cached_property
    def holds_end(self) -> bool:
        """Whether the last of these states is the step's end."""
        if self.scheme is None or self.scheme.explicit:
            return False
        return self.scheme.stiffly_accurate

    @cached_property
    def shares_ends(self) -> bool:
        """Whether the first state a checkpoint holds is the last of the step before."""
        first = self.scheme is not None and self.scheme.explicit_first
        return first and self.holds_end

    @property
    def checkpoint(self) -> str:
        """What a checkpoint of one step holds, in words."""
        if not self.keeps_stages:
            return "solution"
        own = self.stage_units - self.shares_ends
        return f"{own} stage{'s' if own > 1 else ''}"

    @cached_property
    def solves_constraints(self) -> bool:
        """Whether it solves the algebraic equations that a singular mass matrix leaves."""
        runge_kutta = self.ts_type in ("dirk", "arkimex", "rosw")
        return not runge_kutta or (self.scheme is not None and self.scheme.ends_at_stage)

    @property
    def restarts(self) -> bool:
        """Whether a step can be repeated from the state at its start alone."""
        return not self.multistep

    @property
    def keeps_graphs(self) -> bool:
        """Whether adjoints can use the graphs of f from the forward sweep."""
        return self.ts_type in ("rk", "ssp")

    @property
    def first_order(self) -> int:
        """The order that the first adaptive step is chosen by: that of its error estimate."""
        return 1 if self.multistep else 3 if self.coupled else self.order

    @property
    def implicit(self) -> bool:
        """Whether a step solves nonlinear systems."""
        return self.kind != "explicit"


def _rk(name: str, subtype: str, order: int, stages: int, *aliases: str, **more: Any) -> Method:
    names = [other for other in (subtype, *aliases, f"rk{subtype}") if other != name]
    return Method(name, "rk", order, stages, tuple(names), subtype, **more)


def _theta(
    name: str, ts_type: str, order: int, stages: int, *aliases: str, forms: tuple[str, ...]
) -> Method:
    return Method(
        name, ts_type, order, stages, aliases, kind="implicit", adaptive=True, forms=forms
    )


def _dirk(name: str, subtype: str, order: int, stages: int, *aliases: str) -> Method:
    """Return a row for TSDIRK."""
    names = [other for other in (subtype, *aliases, f"dirk{subtype}") if other != name]
    return Method(
        name, "dirk", order, stages, tuple(names), subtype, kind="implicit", adaptive=True,
        forms=("rhs", "mass"), same_bits=False,
    )  # fmt: skip


def _arkimex(
    name: str, subtype: str, order: int, stages: int, *aliases: str, **more: Any
) -> Method:
    return Method(
        name, "arkimex", order, stages, (*aliases, f"arkimex{subtype}"), subtype, kind="imex",
        forms=("imex", "imex_mass"), **more,
    )  # fmt: skip


def _bdf(name: str, order: int, *aliases: str) -> Method:
    return Method(
        name, "python", order, 1, aliases, kind="implicit", adaptive=True,
        adjoint="multistep", same_bits=False,
        forms=("rhs", "mass", "residual"),
    )  # fmt: skip


def _firk(name: str, order: int, own: Scheme, *aliases: str, **more: Any) -> Method:
    """Return a row for a method with coupled stages: pnode's own, on a TS of type python."""
    return Method(
        name, "python", order, own.stages, aliases, kind="implicit", forms=("rhs", "mass"),
        own=own, **more,
    )  # fmt: skip


def _ssp(name: str, subtype: str, order: int, stages: int, *aliases: str) -> Method:
    return Method(name, "ssp", order, stages, aliases, subtype)


def _symplectic(name: str, subtype: str, order: int, *aliases: str) -> Method:
    return Method(
        name, "basicsymplectic", order, order, aliases, subtype, forms=("separable",),
    )  # fmt: skip


def _rosw(name: str, order: int, stages: int, *aliases: str, **more: Any) -> Method:
    """Return a row for TSROSW; every type but the theta methods has an embedded one.

    Those of ra3pw and lassp3p4s2c have the method's own stability function: on linear autonomous
    problems their error estimate is zero, whatever the step.
    """
    subtype = more.pop("subtype", name)
    names = (*aliases, f"rosw_{subtype}") if name != f"rosw_{subtype}" else aliases
    return Method(
        name, "rosw", order, stages, names, subtype, kind="implicit",
        adaptive=subtype not in ("theta1", "theta2", "ra3pw", "lassp3p4s2c"),
        forms=("rhs", "mass") if all(ROSENBROCK[subtype].gamma_diagonal) else ("rhs",),
        **more,
    )  # fmt: skip


#: Every method, explicit ones first, each group by order.
METHODS: tuple[Method, ...] = (
    _rk("euler", "1fe", 1, 1, "forward_euler"),
    _rk("heun2", "2a", 2, 2, "heun", "adaptive_heun", adaptive=True),
    _rk("midpoint", "2b", 2, 2, "explicit_midpoint"),
    _rk("fehlberg2", "fehlberg2", 2, 3, adaptive=True, own=FEHLBERG2),
    _rk("rk3", "3", 3, 3),
    _rk("heun3", "heun3", 3, 3, own=HEUN3),
    _rk("bosh3", "3bs", 3, 4, "bogacki_shampine3", adaptive=True, same_bits=False),
    _rk("rk4", "4", 4, 4, "classical"),
    _rk("fehlberg5", "5f", 5, 6, "rkf45", adaptive=True),
    _rk("dopri5", "5dp", 5, 7, "dormand_prince5", adaptive=True, same_bits=False),
    _rk("tsit5", "tsit5", 5, 7, "tsitouras5", adaptive=True, same_bits=False, own=TSIT5),
    _rk("bosh5", "5bs", 5, 8, "bogacki_shampine5", adaptive=True, same_bits=False),
    _rk("verner6", "6vr", 6, 9, adaptive=True, same_bits=False),
    _rk("verner7", "7vr", 7, 10, adaptive=True),
    _rk("verner8", "8vr", 8, 13, adaptive=True),
    _rk("dopri8", "dopri8", 8, 13, "prince_dormand8", adaptive=True, own=DOPRI8),
    _ssp("ssprk22", "rks2", 2, 2),
    _ssp("ssprk52", "rks2", 2, 5, "rks2"),
    _ssp("ssprk43", "rks3", 3, 4),
    _ssp("ssprk93", "rks3", 3, 9, "rks3"),
    _ssp("ssprk104", "rk104", 4, 10, "rk104"),
    _symplectic("symplectic_euler", "1", 1, "sieuler"),
    _symplectic("velocity_verlet", "2", 2, "velverlet"),
    _symplectic("ruth3", "3", 3),
    _symplectic("forest_ruth", "4", 4, "yoshida4"),
    _theta(
        "beuler",
        "beuler",
        1,
        1,
        "be",
        "implicit_euler",
        "backward_euler",
        forms=("rhs", "mass", "residual"),
    ),
    _theta("cn", "cn", 2, 2, "crank_nicolson", "trapezoid", forms=("rhs", "mass")),
    _theta("implicit_midpoint", "theta", 2, 1, "theta", forms=("rhs", "mass")),
    _rosw("rosw_theta1", 1, 1, "linearly_implicit_euler", subtype="theta1"),
    _rosw("rosw_theta2", 2, 1, "linearly_implicit_midpoint", subtype="theta2"),
    _rosw("ros2m", 2, 2, subtype="2m"),
    _rosw("ros2p", 2, 2, subtype="2p"),
    _rosw("ra3pw", 3, 3),
    _rosw("ra34pw2", 3, 4, "rosw"),
    _rosw("r34prw", 3, 4, "ros34prw"),
    _rosw("r3prl2", 3, 4, "ros3prl2"),
    _rosw("rodas3", 3, 4),
    _rosw("sandu3", 3, 3, "ros3"),
    _rosw("assp3p3s1c", 3, 3),
    _rosw("lassp3p4s2c", 3, 4),
    _rosw("llssp3p4s2c", 3, 4),
    _rosw("rosw_ark3", 3, 4, subtype="ark3"),
    _rosw("rodaspr", 4, 6),
    _rosw("rodaspr2", 4, 6),
    _rosw("grk4t", 4, 4),
    _rosw("shamp4", 4, 4),
    _rosw("veldd4", 4, 4),
    _rosw("ros4l", 4, 4, subtype="4l"),
    _dirk("es122", "es122sal", 1, 2),
    _dirk("sdirk2", "s212", 2, 2),
    _dirk("trbdf2", "es213sal", 2, 3, "esdirk2"),
    _dirk("esdirk3", "es324sal", 3, 4),
    _dirk("es325", "es325sal", 3, 5),
    _dirk("dirk657a", "657a", 6, 7),
    _dirk("esdirk6", "es648sa", 6, 8),
    _dirk("dirk658a", "658a", 6, 8),
    _dirk("sdirk6", "s659a", 6, 9),
    _dirk("dirk7510sal", "7510sal", 7, 10),
    _dirk("esdirk7", "es7510sa", 7, 10),
    _dirk("dirk759a", "759a", 7, 9),
    _dirk("sdirk7", "s7511sal", 7, 11),
    _dirk("dirk8614a", "8614a", 8, 14),
    _dirk("dirk8616sal", "8616sal", 8, 16),
    _dirk("esdirk8", "es8516sal", 8, 16),
    _arkimex("imexbe", "1bee", 1, 3, adaptive=True),
    _arkimex("imexa2", "a2", 2, 2, adaptive=True),
    _arkimex("imexl2", "l2", 2, 2, adaptive=True),
    _arkimex("ars122", "ars122", 2, 2, adaptive=True),
    _arkimex("ark2c", "2c", 2, 3, adaptive=True),
    _arkimex("ark2d", "2d", 2, 3, adaptive=True),
    _arkimex("ark2e", "2e", 2, 3, adaptive=True),
    _arkimex("imexssp2", "prssp2", 2, 3),
    _arkimex("ark3", "3", 3, 4, "kennedy_carpenter3", adaptive=True),
    _arkimex("ars443", "ars443", 3, 5),
    _arkimex("bpr3", "bpr353", 3, 5, own=BPR3),
    _arkimex("ark4", "4", 4, 6, "kennedy_carpenter4", adaptive=True),
    _arkimex("ark5", "5", 5, 8, "kennedy_carpenter5", adaptive=True),
    _firk("radau3", 3, RADAU3, "radauIIA3"),
    _firk("radau5", 5, RADAU5, "radauIIA5", "radau", adaptive=True, same_bits=False),
    _firk("gauss4", 4, GAUSS4, "gl4"),
    _firk("gauss6", 6, GAUSS6, "gl6"),
    *(_bdf(f"bdf{order}", order) for order in range(1, 7)),
    _bdf("bdf", 5),
)

#: Names of other packages that pnode does not have, with the nearest method it has.
REFUSED: dict[str, str] = {
    "explicit_adams": "dopri5",
    "fixed_adams": "rk4",
    "implicit_adams": "cn",
    "adams": "dopri5",
    "gl2": "implicit_midpoint",
    "gauss_legendre": "gauss4",
    "kvaerno3": "esdirk3",
    "kvaerno4": "es325",
    "kvaerno5": "esdirk6",
    "scipy_solver": "bdf",
    "RK45": "dopri5",
    "RK23": "bosh3",
    "DOP853": "dopri8",
    "LSODA": "bdf",
}

#: PETSc's other TS types, and why they are not here.
LEFT_OUT: dict[str, str] = {
    "euler": "TSRK's `euler` is the same method, with an adjoint",
    "pseudo": "marches to a steady state: its intermediate times mean nothing",
    "alpha": "generalized-alpha: no stages or adjoint in PETSc; `cn`, `trbdf2` and `bdf2` serve",
    "alpha2": "for second-order equations of structures, in a form of its own",
    "glle": "general linear methods: a history of several vectors that PETSc keeps to itself",
    "glee": "estimates the global error along with the solution; no adjoint, no stages",
    "eimex": "extrapolated IMEX Euler: no stages or adjoint; `ark4` and `ark5` serve",
    "mimex": "an experiment of PETSc's for mixed implicit-explicit conservation laws",
    "mprk": "multirate: the state is split into fast and slow entries by index sets",
    "discgrad": "discrete gradients: wants the structure of a gradient system, not f",
    "irk": "no adjoint, an assembled Jacobian only: pnode's own `gauss4` and `gauss6` replace it",
    "radau5": "an external Fortran code without an adjoint: pnode's own `radau5` replaces it",
    "sundials": "an external library, not in PETSc's usual builds",
    "bdf": "PETSc keeps its history to itself: pnode's own, on a TS of type python, replace it",
}

_BY_NAME: dict[str, Method] = {
    name: method for method in METHODS for name in (method.name, *method.aliases)
}
#: Those of the user, by name, in the order they came.
_ADDED: dict[str, Method] = {}


def methods() -> tuple[Method, ...]:
    """Every method pnode has, as rows of a table. Not collective.

    Returns
    -------
    tuple of Method
        With name, aliases, PETSc type and subtype, order, stages, kind, adaptive, forms, adjoint,
        checkpoint content and whether recomputation gives the same bits; those of
        :func:`pnode.tableau` come last.
    """
    return (*METHODS, *_ADDED.values())


def add(name: str, scheme: Scheme, order: int) -> Method:
    """Add a method to those that can be found. Not collective.

    Parameters
    ----------
    name : str
        Under which no other method is known; the same one again changes nothing.
    scheme : Scheme
        Explicit, diagonally implicit or IMEX.
    order : int
        Order of convergence.

    Raises
    ------
    ConfigurationError
        If the name is taken.
    """
    more: dict[str, Any] = {"adaptive": scheme.b_embedded is not None, "own": scheme}
    if scheme.explicit:
        row = _rk(name, name, order, scheme.stages, same_bits=not scheme.fsal, **more)
    elif scheme.A_explicit is not None:
        row = _arkimex(name, name, order, scheme.stages, **more)
    else:
        row = replace(_dirk(name, name, order, scheme.stages), **more)
    row = replace(row, aliases=())
    if row == _ADDED.get(name):
        return _ADDED[name]
    subtypes = {method.subtype for method in METHODS}
    if name in subtypes or name in _BY_NAME or name in REFUSED or name in _ADDED:
        what = "another method"
        if name in REFUSED:
            what = "a method of another package that pnode does not have"
        elif name in _ADDED:
            what = "a tableau with other coefficients or another order"
        raise ConfigurationError(f"name={name!r} is taken, by {what}: choose another one")
    _ADDED[name] = row
    return row


def find_method(name: Any) -> Method:
    """Look a method up by name or alias.

    Raises
    ------
    ConfigurationError
        If there is none; the message lists the choices, or names the nearest method for a name
        of another package.
    """
    if isinstance(name, str) and name in _BY_NAME:
        return _BY_NAME[name]
    if isinstance(name, str) and name in _ADDED:
        return _ADDED[name]
    if isinstance(name, str) and name in REFUSED:
        raise ConfigurationError(
            f"method={name!r} is not one of PETSc's; the nearest here is method={REFUSED[name]!r}"
        )
    near = difflib.get_close_matches(str(name).lower(), [*_BY_NAME, *_ADDED], 1)
    hint = f"did you mean {near[0]!r}? Otherwise " if near else ""
    choices = ", ".join(repr(method.name) for method in methods())
    raise ConfigurationError(
        f"method={name!r} is unknown: {hint}choose one of {choices}, or an alias"
    )


def check_form(form: str, method: Method) -> None:
    """Refuse a method that does not solve problems of this form."""
    if form in method.forms or (form == "rhs" and "separable" in method.forms):
        return
    able = ", ".join(repr(other.name) for other in methods() if form in other.forms)
    names = {
        "imex": "implicit= and explicit=", "mass": "mass=", "residual": "residual=",
        "imex_mass": "implicit=, explicit= and mass=",
    }  # fmt: skip
    hint = (
        f"; it wants a right-hand side in two parts, {names['imex']}"
        if method.kind == "imex"
        else ""
    )
    raise ConfigurationError(
        f"method={method.name!r} does not solve problems given as {names.get(form, 'rhs=')}: "
        f"choose one of {able}{hint}"
    )


def check_mass(mass: Any, method: Method) -> None:
    """Refuse a singular mass matrix where steps leave its algebraic equations."""
    if mass is None or method.solves_constraints or not mass.singular:
        return
    form = "imex_mass" if method.kind == "imex" else "mass"
    able = [m.name for m in methods() if form in m.forms and m.solves_constraints]
    raise ConfigurationError(
        f"mass is singular, and method={method.name!r} does not end its steps at a stage, where "
        f"algebraic equations hold: choose one of {', '.join(map(repr, able))}"
    )


def markdown_table(chosen: Iterable[Method] | None = None) -> str:
    """Return the table of methods as the README shows it, or of some of them.

    "Bits": whether a repeated step has the same bits as the first time.
    """
    head = (
        "| method | other names | PETSc | order | stages | kind | adaptive | forms | adjoint "
        "| checkpoint of a step | bits |"
    )
    lines = [head, "|" + " --- |" * 11]
    for method in METHODS if chosen is None else chosen:
        petsc = method.ts_type + (f" {method.subtype}" if method.subtype else "")
        cells = (
            f"`{method.name}`",
            ", ".join(f"`{alias}`" for alias in method.aliases),
            petsc,
            str(method.order),
            str(method.stages) + (" (FSAL)" if method.fsal else ""),
            method.kind,
            "yes" if method.adaptive else "no",
            ", ".join(method.forms),
            method.adjoint,
            method.checkpoint,
            "yes" if method.same_bits else "no",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
