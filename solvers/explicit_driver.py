"""Whole sweeps of compiled explicit steps by one call each, forwards and backwards.

The steps and their adjoints are compiled graphs; ``explicit_sweeps.cpp`` calls them one after the
other, chooses adaptive steps and keeps the checkpoints. It is compiled when it is first needed, and
kept on disk; where that fails, :mod:`pnode.solvers.compiled` takes the same steps from Python.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pnode.compilation import CompilationFailed, CompiledGraph, compile_source, open_graph
from pnode.problem import InitialValueProblem
from pnode.solution import Ledger
from pnode.solvers.explicit_graphs import StepGraphs, Tensors
from pnode.solvers.step_control import StepControl, fixed_grid
from pnode.vectors import REAL

__all__ = ["DrivenSweep", "Driver", "driver_of"]

# No contraction: the controller's numbers are those of Python.
_FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared")
_SOURCE = Path(__file__).with_name("explicit_sweeps.cpp")
# How long a call may keep Python from noticing an interrupt, in seconds.
_PATIENCE = 0.1
_DONE, _PAUSED = 0, 1  # Status in explicit_sweeps.cpp
_TORCH = (
    "create_tensor_from_blob", "empty_strided", "new_tensor_handle", "delete_tensor_object",
    "get_data_ptr", "get_dim", "get_sizes", "get_strides",
)  # fmt: skip

_Pointers: Any = ctypes.POINTER(ctypes.c_void_p)


class _Graph(ctypes.Structure):
    _fields_ = [("run", ctypes.c_void_p), ("container", ctypes.c_void_p)]


class _Settings(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("size", "dtype", "fsal", "adaptive", "results", "begin", "end", "last")
        ),
        ("order", ctypes.c_double),
        ("step", _Graph),
        ("adjoint", _Graph),
    ]


class _Control(ctypes.Structure):
    _fields_ = [
        ("keep", ctypes.c_int64),
        ("max_steps", ctypes.c_int64),
        *(
            (name, ctypes.c_double)
            for name in (
                "direction", "first_step", "min_step", "max_step", "longest",
            )
        ),
    ]  # fmt: skip


class _Counts(ctypes.Structure):
    _fields_ = [("steps", ctypes.c_int64), ("rejected", ctypes.c_int64)]


@cache
def _library() -> ctypes.CDLL:
    """Return the driver."""
    library = compile_source(_SOURCE.read_text(encoding="utf-8"), _FLAGS, "driver-")
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    functions: dict[str, tuple[Any, list[Any]]] = {
        "torch": (None, [pointer]),
        "plan": (pointer, [pointer, pointer]),
        "free_plan": (None, [pointer]),
        "sweep": (pointer, [pointer, pointer, pointer, pointer, number, *[pointer] * 3]),
        "free_sweep": (None, [pointer]),
        "forward": (number, [pointer, pointer, pointer, pointer, real, pointer]),
        "repeat": (number, [pointer, number]),
        "reverse": (number, [pointer, pointer, pointer, pointer, ctypes.c_char_p, real]),
        "finish": (number, [pointer, pointer, pointer, pointer]),
        "kept": (number, [pointer]),
        "owned": (number, []),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, f"pnode_{name}")
        function.restype, function.argtypes = result, arguments
    return library


@cache
def _container(path: Path) -> tuple[ctypes.CDLL, int]:
    """Return the library of a graph and a handle of the graph, for the rest of the process."""
    library, handle = open_graph(path), ctypes.c_void_p()
    create = library.AOTInductorModelContainerCreateWithDevice
    if create(ctypes.byref(handle), ctypes.c_size_t(1), b"cpu", None) or not handle.value:
        raise CompilationFailed("the graph could not be set up")
    functions = [_address(getattr(library, f"aoti_torch_{name}")) for name in _TORCH]
    _library().pnode_torch((ctypes.c_void_p * len(functions))(*functions))
    return library, handle.value


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _opened(graph: Callable[..., Any]) -> tuple[ctypes.CDLL, _Graph]:
    if not isinstance(graph, CompiledGraph):
        raise CompilationFailed("a graph is not machine code")
    library, handle = _container(graph.path)
    return library, _Graph(_address(library.AOTInductorModelContainerRun), handle)


def _pointers(tensors: Sequence[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def driver_of(
    graphs: StepGraphs, tolerances: Sequence[torch.Tensor], keep: bool, order: int,
    longest: Callable[[], float],
) -> Driver | None:  # fmt: skip
    """Return the driver of compiled steps, or None, after one warning, if there is none.

    Parameters
    ----------
    graphs : StepGraphs
        The steps.
    tolerances : sequence of Tensor
        Those of adaptive steps.
    keep : bool
        Whether it is to take adjoints too.
    order : int
        The method's.
    longest : callable
        Returns the longest adaptive step by PETSc's options.
    """
    key = (tuple(tuple(x.shape) for x in tolerances), keep)
    if key not in graphs.drivers:
        driver = None
        if isinstance(graphs.compile_step(tolerances), CompiledGraph):
            try:
                driver = Driver(graphs, tolerances, keep, order, longest())
            except CompilationFailed as error:
                _warn_once(str(error))
        graphs.drivers[key] = driver
    return graphs.drivers[key]


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"compiled steps are called one by one from Python, which takes longer: {reason}",
        RuntimeWarning, stacklevel=6,
    )  # fmt: skip


class Driver:
    """Takes the sweeps of one kind of compiled step.

    Parameters
    ----------
    graphs : StepGraphs
        The steps and their adjoints.
    tolerances : sequence of Tensor
        Those of adaptive steps.
    keep : bool
        Whether it is to take adjoints too.
    order : int
        The method's.
    longest : float
        Longest adaptive step.

    Raises
    ------
    CompilationFailed
        If the driver could not be compiled, or the graphs need torch's help.
    """

    def __init__(
        self, graphs: StepGraphs, tolerances: Sequence[torch.Tensor], keep: bool, order: int,
        longest: float,
    ) -> None:  # fmt: skip
        self._library = _library()
        self.graphs = graphs
        self.longest = longest
        self._tolerances = tuple(tolerances)
        self._keep = keep
        library, step = _opened(graphs.compile_step(tolerances))
        adjoint = _opened(graphs.adjoint)[1] if keep else _Graph()
        inputs = graphs.field_graph.inputs()
        _, self._saved = graphs.start(torch.zeros((), dtype=REAL), torch.zeros(graphs.size))
        self._saved = self._saved if graphs.fsal else ()
        layout = graphs.layout
        settings = _Settings(
            graphs.size, _code(library, graphs.dtype), graphs.fsal, bool(tolerances),
            layout.results, layout.begin, layout.end, layout.last, order, step, adjoint,
        )  # fmt: skip
        text: list[int] = []
        for tensors in (self._tolerances, self._saved, inputs, graphs.zeros()):
            text.append(len(tensors))
            for x in tensors:
                if x.device.type != "cpu" or x.layout is not torch.strided:
                    raise CompilationFailed(f"f reads a tensor on {x.device}, {x.layout}")
                text += [_code(library, x.dtype), x.dim(), *x.shape, *x.stride()]
        self._plan = self._library.pnode_plan(
            ctypes.byref(settings), (ctypes.c_int64 * len(text))(*text)
        )
        weakref.finalize(self, self._library.pnode_free_plan, self._plan).atexit = False
        self._given = _pointers(self._tolerances)

    def sweep(
        self, problem: InitialValueProblem, control: StepControl, first_step: float,
        start: tuple[torch.Tensor, torch.Tensor, Tensors],
    ) -> DrivenSweep:  # fmt: skip
        """Return a sweep that is to be taken.

        Parameters
        ----------
        problem : InitialValueProblem
            Whose output times.
        control : StepControl
            How steps are chosen.
        first_step : float
            The first adaptive step.
        start : tuple
            The initial state, which is taken over, its slope, and what is saved of that.
        """
        state, slope, saved = start
        saved = tuple(
            x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)
            for x, like in zip(saved if self.graphs.fsal else (), self._saved, strict=True)
        )
        alive = (state.contiguous(), slope.contiguous(), saved)
        chosen = _Control(
            self._keep, -1 if control.max_steps is None else control.max_steps, problem.direction,
            first_step, control.min_step, control.max_step, self.longest,
        )  # fmt: skip
        times, number = problem.times, len(problem.times)
        grid = fixed_grid(times, control, problem.resolution)
        counts = grid.counts if grid is not None else ()
        handle = self._library.pnode_sweep(
            self._plan, ctypes.byref(chosen), (ctypes.c_double * number)(*times),
            (ctypes.c_int64 * number)(*counts), number,
            alive[0].data_ptr(), alive[1].data_ptr(), _pointers(saved),
        )  # fmt: skip
        return DrivenSweep(self, handle, number, alive)


class DrivenSweep:
    """A forward sweep with its checkpoints.

    Parameters
    ----------
    driver : Driver
        Whose sweep it is.
    handle : int
        The sweep.
    outputs : int
        Number of output times.
    alive : object
        What it reads until its adjoint has been taken.

    Attributes
    ----------
    steps, rejected : int
        Steps accepted and rejected.
    """

    def __init__(self, driver: Driver, handle: int, outputs: int, alive: Any) -> None:
        self.driver = driver
        self._library = driver._library
        self._handle = handle
        self._outputs = outputs
        self._alive = alive
        self.steps = self.rejected = 0
        weakref.finalize(self, self._library.pnode_free_sweep, handle).atexit = False

    @property
    def bytes(self) -> int:
        """Size of the checkpoints."""
        return self.steps * self.driver.graphs.checkpoint_bytes

    @property
    def whole(self) -> bool:
        """Whether all checkpoints are there."""
        return bool(self._library.pnode_kept(self._handle) == self.steps)

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor | None:
        """Take all steps.

        Parameters
        ----------
        inputs : list of Tensor
            What the graphs take for what f reads.

        Returns
        -------
        Tensor or None
            States at the output times, shape ``(T, size)``, the user's precision; None if a step
            failed for good: the error is to be had from taking them one by one.
        """
        graphs, counts = self.driver.graphs, _Counts()
        outputs = torch.empty((self._outputs, graphs.size), dtype=graphs.dtype)
        arguments = (
            self._handle, self.driver._given, _pointers(inputs), outputs.data_ptr(), _PATIENCE,
            ctypes.byref(counts),
        )  # fmt: skip
        status = _PAUSED
        while status == _PAUSED:  # in between, Python notices interrupts
            status = self._library.pnode_forward(*arguments)
        self.steps, self.rejected = counts.steps, counts.rejected
        return outputs if status == _DONE else None

    def repeat(self) -> None:
        """Take the steps again, for their checkpoints."""
        self._library.pnode_repeat(self._handle, 1)
        if self.forward(self.driver.graphs.field_graph.inputs()) is None:
            raise RuntimeError("compiled steps that succeeded once failed when repeated")

    def reverse(
        self, cotangents: torch.Tensor, nonzero: Sequence[bool], ledger: Ledger
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Take the adjoints of all steps, and free their checkpoints on the way.

        Parameters
        ----------
        cotangents : Tensor
            Derivatives of the loss with respect to the outputs, shape ``(T, size)``; the first
            output's is left to the caller.
        nonzero : sequence of bool
            Which of them do not vanish.
        ledger : Ledger
            Counts the steps.

        Returns
        -------
        state : Tensor
            The derivative with respect to y0, shape ``(size,)``.
        sums : list of Tensor
            Those of mu, see :meth:`StepGraphs.gradients`; empty if lambda vanished throughout.
        """
        graphs, library, number = self.driver.graphs, self._library, ctypes.c_int64()
        inputs, sums = graphs.field_graph.inputs(), graphs.zeros()
        given = cotangents.to(REAL).contiguous()
        state, places = torch.empty(graphs.size, dtype=REAL), _pointers(sums)
        arguments = (
            self._handle, _pointers(inputs), places, given.data_ptr(), bytes(nonzero), _PATIENCE
        )  # fmt: skip
        status = _PAUSED
        while status == _PAUSED:
            status = library.pnode_reverse(*arguments)
        if status != _DONE or library.pnode_finish(
            self._handle, state.data_ptr(), places, ctypes.byref(number)
        ):
            raise RuntimeError("the compiled adjoint of a step failed: is there enough memory?")
        ledger.steps += number.value
        products = number.value * graphs.products
        ledger.vjp += products
        if not graphs.tape:
            ledger.rhs += products
        return state, sums if number.value else []


def _code(library: ctypes.CDLL, dtype: torch.dtype) -> int:
    """Return torch's number for a dtype."""
    name = f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}"
    try:
        return int(getattr(library, name)())
    except AttributeError as error:
        raise CompilationFailed(f"f reads a tensor of {dtype}") from error
