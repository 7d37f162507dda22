"""Which device PETSc works on, on which stream, and what MPI takes; without a device."""

from __future__ import annotations

import ctypes

import pytest
import torch
from simulated_device import DEVICE, PLACE, Streams, module_on_device, on_device, simulated
from test_devices import TIMES, Field, start

import pnode
from pnode.base import devices
from pnode.base.options import PETSc
from pnode.errors import ConfigurationError


class FakePETSc:
    """A PETSc that was built with some packages and works on some device."""

    def __init__(self, packages, works_on=0, options=()):
        self._packages, self._device, self._options = packages, works_on, options
        self.Sys = self.DeviceContext = self

    def hasExternalPackage(self, name):
        return name in self._packages

    def getCurrent(self):
        return self

    getDevice = getCurrent

    def getDeviceId(self):
        return self._device

    def Options(self):
        return self

    def hasName(self, name):
        return name in self._options


@pytest.fixture
def mpi(monkeypatch):
    """Leave PETSc's flag as it was; return a function that says what MPI takes."""
    flag = ctypes.c_bool.in_dll(devices._library, "use_gpu_aware_mpi")
    before = flag.value
    monkeypatch.setattr(devices, "gpu_aware", lambda: True)

    def aware(answer, size=1):
        flag.value = True
        monkeypatch.setattr(devices, "gpu_aware", lambda: answer)
        monkeypatch.setattr(devices, "MPI", _World(size))
        return flag

    yield aware
    flag.value = before


class _World:
    def __init__(self, size):
        self.COMM_WORLD, self.size, self.rank = self, size, 0


def find(monkeypatch, packages, device=DEVICE, vec_type=None, hip=None, **petsc):
    monkeypatch.setattr(devices, "PETSc", FakePETSc(packages, **petsc))
    monkeypatch.setattr(torch.version, "hip", hip)
    return devices.place_of(device, vec_type)


@pytest.mark.parametrize(
    ("packages", "hip", "vec_type", "types"),
    [
        (("cuda",), None, None, ("cuda", "densecuda", "aijcusparse")),
        (("hip",), "6.0", None, ("hip", "densehip", "aijhipsparse")),
        (("cuda", "kokkos-kernels"), None, None, ("cuda", "densecuda", "aijcusparse")),
        (("cuda", "kokkos-kernels"), None, "kokkos", ("kokkos", None, "aijkokkos")),
        (("hip", "kokkos-kernels"), "6.0", "kokkos", ("kokkos", None, "aijkokkos")),
    ],
)
def test_types_follow_from_the_device_and_the_build(
    packages, hip, vec_type, types, monkeypatch, mpi
):
    place = find(monkeypatch, packages, vec_type=vec_type, hip=hip)
    assert (place.vec_type, place.dense_type, place.sparse_type) == types
    assert place.device == DEVICE
    assert not place.on_host


def test_names_are_petscs():
    types = PETSc.Vec.Type, PETSc.Mat.Type
    for name, (_, dense, sparse) in devices._TYPES.items():
        assert getattr(types[0], name.upper()) == name
        # petsc4py has no constants for some of them.
        assert getattr(types[1], sparse.upper(), sparse) == sparse
        assert dense is None or getattr(types[1], dense.upper()) == dense
    assert (types[0].STANDARD, types[1].DENSE, types[1].AIJ) == (
        devices.HOST.vec_type, devices.HOST.dense_type, devices.HOST.sparse_type
    )  # fmt: skip


@pytest.mark.parametrize(("packages", "hip"), [((), None), (("hip",), None), (("cuda",), "6.0")])
def test_a_build_without_the_device(packages, hip, monkeypatch):
    wanted = "hip" if hip else "cuda"
    with pytest.raises(ConfigurationError, match=f"--with-{wanted}.*device_state='host'"):
        find(monkeypatch, packages, hip=hip)


def test_a_vec_type_that_is_not_there(monkeypatch, mpi):
    with pytest.raises(ConfigurationError, match=r"vec_type='kokkos'.*choose from 'cuda'"):
        find(monkeypatch, ("cuda",), vec_type="kokkos")


def test_another_device_than_petscs(monkeypatch, mpi):
    with pytest.raises(ConfigurationError, match=r"cuda:1.*device 0.*-device_select 1"):
        find(monkeypatch, ("cuda",), torch.device("cuda", 1))
    assert find(monkeypatch, ("cuda",), torch.device("cuda", 1), works_on=1).device.index == 1


@pytest.mark.parametrize(
    ("answer", "options", "left"),
    [
        (True, (), True),
        (False, (), False),
        (None, (), False),
        (False, ("use_gpu_aware_mpi",), True),
        (None, ("sf_use_gpu_aware_mpi",), True),
    ],
)
def test_mpi_is_spared_device_memory_unless_it_takes_it(answer, options, left, monkeypatch, mpi):
    flag = mpi(answer)
    find(monkeypatch, ("cuda",), options=options)
    assert flag.value == left


def test_one_message_about_mpi(monkeypatch, mpi):
    mpi(None, size=2)
    with pytest.warns(RuntimeWarning, match=r"-use_gpu_aware_mpi 0") as record:
        find(monkeypatch, ("cuda",))
        find(monkeypatch, ("cuda",))
    assert len(record) == 1


# -------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    ("current", "petsc", "log"),
    [
        ("default", 0, [("device", DEVICE)]),
        ("stream 7", 7, [("device", DEVICE)]),
        (
            "default", 7,
            [
                ("device", DEVICE), ("stream 7", "waits for", "default"), ("inside", "stream 7"),
                ("default", "waits for", "stream 7"),
            ],
        ),
        (
            "users", 0,
            [
                ("device", DEVICE), ("default", "waits for", "users"), ("inside", "default"),
                ("users", "waits for", "default"),
            ],
        ),
    ],
)  # fmt: skip
def test_streams_wait_for_one_another(current, petsc, log, monkeypatch):
    streams = Streams(current)
    monkeypatch.setattr(devices, "_cuda", streams)
    monkeypatch.setattr(devices, "petsc_stream", lambda: petsc)
    with devices.ordered(PLACE):
        assert streams.current == (f"stream {petsc}" if petsc else "default")
    assert streams.log == log
    assert streams.current == current


def test_streams_are_joined_after_a_failure(monkeypatch):
    streams = Streams("users")
    monkeypatch.setattr(devices, "_cuda", streams)
    monkeypatch.setattr(devices, "petsc_stream", lambda: 0)
    with pytest.raises(KeyboardInterrupt), devices.ordered(PLACE):
        raise KeyboardInterrupt
    assert streams.log[-1] == ("users", "waits for", "default")


def test_the_host_has_no_streams(monkeypatch):
    monkeypatch.setattr(devices, "_cuda", None)
    with devices.ordered(devices.HOST):
        pass


def test_petscs_stream_on_the_host_is_the_default():
    assert devices.petsc_stream() == 0


def test_every_sweep_is_ordered_and_sets_the_device_of_its_thread():
    """The forward sweep, and the backward one, which autograd may run in a thread of its own."""
    streams = Streams("users")
    with simulated(streams=streams):
        solver = pnode.Solver(module_on_device(Field()), method="rk4", step_size=0.5)
        y0 = on_device(start()).requires_grad_()
        begin = [("device", DEVICE), ("default", "waits for", "users"), ("inside", "default")]
        end = [("users", "waits for", "default")]
        # What leaves is not given away while the user's stream reads it.
        outputs = [("users", "holds", (4, 12))]
        shapes = [(12,), *(tuple(p.shape) for p in solver.rhs.parameters())]
        solution = solver(y0, TIMES)
        assert streams.log == begin + outputs + end
        streams.log.clear()
        solution.ys.sum().backward()
        assert streams.log == begin + [("users", "holds", shape) for shape in shapes] + end
        streams.log.clear()
        with torch.no_grad():
            solver(y0, TIMES)
        assert streams.log == begin + outputs + end
