"""The table of methods. A method that is not in it does not exist.

Tests, the README table and ``pnode.methods()`` are generated from :data:`METHODS`.

Orders, stages and embedded pairs are those of PETSc's ``TSRKRegisterAll`` and ``TSTHETA``; the
tests check them against PETSc's own tableaus and against measured orders of convergence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pnode.errors import ConfigurationError

__all__ = ["METHODS", "REFUSED", "Method", "Tableau", "find_method", "markdown_table", "methods"]


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit method that PETSc does not have and pnode registers.

    Attributes
    ----------
    A : tuple of tuple of float
        Stage coefficients, strictly lower triangular.
    b, b_embedded : tuple of float
        Weights of the solution and of the embedded one.
    reference : str
        Where the coefficients are from.
    """

    A: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    b_embedded: tuple[float, ...]
    reference: str


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
    kind : {"explicit", "implicit"}
        What a step costs: evaluations only, or nonlinear solves too.
    adaptive : bool
        Whether there is an error estimate to choose step sizes with.
    fsal : bool
        First Same As Last: a step's first stage is the one before's last.
    forms : tuple of str
        Problem forms; "separable" is a pair (q, p) with dq/dt = g(t, p), dp/dt = f(t, q).
    adjoint : {"TSAdjoint", "stages"}
        Where the discrete adjoint comes from: PETSc, or pnode's own pass over the stages.
    checkpoint : str
        What a checkpoint of one step holds.
    same_bits : bool
        Whether recomputing a step from (t, h, u) gives the same bits as the first pass.
    shares_ends : bool
        Whether the first state a checkpoint holds is the last of the step before.
    tableau : Tableau or None
        Coefficients, where PETSc lacks the method.
    """

    name: str
    ts_type: str
    order: int
    stages: int
    aliases: tuple[str, ...] = ()
    subtype: str = ""
    kind: str = "explicit"
    adaptive: bool = False
    fsal: bool = False
    forms: tuple[str, ...] = ("rhs",)
    adjoint: str = "TSAdjoint"
    checkpoint: str = "stages"
    same_bits: bool = True
    shares_ends: bool = False
    tableau: Tableau | None = field(default=None, repr=False)

    @property
    def implicit(self) -> bool:
        """Whether a step solves nonlinear systems."""
        return self.kind == "implicit"


def _rk(name: str, subtype: str, order: int, stages: int, *aliases: str, **more: Any) -> Method:
    names = [other for other in (subtype, *aliases, f"rk{subtype}") if other != name]
    kept = stages - 1 if more.get("fsal") else stages
    return Method(
        name, "rk", order, stages, tuple(names), subtype,
        checkpoint=f"{kept} stage{'s' if kept > 1 else ''}",
        same_bits=not more.get("fsal", False), **more,
    )  # fmt: skip


def _theta(name: str, ts_type: str, order: int, stages: int, *aliases: str) -> Method:
    shared = ts_type != "theta"  # the endpoint forms
    return Method(
        name, ts_type, order, stages, aliases, kind="implicit", adaptive=True, shares_ends=shared,
        checkpoint="solution" if shared else "1 stage and the solution",
    )  # fmt: skip


def _dirk(name: str, subtype: str, order: int, stages: int, *aliases: str) -> Method:
    """Return a row for TSDIRK, whose subtype says E(xplicit first stage), S, A, L(-stable)."""
    shared = subtype.startswith("es") and "sa" in subtype.removeprefix("es")
    names = [other for other in (subtype, *aliases, f"dirk{subtype}") if other != name]
    return Method(
        name, "dirk", order, stages, tuple(names), subtype, kind="implicit", adaptive=True,
        shares_ends=shared, checkpoint=f"{stages - shared} stages", same_bits=False,
    )  # fmt: skip


def _ssp(name: str, subtype: str, order: int, stages: int, *aliases: str) -> Method:
    return Method(
        name, "ssp", order, stages, aliases, subtype, adjoint="stages",
        checkpoint=f"{stages} stages",
    )  # fmt: skip


def _symplectic(name: str, subtype: str, order: int, updates: int, *aliases: str) -> Method:
    return Method(
        name, "basicsymplectic", order, order, aliases, subtype, forms=("separable",),
        adjoint="stages", checkpoint=f"{updates} states",
    )  # fmt: skip


def _rosw(name: str, order: int, stages: int, *aliases: str, **more: Any) -> Method:
    """Return a row for TSROSW; every type but the theta methods has an embedded one."""
    subtype = more.pop("subtype", name)
    names = (*aliases, f"rosw_{subtype}") if name != f"rosw_{subtype}" else aliases
    return Method(
        name, "rosw", order, stages, names, subtype, kind="implicit",
        adaptive=not subtype.startswith("theta"), adjoint="stages", checkpoint="solution", **more,
    )  # fmt: skip


_FEHLBERG2 = Tableau(
    A=((0.0, 0.0, 0.0), (1 / 2, 0.0, 0.0), (1 / 256, 255 / 256, 0.0)),
    b=(1 / 512, 255 / 256, 1 / 512),
    b_embedded=(1 / 256, 255 / 256, 0.0),
    reference="E. Fehlberg, NASA TR R-315 (1969), RK1(2)",
)

#: Every method, explicit ones first, each group by order.
METHODS: tuple[Method, ...] = (
    _rk("euler", "1fe", 1, 1, "forward_euler"),
    _rk("heun2", "2a", 2, 2, "heun", "adaptive_heun", adaptive=True),
    _rk("midpoint", "2b", 2, 2, "explicit_midpoint"),
    _rk("fehlberg2", "fehlberg2", 2, 3, adaptive=True, tableau=_FEHLBERG2),
    _rk("rk3", "3", 3, 3),
    _rk("bosh3", "3bs", 3, 4, "bogacki_shampine3", adaptive=True, fsal=True),
    _rk("rk4", "4", 4, 4, "classical"),
    _rk("fehlberg5", "5f", 5, 6, "rkf45", adaptive=True),
    _rk("dopri5", "5dp", 5, 7, "dormand_prince5", adaptive=True, fsal=True),
    _rk("bosh5", "5bs", 5, 8, "bogacki_shampine5", adaptive=True, fsal=True),
    _rk("verner6", "6vr", 6, 9, adaptive=True, fsal=True),
    _rk("verner7", "7vr", 7, 10, adaptive=True),
    _rk("verner8", "8vr", 8, 13, adaptive=True),
    _ssp("ssprk22", "rks2", 2, 2),
    _ssp("ssprk52", "rks2", 2, 5, "rks2"),
    _ssp("ssprk43", "rks3", 3, 4),
    _ssp("ssprk93", "rks3", 3, 9, "rks3"),
    _ssp("ssprk104", "rk104", 4, 10, "rk104"),
    _symplectic("symplectic_euler", "1", 1, 2, "sieuler"),
    _symplectic("velocity_verlet", "2", 2, 3, "velverlet"),
    _symplectic("ruth3", "3", 3, 6),
    _symplectic("forest_ruth", "4", 4, 7, "yoshida4"),
    _theta("beuler", "beuler", 1, 1, "be", "implicit_euler", "backward_euler"),
    _theta("cn", "cn", 2, 2, "crank_nicolson", "trapezoid"),
    _theta("implicit_midpoint", "theta", 2, 1, "theta"),
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
)

#: Names of other packages that pnode does not have, with the nearest method it has.
REFUSED: dict[str, str] = {
    "dopri8": "verner8",
    "tsit5": "dopri5",
    "heun3": "rk3",
    "explicit_adams": "dopri5",
    "fixed_adams": "rk4",
    "implicit_adams": "cn",
    "adams": "dopri5",
    "radauIIA3": "esdirk3",
    "radauIIA5": "esdirk6",
    "radau": "esdirk6",
    "gl2": "implicit_midpoint",
    "gl4": "implicit_midpoint",
    "gl6": "implicit_midpoint",
    "gauss_legendre": "implicit_midpoint",
    "kvaerno3": "esdirk3",
    "kvaerno4": "es325",
    "kvaerno5": "esdirk6",
    "bdf": "es325",
    "scipy_solver": "es325",
}

_BY_NAME: dict[str, Method] = {
    name: method for method in METHODS for name in (method.name, *method.aliases)
}


def methods() -> tuple[Method, ...]:
    """Every method pnode has, as rows of a table. Not collective.

    Returns
    -------
    tuple of Method
        With name, aliases, PETSc type and subtype, order, stages, kind, adaptive, forms, adjoint,
        checkpoint content and whether recomputation gives the same bits.
    """
    return METHODS


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
    if isinstance(name, str) and name in REFUSED:
        raise ConfigurationError(
            f"method={name!r} is not one of PETSc's; the nearest here is method={REFUSED[name]!r}"
        )
    choices = ", ".join(repr(method.name) for method in METHODS)
    raise ConfigurationError(f"method={name!r} is unknown: choose one of {choices}, or an alias")


def markdown_table() -> str:
    """Return the table of methods as the README shows it."""
    head = (
        "| method | other names | PETSc | order | stages | kind | adaptive | checkpoint of a step |"
    )
    lines = [head, "|" + " --- |" * 8]
    for method in METHODS:
        petsc = method.ts_type + (f" {method.subtype}" if method.subtype else "")
        cells = (
            f"`{method.name}`",
            ", ".join(f"`{alias}`" for alias in method.aliases),
            petsc,
            str(method.order),
            str(method.stages) + (" (FSAL)" if method.fsal else ""),
            method.kind,
            "yes" if method.adaptive else "no",
            method.checkpoint,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
