"""What a solve returns: the states at the output times and the ledger of what it cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal

import torch
from mpi4py import MPI
from torch.utils._pytree import tree_leaves
from typing_extensions import TypeVar

from pnode.base.errors import BackwardError, ConfigurationError
from pnode.base.ledger import Stats
from pnode.base.options import PETSc
from pnode.layout.petsc_vectors import as_vector
from pnode.solutions.presentation import Presentation

__all__ = ["Occurrences", "Solution", "Stage"]


State = TypeVar("State", default=Any)


@dataclass(frozen=True, eq=False)
class Stage:
    """One evaluation of f in a step, and the cotangent of its value; see :meth:`Solution.stages`.

    Attributes
    ----------
    t : float
        Its time t_i.
    state : Tensor or tuple of Tensor
        Its state Y_i, like y0, detached.
    adjoint : Tensor or tuple of Tensor
        a_i, the cotangent of f(t_i, Y_i), like y0, detached.
    weight : float
        h b_i, its weight in the step's quadrature; h is negative where t decreases. Of BDF: the
        step's length, and where it starts, the length of each substep times that of its chain.
    part : str
        Which f: "rhs"; "implicit" or "explicit" of a split one; of a symplectic method, of whose
        f one half is used, "positions" or "momenta".
    """

    t: float
    state: Any
    adjoint: Any
    weight: float
    part: str = "rhs"


@dataclass(frozen=True, eq=False)
class Occurrences:
    """When and where one event has occurred.

    Attributes
    ----------
    times : Tensor
        Shape ``(n,)``, in the order of the solve, dtype of the output times; differentiable.
    states : Tensor or tuple of Tensor
        The states there, shape ``(n, *y0.shape)``; differentiable.
    """

    times: torch.Tensor
    states: Any


@dataclass(repr=False)
class Solution(Presentation, Generic[State]):
    """Result of a solve.

    Attributes
    ----------
    ts : Tensor
        The output times, shape ``(T,)``, as given. After an event: those before it, and its own
        time.
    ys : Tensor or tuple of Tensor
        The states, shape ``(T, *y0.shape)``, dtype and device of y0; differentiable.
    stats : Stats
        The ledger. ``stats.backward`` fills up when gradients are computed.
    reason : str
        ``"t_end"``, or ``"event"`` if a terminal event came before.
    event_time : Tensor or None
        Time of the terminal event, 0-dim, differentiable; None without one.
    stage_sweep : object
        For :meth:`stages`.
    costs : Tensor or None
        Integrals of ``cost`` from ``t[0]`` to each output time, shape ``(T, *shape of r)``,
        differentiable; None without it. Of ranks that share a state: this rank's own.
    events : tuple of Occurrences
        For each event of ``event_fn``: the times at which it has occurred and the states there,
        the one that ended the solve included.
    event : int or None
        Which of them ended the solve; None if none did.
    home : tuple or None
        Communicator and layout of the state, for :meth:`vec`.
    path : object
        For calls.
    """

    ts: torch.Tensor
    ys: State
    stats: Stats
    reason: str = "t_end"
    event_time: torch.Tensor | None = None
    costs: torch.Tensor | None = None
    stage_sweep: Any = field(default=None, repr=False, compare=False)
    events: tuple[Occurrences, ...] = ()
    event: int | None = None
    home: Any = field(default=None, repr=False, compare=False)
    path: Any = field(default=None, repr=False, compare=False)

    def __call__(self, t: Any) -> State:
        """Return the state at any times of the solve, with ``dense=True``. Collective.

        The steps are taken again, up to the last one asked for, and their interpolants evaluated:
        those of dense output. So ask for many times at once. Nothing is kept for that but the list
        of steps.

        Parameters
        ----------
        t : Tensor, sequence of float, or float
            Times between the first and the last of the solve, or that of the event which has ended
            it; real, any shape, in any order. Of independent samples: one time, shape ``(T,)``, or
            ``(B, T)`` for each row's own.

        Returns
        -------
        Tensor, or tuple, dict... of Tensor
            Shape ``(*t.shape, *y0.shape)``, dtype and device of y0, like it; at output times the
            bits of ``ys``. Of independent samples ``(T, *y0.shape)``. Differentiable like ``ys``,
            and with respect to t.

        Raises
        ------
        ConfigurationError
            For a time outside of the interval or NaN, of another dtype, and if there is nothing to
            ask: without ``dense=True``, and of a solution that was loaded or copied.
        FieldChanged
            If y0 or a parameter was written into since the solve.
        """
        return self._path().at(t, 0)

    def derivative(self, t: Any, side: Literal["after", "before"] = "after") -> State:
        """Return dy/dt at any times: the derivative of what a call returns. Collective.

        Parameters
        ----------
        t : Tensor, sequence of float, or float
            As for a call.
        side : {"after", "before"}
            Which derivative is meant where two steps meet, as at a break point: that of the later
            one, in the order of the solve, or of the one before.

        Returns
        -------
        Tensor, or tuple, dict... of Tensor
            Like the state. At the ends of steps it is f there.

        Raises
        ------
        ConfigurationError, FieldChanged
            As for a call.
        """
        return self._path().at(t, 1, side)

    def _path(self) -> Any:
        if self.path is None:
            raise ConfigurationError(
                "this solution cannot be asked at other times: solve with dense=True; one that was "
                "loaded or copied has its numbers alone, and one traced by torch.func.linearize too"
            )
        return self.path

    def vec(self, index: int = -1) -> PETSc.Vec:
        """Return one of the states as a new petsc4py Vec. Collective on the ranks of the state.

        Parameters
        ----------
        index : int
            Of the output time; the last by default.

        Returns
        -------
        PETSc.Vec
            The flattened state, its parts one after the other; the global vector of the layout's DM
            where it has one. On the host, detached, in PETSc's precision.

        Raises
        ------
        ConfigurationError
            For a complex state, and for independent samples with output times of their own.
        """
        comm, layout = self.home or (MPI.COMM_SELF, None)
        return as_vector([part[index] for part in tree_leaves(self.ys)], comm, layout)

    def stages(self, cotangents: State, callback: Callable[[Stage], Any]) -> None:
        """Tell of each stage and its adjoint in a backward sweep from the last one. Collective.

        The a_i are those of the discrete adjoint: over all stages the sum of a_i^T df/dp (t_i, Y_i)
        is the derivative of <cotangents, ys> with respect to the parameters, y0 held fixed. Stages
        whose adjoint is zero because no output depends on them are left out.

        Parameters
        ----------
        cotangents : Tensor or tuple of Tensor
            Derivatives of a loss with respect to ``ys``, of their shape.
        callback : callable
            Called with each :class:`Stage`, in the caller's grad mode, and with the autocast,
            training flags and so on of the forward solve. What it raises comes through.

        Raises
        ------
        BackwardError
            Of a solve without gradients, in a transform of torch.func or with
            ``gradient="continuous"``; of Rosenbrock methods, whose gradient is no such sum; of
            ``residual``, ``layout``, ``dense``, and of a solve in which an event occurred.
        ConfigurationError
            If cotangents have another shape than ``ys``.
        FieldChanged
            If y0 or a parameter was written into since.

        Notes
        -----
        Only one step's stages are alive at a time, within the limits of ``checkpointing``. A
        callback, and no iterator: a sweep holds PETSc's objects and modes of torch's, which an
        iterator that is left half way would leave behind. Like ``backward`` a sweep uses the
        checkpoints up; the next of either kind repeats the steps first. Compiled steps are taken
        again without. ``stats.backward`` counts it.
        """
        if self.stage_sweep is None:
            raise BackwardError(
                "this solution has no stages: solve outside of torch.no_grad() and torch.func, "
                "with y0, t or a parameter that requires grad and gradient='discrete'"
            )
        self.stage_sweep.take(cotangents, callback)
