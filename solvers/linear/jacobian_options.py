"""Checks of the arguments that belong to ``jacobian=``."""

from __future__ import annotations

from typing import Any

import torch

from pnode.base.errors import ConfigurationError
from pnode.base.options import PETSc
from pnode.solvers.linear.given import GivenMatrix, as_matrix
from pnode.solvers.linear.given_solves import GivenSolve
from pnode.solvers.linear.jacobians import JacobianOptions
from pnode.solvers.linear.sparse import SparsityPattern
from pnode.solvers.methods import Method

__all__ = ["jacobian_options"]

_ASSEMBLED = ("dense", "block", "sparse")


def jacobian_options(
    method: Method, form: str, jacobian: str, pattern: Any, preconditioner: Any, reuse: str
) -> JacobianOptions:
    """Check what belongs to ``jacobian=``, and say when the method evaluates Jacobians."""
    named = [
        name
        for name, given in (
            ("jacobian_pattern", pattern is not None),
            ("preconditioner", preconditioner is not None),
            ("jacobian_reuse", reuse not in ("auto", "iteration")),
        )
        if given
    ]
    _refuse_method(method, named)
    if isinstance(preconditioner, str) and preconditioner not in _ASSEMBLED:
        choices = ", ".join(map(repr, _ASSEMBLED))
        raise ConfigurationError(
            f"preconditioner={preconditioner!r} is unknown: choose one of {choices}, or give a "
            "matrix that approximates df/dy, or a callable (t, y) that returns one"
        )
    own = (PETSc.PC, PETSc.KSP)
    for name, given in (("preconditioner", preconditioner), ("jacobian_pattern", pattern)):
        known = (PETSc.Mat, *own) if name == "preconditioner" else (PETSc.Mat,)
        if isinstance(given, PETSc.Object) and not (isinstance(given, known) and given):
            raise ConfigurationError(
                f"{name} is a PETSc {type(given).__name__}: give a tensor, a sparse matrix of "
                "SciPy, a Mat, or, to precondition with, a PC or KSP, and none that is empty"
            )
    if preconditioner is not None and jacobian != "matrix-free":
        raise ConfigurationError(
            f"preconditioner given with jacobian={jacobian!r}: it belongs to "
            "jacobian='matrix-free' (for an assembled Jacobian, choose one of PETSc's with "
            "linear_solver={'pc_type': ...})"
        )
    if pattern is not None and "sparse" not in (jacobian, preconditioner):
        raise ConfigurationError(
            f"jacobian_pattern given with jacobian={jacobian!r}: it belongs to jacobian='sparse' "
            "and preconditioner='sparse'"
        )
    if reuse in ("step", "solve") and jacobian == "matrix-free" and preconditioner is None:
        raise ConfigurationError(
            f"jacobian_reuse={reuse!r} has nothing to reuse with jacobian='matrix-free': give a "
            "preconditioner, or use jacobian='dense', 'block' or 'sparse'"
        )
    if reuse == "auto" and (method.multistep or method.linearly_implicit):
        reuse = "iteration"  # when to evaluate is part of these methods
    if preconditioner is not None and not isinstance(preconditioner, str):
        if isinstance(preconditioner, own):
            preconditioner = GivenSolve(preconditioner)
        elif form == "residual":
            raise ConfigurationError(
                "preconditioner is a matrix or a callable, which approximates df/dy, and a "
                "residual has no f: use preconditioner='dense', 'block' or 'sparse'"
            )
        else:
            preconditioner = GivenMatrix(preconditioner)
    if pattern is not None:
        pattern = _sparsity_pattern(pattern)
    return JacobianOptions(reuse, preconditioner, pattern)


def _refuse_method(method: Method, named: list[str]) -> None:
    """Refuse options that a method has no use for."""
    if named and not method.implicit:
        raise ConfigurationError(
            f"{' and '.join(named)} given, and method={method.name!r} is explicit: drop it, or "
            "take an implicit method such as 'cn' or 'es325'"
        )
    named = [name for name in named if name != "jacobian_pattern"]
    if method.coupled and named:
        raise ConfigurationError(
            f"{' and '.join(named)} given with method={method.name!r}, whose coupled stages are "
            "solved with jacobian='dense', 'block', 'sparse' or 'matrix-free' alone, and which "
            "evaluates the Jacobian when it has to: drop it, or take another method such as "
            "'es325' or 'bdf'"
        )


def _sparsity_pattern(pattern: Any) -> SparsityPattern:
    """Return the entries stored in a sparse matrix, or those of a dense one that are not zero."""
    matrix = as_matrix(pattern, "jacobian_pattern")
    if matrix.shape[0] != matrix.shape[1]:
        raise ConfigurationError(
            f"jacobian_pattern has shape {tuple(matrix.shape)}: give a square matrix, one row and "
            "column per entry of the flattened state"
        )
    dense = matrix.layout is torch.strided
    rows, columns = matrix.nonzero().T if dense else matrix.indices()
    return SparsityPattern(rows, columns, matrix.shape[0])
