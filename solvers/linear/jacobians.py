"""Jacobians of implicit methods: which matrices PETSc gets, and when they are evaluated anew.

A nonlinear system F(s, u, u_dot) = 0 is solved with ``shift dF/du_dot - dg/du`` (F = M u_dot - g;
for a residual g stands for -F). :mod:`pnode.solvers.linear.assembly` has the matrices.

Jacobians refer to no PETSc object, as the callbacks that ask for them: no cycle keeps a TS alive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from pnode.base.devices import HOST, Place
from pnode.base.errors import ConfigurationError
from pnode.base.vectors import is_finite
from pnode.layout.layouts import Layout
from pnode.problems.problem import StateLayout
from pnode.solvers.linear.assembly import Assembly, differ, finite, probe
from pnode.solvers.linear.block import BlockAssembly, sample_count
from pnode.solvers.linear.constancy import Constancy, rounded
from pnode.solvers.linear.dense import DenseAssembly
from pnode.solvers.linear.given import GivenAssembly, GivenMatrix
from pnode.solvers.linear.given_solves import GivenSolve
from pnode.solvers.linear.linearizer import Linearizer, Point
from pnode.solvers.linear.sparse import SparseAssembly, SparsityPattern
from pnode.solvers.linear.straying import Straying
from pnode.solvers.pairs import PairAssembly

__all__ = ["Jacobian", "JacobianOptions", "create_assembly"]

# More Krylov iterations than this in one solve want a new preconditioner.
_MANY_ITERATIONS = 10
# Relative difference of shifts that share a factorization where the Jacobian is constant.
_SAME_SHIFT = 1e-11
_NEVER = (math.nan, -1)  # shift and object state of a matrix that has not been filled


class Jacobian:
    """What a TS calls for its Jacobian, with the last evaluation of it.

    Parameters
    ----------
    assembly : Assembly or None
        How to assemble; None for products only.
    reuse : {"auto", "iteration", "step", "solve", "constant"}
        When to evaluate anew; see ``Solver``.
    shell : bool
        Whether the operator is a shell, and the assembled matrix only preconditions it.
    found : bool
        Whether the structure of the matrix was only found, so that another one is no error.
    """

    def __init__(
        self, assembly: Assembly | None, reuse: str, shell: bool = False, found: bool = False
    ) -> None:
        self._assembly = assembly
        self._found = found
        self.constant = reuse == "constant"
        self._reuse = reuse
        self._shell = shell
        self.straying = Straying()
        #: Guesses whether the Jacobian is constant, with "auto" and matrices that are factored.
        self.constancy: Constancy | None = None
        if reuse == "auto" and not shell and not isinstance(assembly, PairAssembly):
            self.constancy = Constancy()
        self.forget()

    def forget(self) -> None:
        """Begin or end a sweep: nothing is known of the field."""
        if isinstance(self._assembly, PairAssembly):
            self._assembly.forget()
        self._values: Any = None
        self._formed = _NEVER
        self._first: Point | None = None
        self._checked = self._found
        self._promise: _Promise | None = None
        self._norm = math.inf
        self.always = False
        if self.constancy is not None:
            self.constancy.forget()

    def check_structure(self) -> None:
        """Compare the first assembly to come with a product in any case."""
        self._checked = False

    def renew(self) -> None:
        """Evaluate anew next time: a step has failed."""
        if not self.constant:
            self._values = None

    def begin_step(self, guess: bool | None = None) -> None:
        """Begin a step: its bits depend on nothing that came before it, unless so chosen.

        ``guess`` tells of a step to be repeated whether its Jacobian was taken for constant.
        """
        if self.constancy is not None:
            self.constancy.begin_step(guess)
        if self._reuse == "step" or (self._reuse == "auto" and not self.guessing):
            self._values = None

    @property
    def reused(self) -> bool:
        """Whether a failure may be due to an old Jacobian."""
        return self._reuse in ("auto", "step", "solve") and not self._shell

    @property
    def guessed(self) -> bool:
        """Whether an adjoint takes the Jacobian for constant, without a promise."""
        return self.constancy is not None and self.constancy.holds

    @property
    def guessing(self) -> bool:
        """Whether the step under way takes it for that."""
        return self.constancy is not None and self.constancy.used

    @property
    def mistaken(self) -> bool:
        """Whether it did, and found that it is not."""
        return self.constancy is not None and self.constancy.mistaken

    @property
    def records(self) -> bool:
        """Whether the next evaluation of F should keep its graph, for derivatives there."""
        if self.constant:
            return self._first is None
        if self._shell or self.always or self._reuse == "iteration":
            return True
        return self._values is None

    def compute(
        self,
        linearizer: Linearizer,
        ts: Any,
        s: float,
        u: Any,
        u_dot: Any,
        shift: float,
        a: Any,
        p: Any,
    ) -> None:
        """Fill p (and a) with ``shift dF/du_dot - dg/du`` (PETSc's IJacobian)."""
        point: Point | None = None
        if self.constant:
            point = self._stay(linearizer, s, u, u_dot)
        elif self._shell:
            point = linearizer.jacobian_point(s, u, u_dot)
        if self._shell:
            a.getPythonContext().move_to(point, shift, -1.0)
            a.assemble()
        if self._assembly is None:
            return
        if self._outdated(ts) or self._values is None:
            self._fill(linearizer, linearizer.jacobian_point(s, u, u_dot))
        self._form(linearizer, rounded(shift) if self._reuse == "auto" else shift, p)

    def compute_at(
        self, linearizer: Linearizer, point: Point, shift: float, matrices: tuple[Any, Any],
        exactly: bool = True,
    ) -> None:  # fmt: skip
        """Do as :meth:`compute`, for an adjoint: exactly there, unless it is constant.

        Without ``exactly`` also unless it is taken for constant: what is solved with the matrix is
        then to be checked.
        """
        a, p = matrices
        if self._shell:
            a.getPythonContext().move_to(point, shift, -1.0)
            a.assemble()
        if self.constant:  # forward, BDF may converge without it
            self._test(linearizer, point)
        if self._assembly is None:
            return
        guessed = self.guessed and not exactly
        if self._values is None or not (self.constant or guessed):
            self._fill(linearizer, point)
        self._form(linearizer, rounded(shift) if guessed else shift, p)

    def _fill(self, linearizer: Linearizer, point: Point) -> None:
        """Evaluate the Jacobian at a point, which is that of the matrices from now on."""
        before = self._values if self.guessing or self.guessed else None
        self._values = linearizer.guarded("jacobian", self._evaluate, linearizer, point)
        if self.constancy is not None:
            self.constancy.look(self._values, point, before)
            if before is not None and (self.guessing or self.guessed):
                return  # the same as before
        first = self._values[0] if isinstance(self._values, tuple) else None
        if isinstance(first, torch.Tensor) and not is_finite(first):
            linearizer.note_infinite(point)
        self._formed = _NEVER

    def _form(self, linearizer: Linearizer, shift: float, p: Any) -> None:
        """Fill p from what has been evaluated, unless it is there."""
        assert self._assembly is not None
        # Steps of one length differ by the round-off of their ends.
        close = _SAME_SHIFT if self.constant else 0.0
        formed, state = self._formed
        # PETSc factors again if the matrix has changed, and scales it for DIRK's initial slope.
        if not math.isclose(shift, formed, rel_tol=close) or state != p.stateGet():
            self._assembly.form(p, self._values, shift)
            linearizer.field.ledger.factorizations += 1
            self._formed = (shift, p.stateGet())

    def _outdated(self, ts: Any) -> bool:
        if self.always or self._reuse == "iteration":
            return True
        if self.constant:
            return False
        snes = ts.getSNES()
        if self._shell:
            return bool(snes.getKSP().getIterationNumber() > _MANY_ITERATIONS)
        norm = snes.getFunctionNorm()
        if isinstance(self._assembly, PairAssembly):  # what the state drives changes nothing
            norm = self._assembly.residual_norm(snes)
        before, self._norm = self._norm, norm
        if snes.getIterationNumber() == 0:
            self.straying.begin(norm, self._values is not None)
            return False
        if self.constancy is not None and self.constancy.used:
            return self.constancy.doubts(norm, before)
        return self.straying.slow(snes, norm, before)

    def _evaluate(self, linearizer: Linearizer, point: Point) -> Any:
        assert self._assembly is not None
        values = self._assembly.evaluate(linearizer, point, not self._checked)
        self._checked = self._checked or finite(values)  # what is not says nothing
        return values

    def _stay(self, linearizer: Linearizer, s: float, u: Any, u_dot: Any) -> Point:
        """Return the first point of the sweep; at others, test the promise."""
        if self._first is None:
            self._first = linearizer.point(s, u, u_dot)
            self._test(linearizer, self._first)
        elif self._test(linearizer, linearizer.point(s, u, u_dot)) and not self._shell:
            self._first.linearization = None  # its graph has served
        return self._first

    def _test(self, linearizer: Linearizer, point: Point) -> bool:
        """Test the promise of a constant Jacobian at this point, unless it is near others."""
        if self._promise is None:
            self._promise = linearizer.guarded("jacobian", _Promise, linearizer, point)
            return False
        if not self._promise.far(point):
            return False
        linearizer.guarded("jacobian", self._promise.test, linearizer, point)
        return True


@dataclass(frozen=True)
class JacobianOptions:
    """What there is to choose besides the kind of Jacobian.

    Attributes
    ----------
    reuse : {"auto", "iteration", "step", "solve", "constant"}
        When to evaluate anew; see ``Solver``. "auto": of one-step methods that iterate.
    preconditioner : {"dense", "block", "sparse"}, GivenMatrix, GivenSolve or None
        Of a matrix-free operator.
    pattern : SparsityPattern or None
        Where entries may be.
    samples : int
        Number of independent samples.
    exchange : Layout or None
        Of a state with ghost cells.
    by_rank : bool
        Whether several ranks share the state: "dense" is then one block for each.
    pair : PairOptions or None
        Of a state and its tangents, whose Jacobian is "pair".
    found : bool
        Whether "auto" has found the structure, which then may be another one elsewhere.
    """

    reuse: str = "iteration"
    preconditioner: str | GivenMatrix | GivenSolve | None = None
    pattern: SparsityPattern | None = None
    samples: int = 1
    exchange: Layout | None = None
    by_rank: bool = False
    pair: Any = None
    found: bool = False

    def assembled(self, jacobian: str) -> str | None:
        """Return what is assembled: "dense", "block", "sparse", "given" or None."""
        if jacobian == "matrix-free":
            kind = "given" if isinstance(self.preconditioner, GivenMatrix) else self.preconditioner
            kind = kind if isinstance(kind, str) else None
        else:
            kind = jacobian
        return "block" if kind == "dense" and self.by_rank else kind

    def for_layout(
        self,
        jacobian: str,
        layout: StateLayout,
        patterns: dict[Any, SparsityPattern],
        exchange: Layout | None = None,
    ) -> JacobianOptions:
        """Return the options for one state layout. Collective with an exchange.

        ``patterns`` keeps detected patterns by the state's shapes.

        Raises
        ------
        ConfigurationError
            If the layout does not suit them.
        """
        kind = self.assembled(jacobian)
        if exchange is not None:
            return self._for_exchange(kind, exchange, patterns)
        if kind == "block":
            if self.by_rank and "dense" in (jacobian, self.preconditioner):
                return self
            return replace(self, samples=sample_count(layout))
        if kind != "sparse":
            return self
        if self.pattern is None:
            return replace(self, pattern=patterns.setdefault(layout.shapes, SparsityPattern()))
        if self.pattern.size != layout.size:
            raise ConfigurationError(
                f"jacobian_pattern has {self.pattern.size} rows and columns for a state of "
                f"{layout.size} entries: give ({layout.size}, {layout.size}), for the flattened "
                "state"
            )
        return self

    def _for_exchange(
        self, kind: str | None, exchange: Layout, patterns: dict[Any, SparsityPattern]
    ) -> JacobianOptions:
        if kind not in (None, "sparse"):
            raise ConfigurationError(
                f"jacobian={kind!r} (or such a preconditioner) with layout=: a state with ghost "
                "cells takes jacobian='matrix-free' or 'sparse'"
            )
        if self.pattern is not None:
            raise ConfigurationError(
                "jacobian_pattern given with layout=: drop it; Grid(stencil=, width=) and "
                "GhostLayout(pattern=) tell where entries may be"
            )
        if kind == "sparse" and exchange not in patterns:
            rows, columns = exchange.pattern() or (None, None)
            patterns[exchange] = SparsityPattern(rows, columns, exchange.size, exchange.columns())
        return replace(self, pattern=patterns[exchange] if kind else None, exchange=exchange)


def create_assembly(jacobian: str, options: JacobianOptions, place: Place = HOST) -> Any:
    """Return the Assembly of what is assembled at ``place``, or None."""
    kind = options.assembled(jacobian)
    exact = kind == jacobian and not options.found
    if kind == "dense":
        return DenseAssembly(place)
    if kind == "block":
        return BlockAssembly(options.samples, place, exact)
    if kind == "sparse":
        assert options.pattern is not None
        return SparseAssembly(options.pattern, place, exact)
    if kind == "pair":
        pair = options.pair
        return PairAssembly(pair, create_assembly(pair.jacobian, pair.options, place), place)
    if kind == "given":
        assert isinstance(options.preconditioner, GivenMatrix)
        return GivenAssembly(options.preconditioner, place)
    return None


class _Promise:
    """The promise of a constant Jacobian, tested by one product.

    First at the first other state, which may be very near, then wherever the distance to the first
    one in state or time has grown tenfold.
    """

    def __init__(self, linearizer: Linearizer, first: Point) -> None:
        self._s, self._u = first.s, first.u
        _, self._products = probe(linearizer.linearize(first))
        self._reach = (0.0, 0.0)

    def far(self, point: Point) -> bool:
        """Whether no point so far from the first one has been tested."""
        distances = self._distances(point)
        return any(far > 10.0 * near for far, near in zip(distances, self._reach, strict=True))

    def test(self, linearizer: Linearizer, point: Point) -> None:
        """Compare the products at this point with those at the first one."""
        state, time = self._distances(point)
        self._reach = max(state, self._reach[0]), max(time, self._reach[1])
        _, after = probe(linearizer.linearize(point))
        for one, two in zip(self._products, after, strict=True):
            # Entries of a product cancel in parts: relative to the largest.
            if differ(two, one, one.abs().max().expand_as(one)):
                raise ConfigurationError(
                    "jacobian_reuse='constant' promises that the implicit part is linear with "
                    "constant coefficients, and its Jacobian differs between two states: use "
                    "jacobian_reuse='step' or 'iteration'"
                )

    def _distances(self, point: Point) -> tuple[float, float]:
        return float((point.u - self._u).abs().max()), abs(point.s - self._s)
