"""PETSc's callbacks into the vector field.

A callback must not raise: PETSc would leave its stage vectors locked. The bridge keeps the first
exception, answers with finite filler until the step is over, and the integrator raises it then.
For the same reason the user's code gets copies: a view that lives on in a traceback, a graph or a
user's list would keep PETSc's vector locked, or change under its owner.

The bridge refers to no PETSc object, and PETSc's objects refer to the bridge: no cycle keeps a TS
alive. Its field is set for the duration of one sweep.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from pnode.options import PETSc, log_event
from pnode.vectorfield import Linearization, VectorField
from pnode.vectors import copy_in, copy_out, write_checked

__all__ = ["Bridge", "JacobianShell", "ParameterJacobianShell"]


class Bridge:
    """State shared by the callbacks of one TS.

    Attributes
    ----------
    exception : BaseException or None
        What the user's code raised.
    nonfinite_time : float or None
        Stage time at which f was NaN or infinite.
    """

    def __init__(self, linearizations: int) -> None:
        self._attached: VectorField | None = None
        self.exception: BaseException | None = None
        self.nonfinite_time: float | None = None
        self._recent: deque[Linearization] = deque(maxlen=linearizations)
        self._rhs_event = log_event("pnode rhs")
        self._vjp_event = log_event("pnode vjp")
        self._jvp_event = log_event("pnode jvp")
        self._jacobian_event = log_event("pnode jacobian")

    def attach(self, field: VectorField) -> None:
        """Begin a sweep with ``field``."""
        self._attached = field
        self.exception = None
        self.nonfinite_time = None

    def detach(self) -> None:
        """End the sweep and drop everything that belongs to the user."""
        self._attached = None
        self.exception = None
        self._recent.clear()

    @property
    def _field(self) -> VectorField:
        if self._attached is None:
            raise RuntimeError("a PETSc callback was called outside of a sweep")
        return self._attached

    def take_exception(self) -> BaseException | None:
        """Return the stored exception and forget it."""
        exception, self.exception = self.exception, None
        return exception

    def rhs_function(self, ts: Any, s: float, u: Any, f: Any) -> None:
        """f = g(s, u) (PETSc's RHSFunction)."""
        if self.exception is None:
            self._rhs_event.begin()
            try:
                value = self._field.rhs(s, self.copy_of(u))
                if not write_checked(f, value) and self.nonfinite_time is None:
                    self.nonfinite_time = s
                return
            except BaseException as exception:
                self.exception = exception
            finally:
                self._rhs_event.end()
        f.set(0.0)

    def implicit_function(self, ts: Any, s: float, u: Any, u_dot: Any, f: Any) -> None:
        """f = u_dot - g(s, u) (PETSc's IFunction).

        The graph is kept: Newton's method asks for the Jacobian at the same point next.
        """
        if self.exception is None:
            self._rhs_event.begin()
            try:
                value = self.linearization(s, self.copy_of(u)).value
                copy_in(f, value)
            except BaseException as exception:
                self.exception = exception
            finally:
                self._rhs_event.end()
        if self.exception is not None:
            f.set(0.0)
        f.aypx(-1.0, u_dot)

    def implicit_jacobian(
        self, ts: Any, s: float, u: Any, u_dot: Any, shift: float, a: Any, p: Any
    ) -> None:
        """Fill p (and a) with shift I - dg/du (PETSc's IJacobian).

        PETSc's adjoint of the theta methods also asks for it with a shift of the other sign, or
        zero, only to multiply with it: nothing is assembled then.
        """
        if a.getType() == "python":
            a.getPythonContext().move_to(s, u, shift, -1.0)
            a.assemble()
        if p.getType() != "python" and (shift > 0.0 or a.handle == p.handle):
            self._assemble(s, u, shift, p)

    def _assemble(self, s: float, u: Any, shift: float, p: Any) -> None:
        matrix = None
        if self.exception is None:
            self._jacobian_event.begin()
            try:
                matrix = self.linearization(s, self.copy_of(u)).jacobian()
            except BaseException as exception:
                self.exception = exception
            finally:
                self._jacobian_event.end()
        array = p.getDenseArray()
        array[...] = 0.0 if matrix is None else -matrix.numpy()
        array.flat[:: array.shape[0] + 1] += shift
        p.assemble()

    def explicit_jacobian(self, ts: Any, s: float, u: Any, a: Any, p: Any) -> None:
        """Point the shell at dg/du(s, u) (PETSc's RHSJacobian)."""
        a.getPythonContext().move_to(s, u, 0.0, 1.0)
        a.assemble()

    def explicit_parameter_jacobian(self, ts: Any, s: float, u: Any, a: Any) -> None:
        """Point the shell at dg/dp(s, u) (PETSc's RHSJacobianP)."""
        a.getPythonContext().move_to(s, u, 1.0)

    def implicit_parameter_jacobian(
        self, ts: Any, s: float, u: Any, u_dot: Any, shift: float, a: Any
    ) -> None:
        """Point the shell at -dg/dp(s, u), the p-derivative of u_dot - g (PETSc's IJacobianP)."""
        a.getPythonContext().move_to(s, u, -1.0)

    def copy_of(self, u: Any) -> torch.Tensor:
        """Return a PETSc vector as a tensor of the field's own, in the field's precision."""
        return copy_out(u, self._field.dtype)

    def flatten_parameter_gradient(self, gradients: Any) -> torch.Tensor:
        """Collect one gradient per parameter in one flat tensor."""
        return self._field.flatten_parameter_gradient(gradients)

    def linearization(self, s: float, u: torch.Tensor) -> Linearization:
        """Return the linearization at (s, u), a recent one where it is the same point."""
        for known in self._recent:
            if known.is_at(s, u):
                return known
        known = self._field.linearize(s, u)
        self._recent.append(known)
        return known

    def vjp(self, s: float, u: torch.Tensor, w: Any) -> tuple[Any, Any] | None:
        """Return w^T dg/du and w^T dg/dp, or None once something has failed."""
        if self.exception is None:
            self._vjp_event.begin()
            try:
                return self.linearization(s, u).vjp(self.copy_of(w))
            except BaseException as exception:
                self.exception = exception
            finally:
                self._vjp_event.end()
        return None

    def jvp(self, s: float, u: torch.Tensor, v: Any) -> torch.Tensor | None:
        """Return dg/du v, or None once something has failed."""
        if self.exception is None:
            self._jvp_event.begin()
            try:
                return self.linearization(s, u).jvp(self.copy_of(v))
            except BaseException as exception:
                self.exception = exception
            finally:
                self._jvp_event.end()
        return None


class _Shell:
    """A point (s, u) at which a matrix shell stands."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.s = 0.0
        self.u = torch.empty(0)

    def _move_to(self, s: float, u: Any) -> None:
        self.s = s
        self.u = self.bridge.copy_of(u)


class JacobianShell(_Shell):
    """Python context of the matrix ``identity_factor I + jacobian_factor dg/du``."""

    identity_factor = 0.0
    jacobian_factor = 1.0

    def move_to(self, s: float, u: Any, identity_factor: float, jacobian_factor: float) -> None:
        """Stand at (s, u); nothing is evaluated until the first product."""
        self._move_to(s, u)
        self.identity_factor = identity_factor
        self.jacobian_factor = jacobian_factor

    def mult(self, mat: Any, x: Any, y: Any) -> None:
        """y = A x."""
        self._finish(x, y, self.bridge.jvp(self.s, self.u, x))

    def multTranspose(self, mat: Any, x: Any, y: Any) -> None:
        """y = A^T x."""
        product = self.bridge.vjp(self.s, self.u, x)
        self._finish(x, y, None if product is None else product[0])

    def _finish(self, x: Any, y: Any, product: torch.Tensor | None) -> None:
        if product is None:  # filler: keep Krylov methods going until the step is over
            x.copy(y)
            return
        copy_in(y, product)
        if self.jacobian_factor != 1.0:
            y.scale(self.jacobian_factor)
        if self.identity_factor:
            y.axpy(self.identity_factor, x)


class ParameterJacobianShell(_Shell):
    """Python context of the matrix ``factor dg/dp``; only its transpose is ever applied."""

    factor = 1.0

    def move_to(self, s: float, u: Any, factor: float) -> None:
        """Stand at (s, u)."""
        self._move_to(s, u)
        self.factor = factor

    def multTranspose(self, mat: Any, x: Any, y: Any) -> None:
        """y = factor (dg/dp)^T x, from the same backward pass as (dg/du)^T x."""
        product = self.bridge.vjp(self.s, self.u, x)
        if product is None:
            y.set(0.0)
            return
        copy_in(y, self.bridge.flatten_parameter_gradient(product[1]))
        if self.factor != 1.0:
            y.scale(self.factor)


def shell_matrix(
    context: JacobianShell | ParameterJacobianShell, rows: int, columns: int, comm: Any
) -> Any:
    """Create the PETSc matrix of a shell, local sizes given. Collective on ``comm``."""
    matrix = PETSc.Mat().create(comm=comm)
    matrix.setSizes(((rows, PETSc.DETERMINE), (columns, PETSc.DETERMINE)))
    matrix.setType("python")
    matrix.setPythonContext(context)
    matrix.setUp()
    matrix.assemble()
    return matrix
