"""Device memory as the first level of checkpoints, on simulated devices."""

from __future__ import annotations

import random

import pytest
import torch
from simulated_device import Streams, bare, counts, module_on_device, on_device, simulated
from test_devices import TIMES, Field, gradients, start

import pnode
from pnode.adjoint.disk import DiskFolder
from pnode.adjoint.offload import DeviceLevel, Offload, Transfer
from pnode.adjoint.store import CheckpointStore
from pnode.base.ledger import Ledger
from pnode.errors import CheckpointError, ConfigurationError

STATE = 96  # bytes of the state of test_devices


class Delayed:
    """A device whose copies have their values only once they have been waited for."""

    def __init__(self):
        self.log = []
        self._resident = {}

    def make(self, *values):
        tensor = torch.tensor(values, dtype=torch.float64)
        self._resident[id(tensor)] = tensor
        return tensor

    def resident(self, tensor):
        return self._resident.get(id(tensor)) is tensor

    def _copy(self, name, tensors):
        copies = tuple(torch.full_like(tensor, torch.nan) for tensor in tensors)
        self.log.append(f"begin {name}")

        def wait():
            self.log.append(f"end {name}")
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor)

        return Transfer(copies, wait)

    def to_host(self, tensors):
        assert all(map(self.resident, tensors))
        return self._copy("to host", tensors)

    def to_device(self, tensors):
        assert not any(map(self.resident, tensors))
        transfer = self._copy("to device", tensors)
        for copy in transfer.tensors:
            self._resident[id(copy)] = copy
        return transfer


def store(device_limit, memory=None, folder=None):
    device, ledger = Delayed(), Ledger()
    made = CheckpointStore(ledger, memory, folder, DeviceLevel(device_limit, device))
    return made, device, ledger


def key(index):
    return ("stages", index)


def test_the_oldest_leave_beside_the_computation():
    kept, device, ledger = store(32)
    for index in range(5):
        kept.put(key(index), (device.make(index, -index),))
        device.log.append(f"put {index}")
    # Room for the next one is made ahead: a copy begins after a put and ends before the next.
    assert device.log[:2] == ["put 0", "begin to host"]
    assert device.log[2:6] == ["put 1", "end to host", "begin to host", "put 2"]
    assert ledger.device_bytes == 32
    device.log.clear()
    for index in reversed(range(5)):
        (found,) = kept.get(key(index))
        assert found.tolist() == [index, -index]
        assert device.resident(found)
        kept.discard(key(index))
    assert ledger.device_bytes <= 32
    # The next to be wanted is on its way before it is asked for.
    first = device.log.index("end to device")
    assert device.log[first + 1] == "begin to device"


def test_a_shared_tensor_is_copied_once():
    kept, device, ledger = store(48)
    states = [device.make(float(index), 0.0) for index in range(8)]
    for index in range(7):
        kept.put(key(index), (states[index], states[index + 1]))
    assert ledger.device_bytes <= 48
    assert ledger.ram_bytes <= 7 * 16  # 12 if each had its own
    for index in reversed(range(7)):
        assert [t[0].item() for t in kept.get(key(index))] == [index, index + 1]
        kept.discard(key(index))


def test_what_lives_on_the_host_stays_there():
    """BDF's coefficients belong to a checkpoint, and are host tensors."""
    kept, device, _ = store(16)
    weights = [torch.tensor([float(index)]) for index in range(4)]
    for index in range(4):
        kept.put(key(index), (device.make(index, 1.0), weights[index]))
    for index in reversed(range(4)):
        state, own = kept.get(key(index))
        assert device.resident(state)
        assert own is weights[index]
        kept.discard(key(index))


def test_device_then_memory_then_disk(tmp_path):
    kept, device, ledger = store(32, 32, lambda: DiskFolder(tmp_path))
    for index in range(9):
        kept.put(key(index), (device.make(index, -index),))
    assert (ledger.device_bytes, ledger.ram_bytes) == (32, 32)
    assert ledger.disk_bytes >= 4 * 16
    for index in reversed(range(9)):
        (found,) = kept.get(key(index))
        assert found.tolist() == [index, -index]
        assert device.resident(found)
        kept.discard(key(index))
    kept.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", range(30))
def test_any_order_within_both_limits(seed):
    """As schedules use it: stacks of states and stages, less than both levels hold together."""
    draw = random.Random(seed)
    unit, stages = 16, draw.randint(1, 4)
    on_device, in_memory = draw.randint(stages + 1, 9), draw.randint(0, 9)
    kept, device, ledger = store(on_device * unit, in_memory * unit)
    # The stages of the step at hand, and what may stay free on both sides.
    room = on_device + in_memory - stages - (stages - 1)
    stack, number = [], 0
    for _ in range(200):
        size = draw.choice([1, stages])
        if draw.random() < 0.55 and sum(len(values) for _, values in stack) + size <= room:
            values = [float(1000 * number + i) for i in range(size)]
            kept.put(key(number), tuple(device.make(value, 0.0) for value in values))
            stack.append((number, values))
            number += 1
        elif stack:
            index, values = draw.choice(stack) if draw.random() < 0.3 else stack[-1]
            live = kept.get(key(index))
            kept.hold(live)
            assert [tensor[0].item() for tensor in live] == values
            kept.release(live)
            if draw.random() < 0.6:
                kept.discard(key(stack.pop()[0]))
    assert ledger.device_bytes <= on_device * unit
    assert ledger.ram_bytes <= in_memory * unit
    while stack:
        kept.discard(key(stack.pop()[0]))
    kept.put(key(-1), (device.make(0.0),))
    kept.discard(key(-1))
    assert kept._top.account.bytes == kept._ram.bytes == 0


def test_too_much_for_both_is_an_error():
    kept, device, _ = store(32, 32)
    with pytest.raises(CheckpointError, match=r"device_memory=32 and memory=32: raise"):
        for index in range(9):
            kept.put(key(index), (device.make(index, 0.0),))


# ------------------------------------------------------------------------------- whole sweeps

METHODS = {
    "rk4": {"method": "rk4", "step_size": 0.05},
    "dopri5": {"method": "dopri5"},
    "cn": {"method": "cn", "step_size": 0.05},
    "es325": {"method": "es325", "step_size": 0.1},
    "rosenbrock": {"method": "ra34pw2", "step_size": 0.05},
    "bdf": {"method": "bdf"},
}


def solve(case, **checkpointing):
    def make(field):
        limits = pnode.Checkpointing(**checkpointing) if checkpointing else None
        return pnode.Solver(field, checkpointing=limits, **METHODS[case])

    solution, values = gradients(module_on_device(Field()), on_device(start()), make)
    return solution.stats, [bare(value) for value in values]


@pytest.mark.parametrize("units", [8, 20])
@pytest.mark.parametrize("case", METHODS)
def test_gradients_with_offload(case, units):
    with simulated():
        _, expected = solve(case)
        stats, found = solve(case, device_memory=units * STATE)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    assert 0 < stats.device_bytes <= units * STATE
    assert stats.backward.recomputed == 0
    assert counts.to_host > 0


@pytest.mark.parametrize("units", [(5, 3), (12, 12)])
@pytest.mark.parametrize("case", ["rk4", "dopri5", "cn", "rosenbrock"])
def test_gradients_with_offload_and_repeated_steps(case, units):
    on_device_units, in_memory = units
    if case == "dopri5":
        on_device_units += 8
    with simulated():
        _, expected = solve(case)
        stats, found = solve(
            case, device_memory=on_device_units * STATE, memory=in_memory * STATE,
            reproducible=case == "dopri5",
        )  # fmt: skip
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
    assert stats.device_bytes <= on_device_units * STATE
    assert stats.ram_bytes <= in_memory * STATE


@pytest.mark.parametrize("case", ["rk4", "bdf"])
def test_all_three_levels(case, tmp_path):
    with simulated():
        _, expected = solve(case)
        stats, found = solve(case, device_memory=8 * STATE, memory=10 * STATE, disk=tmp_path)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    assert stats.disk_bytes > 0
    assert not list(tmp_path.iterdir())


def test_copies_run_on_their_own_stream():
    streams = Streams()
    with simulated(streams=streams):
        device = on_device(torch.ones(3))
        own = Offload(device.device)
        leaving = own.to_host([device])
        assert streams.log == [
            ("copies", "waits for", "default"), ("inside", "copies"), ("copies", "holds", (3,)),
        ]  # fmt: skip
        streams.log.clear()
        (copy,) = leaving.wait()
        assert streams.log == [("host", "waits for", "event on copies")]
        streams.log.clear()
        coming = own.to_device([copy])
        assert streams.log == [("inside", "copies")]
        streams.log.clear()
        (back,) = coming.wait()  # the host does not wait
        assert streams.log == [
            ("default", "waits for", "event on copies"), ("default", "holds", (3,)),
        ]  # fmt: skip
        assert torch.equal(bare(back), bare(device))


# ------------------------------------------------------------------------------ what is refused


def test_device_memory_is_for_states_on_a_device():
    for keywords in ({}, {"device_state": "host"}):
        solver = pnode.Solver(
            Field(), method="rk4", step_size=0.1, **keywords,
            checkpointing=pnode.Checkpointing(device_memory="1MB"),
        )  # fmt: skip
        with pytest.raises(ConfigurationError, match=r"device_memory=1000000.*on the host"):
            solver(start(), TIMES)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"device_memory": "much"}, "device_memory='much' is not an amount"),
        ({"device_memory": 0}, "device_memory=0 is not an amount"),
        ({"device_memory": 1e6, "store": "tape"}, "store='tape' with device_memory="),
    ],
)
def test_unusable_limits(keywords, message):
    with pytest.raises(ConfigurationError, match=message):
        pnode.Checkpointing(**keywords)


def test_a_device_too_small_for_a_step():
    with simulated(), pytest.raises(ConfigurationError, match=r"device_memory=96.*need 384 bytes"):
        solve("rk4", device_memory=STATE)
