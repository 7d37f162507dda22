"""How PETSc's vectors are reached: which calls, in which mode, on the host and on a device."""

from __future__ import annotations

import pytest
import torch
from test_devices import CASES, FORMS, Field, Pair, gradients, start
from torch.utils.dlpack import from_dlpack, to_dlpack

import pnode
from pnode.base import vectors
from pnode.base.devices import HOST
from pnode.base.ledger import Ledger
from pnode.base.options import PETSc
from pnode.errors import ConfigurationError
from pnode.field.vectorfield import vector_field
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.linear.shells import JacobianShell
from pnode.solvers.petsc.bridge import Bridge

TIMES = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)


@pytest.fixture
def through_dlpack(monkeypatch):
    """Reach host vectors as device vectors are reached."""
    monkeypatch.setattr(vectors, "_through_dlpack", {"seq"})


class RecordingVec:
    """Stands for a device vector: notes what is asked of it, and refuses access by the host."""

    def __init__(self, *values: float) -> None:
        self.values = torch.tensor(values, dtype=torch.float64)
        self.calls: list[str] = []
        self.state = 0

    def getType(self) -> str:
        return "seqcuda"

    def toDLPack(self, mode: str):
        self.calls.append(mode)
        self.state += "w" in mode
        return to_dlpack(self.values)

    @property
    def handle(self) -> int:
        return id(self)

    def stateGet(self) -> int:
        return self.state

    def axpy(self, factor: float, other: RecordingVec) -> None:
        self.calls.append("axpy")
        self.values += factor * other.values

    def scale(self, factor: float) -> None:
        self.calls.append("scale")
        self.values *= factor

    def set(self, value: float) -> None:
        self.calls.append("set")
        self.values.fill_(value)

    def copy(self, other: RecordingVec) -> None:
        self.calls.append("copy")
        other.values.copy_(self.values)

    def __getattr__(self, name: str):
        raise AssertionError(f"{name} of a device vector was used")


@pytest.fixture
def device_types(monkeypatch):
    monkeypatch.setattr(vectors, "_through_dlpack", {"seqcuda"})


A = torch.tensor([[-1.0, 0.5], [0.25, -2.0]], dtype=torch.float64, requires_grad=True)


def bridge(**keywords):
    """Return a bridge in a sweep for y' = A y."""
    y0, times = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0])
    problem = InitialValueProblem.create(lambda t, y: A @ y, y0, times, (A,))
    made = Bridge(**keywords)
    made.attach(vector_field(problem, Ledger()))
    return made


@pytest.mark.parametrize("check", [False, True])
def test_a_stage_reads_once_and_writes_once(device_types, check):
    u, f = RecordingVec(1.0, 2.0), RecordingVec(9.0, 9.0)
    bridge(keep=1, check=check).rhs_function(None, 0.0, u, f)
    assert (u.calls, f.calls) == (["r"], ["w"])
    assert torch.equal(f.values, A @ torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_a_failing_stage_is_filled_on_the_device(device_types):
    u, f = RecordingVec(1.0, 2.0), RecordingVec(9.0, 9.0)
    own = bridge(keep=1)
    own.exception = KeyboardInterrupt()
    own.rhs_function(None, 0.0, u, f)
    assert (u.calls, f.calls) == ([], ["w"])
    assert torch.equal(f.values, torch.zeros(2, dtype=torch.float64))


def test_an_implicit_residual_reads_the_state_once(device_types):
    u, u_dot, f = RecordingVec(1.0, 2.0), RecordingVec(3.0, 4.0), RecordingVec(9.0, 9.0)
    own = bridge()
    own.implicit_function(None, 0.0, u, u_dot, f)
    assert (u.calls, u_dot.calls, f.calls) == (["r"], [], ["w", "axpy"])
    expected = u_dot.values - A.detach() @ u.values
    assert torch.equal(f.values, expected)
    # The Jacobian there needs nothing more of the vectors.
    own.point(0.0, u, u_dot)
    assert u.calls == ["r"]


def test_products_read_once_and_write_once(device_types):
    own = bridge()
    u, x, y = RecordingVec(1.0, 2.0), RecordingVec(3.0, 4.0), RecordingVec(9.0, 9.0)
    shell = JacobianShell(own)
    shell.move_to(own.point(0.0, u), 2.0, -1.0)
    shell.mult(None, x, y)
    assert (u.calls, x.calls, y.calls) == (["r"], ["r"], ["w"])
    assert torch.equal(y.values, 2.0 * x.values - A.detach() @ x.values)
    x.calls.clear()
    y.calls.clear()
    shell.multTranspose(None, x, y)
    assert (u.calls, x.calls, y.calls) == (["r"], ["r"], ["w", "scale", "axpy"])
    assert torch.equal(y.values, 2.0 * x.values - A.detach().T @ x.values)


def test_adding_reads_and_writes(device_types):
    y = RecordingVec(1.0, 2.0)
    vectors.add_to(y, torch.ones(2), 0.5)
    assert y.calls == ["rw"]
    assert y.values.tolist() == [1.5, 2.5]


def test_views_share_memory(through_dlpack):
    vector = vectors.create(PETSc.COMM_SELF, 3)
    vectors.copy_in(vector, torch.arange(3.0))
    state = vector.stateGet()
    shared = vectors.view(vector)
    assert vector.stateGet() == state  # reading changes nothing
    vector.scale(2.0)
    assert shared.tolist() == [0.0, 2.0, 4.0]
    state = vector.stateGet()
    vectors.overwrite(vector).fill_(7.0)
    assert vector.stateGet() > state  # PETSc forgets the norms it knew
    assert vector.norm(PETSc.NormType.INFINITY) == 7.0
    matrix = vectors.create_dense(PETSc.COMM_SELF, 2)
    from_dlpack(matrix.toDLPack("w")).copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert matrix.getValue(0, 1) == 2.0


@pytest.mark.parametrize("case", [*CASES, *FORMS, "pair"])
def test_dlpack_gives_the_numbers_of_numpy(case, through_dlpack, monkeypatch):
    def make(field):
        if case in FORMS:
            return FORMS[case](field)
        return pnode.Solver(field, **CASES.get(case, {"method": "ruth3", "step_size": 0.1}))

    def solve():
        if case == "pair":
            return gradients(Pair(), (start(), start()), make)[1]
        return gradients(Field(), start(), make)[1]

    calls = []
    monkeypatch.setattr(vectors, "from_dlpack", lambda x: calls.append(1) or from_dlpack(x))
    found = solve()
    assert calls
    calls.clear()
    monkeypatch.setattr(vectors, "_through_dlpack", set())
    for one, two in zip(found, solve(), strict=True):
        assert torch.equal(one, two)
    assert not calls


def test_a_place_without_dense_matrices_says_what_there_is():
    place = type(HOST)(torch.device("cpu"), "kokkos", None, "aijkokkos")
    with pytest.raises(ConfigurationError, match=r"vec_type='kokkos'.*jacobian='block'"):
        vectors.create_dense(PETSc.COMM_SELF, 2, place)
