"""The few public PETSc functions that petsc4py does not wrap, reached through ctypes.

The shared library of petsc4py is linked against libpetsc, so its handle finds them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pnode.base.options import PETSc
from pnode.solvers.scheme import Scheme, rows

__all__ = [
    "before_each_stage",
    "color_columns",
    "evaluate_step",
    "forget_step_norm",
    "register",
    "restart_jacobian_lag",
    "rk_scheme",
    "set_recompute_jacobian",
    "set_subtype",
    "set_values_coo",
    "share_stage_vector",
    "ssp_stages",
    "stage_vectors",
    "subtype",
    "total_krylov_iterations",
]

_library = ctypes.CDLL(PETSc.__file__)
_Int = ctypes.c_int64 if np.dtype(PETSc.IntType).itemsize == 8 else ctypes.c_int32
_Real = ctypes.c_double if np.dtype(PETSc.RealType).itemsize == 8 else ctypes.c_float


def _exported(name: str, signature: Any) -> Any:
    """Return a function that petsc4py exports to other Cython modules."""
    python = ctypes.pythonapi
    python.PyCapsule_GetName.restype = ctypes.c_char_p
    python.PyCapsule_GetName.argtypes = [ctypes.py_object]
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    capsule = PETSc.__pyx_capi__[name]
    return signature(python.PyCapsule_GetPointer(capsule, python.PyCapsule_GetName(capsule)))


_wrap_vector = _exported("PyPetscVec_New", ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p))


def _check(error: int, name: str) -> None:
    if error:
        raise PETSc.Error(error) from RuntimeError(f"{name} failed")


def stage_vectors(ts: Any) -> list[Any]:
    """Return the stage vectors of a set-up TS, PETSc's own (``TSGetStages``). Not collective."""
    number, array = _stages(ts)
    return [_wrap_vector(array[index]) for index in range(number)]


def share_stage_vector(ts: Any) -> None:
    """Let all stages of a set-up TSRK but the first be one vector. Collective.

    A TSRK looks at its last stage alone, and at the first where it interpolates. Both vectors are
    new ones: PETSc's may all lie in memory that belongs to the first, and stays as long as that. A
    TS destroys its stages one by one, and PETSc counts references.
    """
    number, array = _stages(ts)
    first, shared = (ts.getSolution().duplicate() for _ in range(2))
    for index in reversed(range(number)):
        vector = shared if index else first
        _check(_library.PetscObjectReference(ctypes.c_void_p(vector.handle)), "reference")
        old, array[index] = ctypes.c_void_p(array[index]), vector.handle
        _check(_library.VecDestroy(ctypes.byref(old)), "VecDestroy")


def _stages(ts: Any) -> tuple[int, Any]:
    """Return the number of stages of a TS, and its own array of their vectors."""
    number = _Int()
    array = ctypes.POINTER(ctypes.c_void_p)()
    _check(
        _library.TSGetStages(ctypes.c_void_p(ts.handle), ctypes.byref(number), ctypes.byref(array)),
        "TSGetStages",
    )
    return number.value, array


#: Functions that petsc4py does not wrap, by TS type.
_FAMILIES = {"ssp": "TSSSP", "basicsymplectic": "TSBasicSymplectic", "rosw": "TSRosW"}


def set_subtype(ts: Any, ts_type: str, name: str, stages: int) -> None:
    """Choose the method within a TS type that petsc4py has no setter for.

    Collective. ``stages`` is for TSSSP, whose methods come with any number of stages.
    """
    function = f"{_FAMILIES[ts_type]}SetType"
    _check(_library[function](ctypes.c_void_p(ts.handle), name.encode()), function)
    if ts_type == "ssp":
        _check(
            _library.TSSSPSetNumStages(ctypes.c_void_p(ts.handle), _Int(stages)),
            "TSSSPSetNumStages",
        )


def subtype(ts: Any, ts_type: str) -> str:
    """Return what :func:`set_subtype` or an option has set. Not collective."""
    function, name = f"{_FAMILIES[ts_type]}GetType", ctypes.c_char_p()
    _check(_library[function](ctypes.c_void_p(ts.handle), ctypes.byref(name)), function)
    return (name.value or b"").decode()


def ssp_stages(ts: Any) -> int:
    """Return the number of stages of a TSSSP (``TSSSPGetNumStages``). Not collective."""
    number = _Int()
    _check(
        _library.TSSSPGetNumStages(ctypes.c_void_p(ts.handle), ctypes.byref(number)),
        "TSSSPGetNumStages",
    )
    return number.value


def set_recompute_jacobian(ts: Any, flag: bool) -> None:
    """Say whether each stage of a TSROSW has a matrix of its own. Collective."""
    name = "TSRosWSetRecomputeJacobian"
    _check(_library[name](ctypes.c_void_p(ts.handle), ctypes.c_int(flag)), name)


def forget_step_norm(snes: Any) -> None:
    """Let SNES not take the last Newton step's length for that of the one to come. Not collective.

    Where F is not finite, SNES finds the iteration converged if the line search says that the step
    was short (``snes_stol``), and that of the last solve is what it says then.
    """
    search = snes.getLineSearch()
    _check(
        _library.SNESLineSearchSetNorms(
            ctypes.c_void_p(search.handle), *(_Real(norm) for norm in (1.0, 1.0, math.inf))
        ),
        "SNESLineSearchSetNorms",
    )


def evaluate_step(ts: Any, order: int, vector: Any) -> None:
    """Complete the last step with the weights of another order (``TSEvaluateStep``). Collective."""
    handles = ctypes.c_void_p(ts.handle), ctypes.c_void_p(vector.handle)
    error = _library.TSEvaluateStep(handles[0], _Int(order), handles[1], ctypes.c_void_p())
    _check(error, "TSEvaluateStep")


def set_values_coo(matrix: Any, values: Any) -> None:
    """Fill a sparse matrix whose coordinates are set (``MatSetValuesCOO``). Collective.

    Parameters
    ----------
    matrix : Mat
        After ``setPreallocationCOO``.
    values : Tensor
        One per coordinate, PETSc's precision, in the memory of the matrix: PETSc takes device
        memory too, petsc4py does not.
    """
    values = values.contiguous()
    handles = ctypes.c_void_p(matrix.handle), ctypes.c_void_p(values.data_ptr())
    insert = PETSc.InsertMode.INSERT_VALUES
    _check(_library.MatSetValuesCOO(*handles, ctypes.c_int(insert)), "MatSetValuesCOO")


def restart_jacobian_lag(snes: Any) -> None:
    """Let SNES build its Jacobian at the next solve (``SNESSetLagJacobian``, 1). Collective."""
    _check(_library.SNESSetLagJacobian(ctypes.c_void_p(snes.handle), _Int(1)), "SNESSetLagJacobian")


def rk_scheme(ts: Any) -> Scheme:
    """Return the coefficients of a set-up RK TS (``TSRKGetTableau``). Not collective."""
    number, order = _Int(), _Int()
    pointers = [ctypes.POINTER(_Real)() for _ in range(5)]
    fsal = ctypes.c_int()
    *first, interpolation = map(ctypes.byref, pointers)
    _check(
        _library.TSRKGetTableau(
            ctypes.c_void_p(ts.handle), ctypes.byref(number), *first, ctypes.byref(order),
            interpolation, ctypes.byref(fsal),
        ),
        "TSRKGetTableau",
    )  # fmt: skip
    s = number.value

    def numbers(pointer: Any, *shape: int) -> Any:
        return np.ctypeslib.as_array(pointer, shape).tolist() if pointer else None

    A, b, _, embedded, weights = pointers
    return Scheme(
        rows(numbers(A, s, s)), tuple(numbers(b, s)), "PETSc's rk.c",
        tuple(numbers(embedded, s)) if embedded else None,
        interpolation=tuple(map(tuple, numbers(weights, s, order.value))) if weights else None,
    )  # fmt: skip


_StageCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, _Real)


def before_each_stage(ts: Any, function: Callable[[], None]) -> Any:
    """Call ``function`` before each stage of ``ts`` (``TSSetPreStage``). Not collective.

    Returns
    -------
    object
        To be kept as long as the TS steps. ``function`` must not raise.
    """

    def call(_: Any, time: float) -> int:
        function()
        return 0

    callback = _StageCallback(call)
    _check(_library.TSSetPreStage(ctypes.c_void_p(ts.handle), callback), "TSSetPreStage")
    return callback


def total_krylov_iterations(ksp: Any) -> int:
    """Return the iterations of all solves so far (``KSPGetTotalIterations``). Not collective."""
    number = _Int()
    _check(
        _library.KSPGetTotalIterations(ctypes.c_void_p(ksp.handle), ctypes.byref(number)),
        "KSPGetTotalIterations",
    )
    return number.value


_wrap_index_set = _exported("PyPetscIS_New", ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p))


def color_columns(matrix: Any) -> Any:
    """Color the columns of a sparse matrix: those of one color share no row.

    PETSc's ``MatColoring`` of type ``sl``, smallest last. Not collective.

    Parameters
    ----------
    matrix : Mat
        Assembled, of type seqaij.

    Returns
    -------
    ndarray
        A color per column, counted from 0.
    """
    coloring, sets = ctypes.c_void_p(), ctypes.c_void_p()
    number, indices = _Int(), ctypes.POINTER(ctypes.c_void_p)()
    _check(
        _library.MatColoringCreate(ctypes.c_void_p(matrix.handle), ctypes.byref(coloring)),
        "MatColoringCreate",
    )
    _check(_library.MatColoringSetType(coloring, b"sl"), "MatColoringSetType")
    _check(_library.MatColoringApply(coloring, ctypes.byref(sets)), "MatColoringApply")
    use_pointer = 2  # PETSC_USE_POINTER
    _check(
        _library.ISColoringGetIS(
            sets, use_pointer, ctypes.byref(number), ctypes.byref(indices)
        ),
        "ISColoringGetIS",
    )  # fmt: skip
    colors = np.empty(matrix.getSize()[1], dtype=np.int64)
    for color in range(number.value):
        colors[_wrap_index_set(indices[color]).getIndices()] = color
    _check(_library.ISColoringDestroy(ctypes.byref(sets)), "ISColoringDestroy")
    _check(_library.MatColoringDestroy(ctypes.byref(coloring)), "MatColoringDestroy")
    return colors


_registered: set[str] = set()


def _reals(values: Any) -> Any:
    flat = np.asarray(values, dtype=float).ravel().tolist()
    return (_Real * len(flat))(*flat)


def register(name: str, order: int, scheme: Scheme) -> None:
    """Add a method to PETSc, once per process.

    By ``TSRKRegister``, ``TSDIRKRegister`` or ``TSARKIMEXRegister``.

    Parameters
    ----------
    name : str
        The name for ``-ts_rk_type``, ``-ts_dirk_type`` or ``-ts_arkimex_type``.
    order : int
        Order of convergence.
    scheme : Scheme
        An explicit, a diagonally implicit or an IMEX method. Embedded weights of an IMEX method are
        those of both parts.
    """
    if name in _registered:
        return
    numbers, embedded = (name.encode(), _Int(order), _Int(scheme.stages)), None
    A, b = _reals(scheme.A), _reals(scheme.b)
    if scheme.b_embedded is not None:
        embedded = _reals(scheme.b_embedded)
    if scheme.A_explicit is not None:
        explicit = _reals(scheme.A_explicit), _reals(scheme.b_explicit)
        error = _library.TSARKIMEXRegister(
            *numbers, A, b, None, *explicit, None, embedded, None, _Int(0), None, None
        )
    elif not scheme.explicit:
        error = _library.TSDIRKRegister(*numbers, A, b, None, embedded, _Int(0), None)
    else:
        weights = None if scheme.interpolation is None else _reals(scheme.interpolation)
        degree = _Int(scheme.interpolation_degree)
        error = _library.TSRKRegister(*numbers, A, b, None, embedded, degree, weights)
    _check(error, f"registering {name}")
    _registered.add(name)
