"""Jacobians of a solve's outputs, forward or adjoint, whichever takes fewer solves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves

from pnode.base.real_times import real_times
from pnode.errors import ConfigurationError
from pnode.problems import arguments
from pnode.problems.user_state import Structure
from pnode.solver import Solver

__all__ = ["Sensitivities", "sensitivities"]

_Y0 = "y0"


class Sensitivities(dict[str, Any]):
    """Jacobians by name, and how they were found.

    Attributes
    ----------
    mode : {"forward", "adjoint"}
        How.
    tangents : int
        Tangents that forward mode takes: entries of everything in ``wrt``.
    cotangents : int
        Backward sweeps that the adjoint takes: entries of ``ys``.
    """

    def __init__(self, found: dict[str, Any], mode: str, tangents: int, cotangents: int) -> None:
        super().__init__(found)
        self.mode, self.tangents, self.cotangents = mode, tangents, cotangents


def sensitivities(
    solver: Solver,
    y0: Any,
    t: Any,
    wrt: Sequence[str] = (_Y0,),
    mode: Literal["auto", "forward", "adjoint"] = "auto",
    breakpoints: Any = None,
) -> Sensitivities:
    """Return the Jacobians of ``solver(y0, t).ys`` with respect to y0 and parameters. Collective.

    They are those of the numbers that the solve returned, to round-off (for implicit methods, to
    the accuracy of their equations); the accepted steps are constants in them.

    Parameters
    ----------
    solver : Solver
        Its function has its parameters as a ``torch.nn.Module``.
    y0 : Tensor or tuple of Tensor
        Initial state. Its own graph is not gone through.
    t : Tensor
        Output times, shape ``(T,)``; of independent samples also ``(B, T)``.
    wrt : sequence of str
        "y0", but not of independent samples, and names of parameters: as in
        ``solver.named_parameters()``, or without the first part of that ("rhs.", "implicit."...)
        where that is clear.
    mode : {"auto", "forward", "adjoint"}
        "forward": one solve of the state with all tangents together, one for each entry of what is
        in ``wrt``; the linear systems of implicit methods share their factors. "adjoint": one
        solve, and one backward sweep for each entry of ``ys``. "auto": forward unless there are
        more tangents than cotangents.
    breakpoints : Tensor, sequence of float, control (or several), or callable, optional
        Of the solve, see :meth:`Solver.forward`; constants here.

    Returns
    -------
    Sensitivities
        A dict of a Tensor of shape ``(T, *state, *that tensor)``, y0's dtype, for each name of
        ``wrt``, without a graph; for tuple states a tuple of them, one for each part of ``ys`` (and
        for "y0" of each a tuple, one for each part of y0). Its ``mode``, ``tangents`` and
        ``cotangents`` tell what was chosen by which counts.

    Raises
    ------
    ConfigurationError
        For an unknown name or mode, a complex or integer parameter, and for what forward mode and
        ``torch.func`` cannot pass through (``event_fn``; see docs/derivatives.md).
    BackwardError
        Where the solve has no tangents: with ``layout=``.

    Examples
    --------
    >>> solver = Solver(lambda t, y: -y, method="rk4", step_size=0.1)
    >>> y0 = torch.ones(1, dtype=torch.float64)
    >>> found = sensitivities(solver, y0, torch.tensor([0.0, 1.0]))
    >>> round(found["y0"][-1].item(), 5), found.mode
    (0.36788, 'forward')
    """
    if not isinstance(solver, Solver):
        raise ConfigurationError(f"solver is a {type(solver).__name__}: give a pnode.Solver")
    if solver.event_fn is not None:
        raise ConfigurationError(
            "solver has event_fn, and how many outputs there are depends on the event's time: take "
            "torch.func.jacfwd or jacrev of what you need of the solution"
        )
    arguments.choice("mode", mode, ("auto", "forward", "adjoint"))
    names = _names(solver, wrt)
    if solver._requests.independent is not None and _Y0 in wrt:
        raise ConfigurationError(
            f"wrt={tuple(wrt)!r} has 'y0', and solver samples='independent', whose Jacobians by y0 "
            "are blocks, one for each row: take torch.autograd.grad(ys[i, :, j].sum(), y0, "
            "retain_graph=True), which is row j of all blocks at once"
        )
    known = {name: tensor.detach() for name, tensor in solver.named_parameters()}
    initial = _numbers(y0)
    given = {
        name: initial if name == _Y0 else known[full] for name, full in zip(wrt, names, strict=True)
    }
    size = sum(part.numel() for part in tree_leaves(initial))
    tangents = sum(size if name == _Y0 else tensor.numel() for name, tensor in given.items())
    cotangents = (real_times("t", t, "give output times").shape or (1,))[-1] * size
    if mode == "auto":
        mode = "forward" if tangents <= cotangents else "adjoint"

    places = _places(solver)

    def outputs(moving: dict[str, Any]) -> Any:
        own = {full: moving[name] for name, full in zip(wrt, names, strict=True) if name != _Y0}
        if mode == "adjoint":  # of these alone
            own = {**known, **own}
        lent = {place: tensor for full, tensor in own.items() for place in places[full]}
        return torch.func.functional_call(
            solver, lent, (moving.get(_Y0, initial), t), {"breakpoints": breakpoints},
            tie_weights=False,
        ).ys  # fmt: skip

    way = torch.func.jacfwd if mode == "forward" else torch.func.jacrev
    with torch.no_grad():
        found = way(outputs)(given)
    if isinstance(found, tuple):
        found = {name: tuple(part[name] for part in found) for name in given}
    return Sensitivities(found, mode, tangents, cotangents)


def _numbers(y0: Any) -> Any:
    """Return an initial state without graphs."""
    if Structure.of(y0) is not None:
        raise ConfigurationError(
            f"y0 is a {type(y0).__name__}, or complex: give a real tensor or a tuple of such, and "
            "let f make of it what it needs"
        )
    several = isinstance(y0, (tuple, list))
    parts = tuple(y0) if several else (y0,)
    for index, part in enumerate(parts):
        if not isinstance(part, torch.Tensor):
            where = f"y0[{index}]" if len(parts) > 1 else "y0"
            raise ConfigurationError(f"{where} is a {type(part).__name__}: give a tensor")
    numbers = tuple(part.detach() for part in parts)
    return numbers if several else numbers[0]


def _places(solver: Solver) -> dict[str, list[str]]:
    """Return where each parameter is, by its name.

    torch's own way, ``tie_weights``, exchanges what a Module that is in two places has twice, and
    leaves the second there.
    """
    found: dict[int, list[str]] = {}
    for path, module in solver.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                found.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
    return {name: found[id(tensor)] for name, tensor in solver.named_parameters()}


def _names(solver: Solver, wrt: Sequence[str]) -> list[str]:
    """Return the names of parameters as the solver has them; "y0" as it is."""
    several = isinstance(wrt, Sequence) and not isinstance(wrt, str)
    if not several or not wrt or not all(isinstance(name, str) for name in wrt):
        raise ConfigurationError(f"wrt={wrt!r}: give a sequence of names, such as ('y0', 'weight')")
    own = dict(solver.named_parameters())
    found = []
    for name in wrt:
        full = [one for one in own if one == name or one.partition(".")[2] == name]
        if name != _Y0 and len(full) != 1:
            raise ConfigurationError(
                f"wrt names {name!r}, which is "
                + ("ambiguous" if full else "no parameter")
                + f": give 'y0' or one of {', '.join(map(repr, own)) or 'none, as there is none'}"
                + ("" if own else "; f has to be a torch.nn.Module that holds its parameters")
            )
        if name != _Y0 and not own[full[0]].is_floating_point():
            raise ConfigurationError(
                f"wrt names {name!r}, which is {own[full[0]].dtype}: only real parameters"
            )
        found.append(_Y0 if name == _Y0 else full[0])
    if len(set(found)) < len(found):
        raise ConfigurationError(f"wrt={tuple(wrt)!r} names something twice: give each once")
    return found
