"""Gradients within a budget of memory: the same numbers, and never more bytes than allowed."""

from __future__ import annotations

import gc
import os
import random
import signal
from pathlib import Path

import children
import pytest
import torch
from representatives import representatives
from test_gradients import TIGHT, Field, gradients, initial, relative_difference

import pnode
from pnode.adjoint.accounts import Account
from pnode.adjoint.disk import DiskFolder
from pnode.adjoint.slabs import Slabs
from pnode.adjoint.steps import Steps
from pnode.adjoint.store import CheckpointStore
from pnode.adjoint.trajectory import Trajectory
from pnode.base.ledger import Ledger
from pnode.base.options import SolverOptions, next_prefix
from pnode.base.vectors import copy_out
from pnode.field.vectorfield import vector_field
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.create import create_integrator
from pnode.solvers.methods import METHODS, find_method
from pnode.solvers.multistep import TakenOrder
from pnode.solvers.petsc.settings import IntegratorSettings, default_options
from pnode.solvers.stepping import Step

D = torch.float64
STATE = 48  # bytes of initial()
ORDINARY = [m for m in METHODS if "rhs" in m.forms]
RESTARTING = [m.name for m in representatives(ORDINARY) if m.restarts]
T = torch.linspace(0, 1, 4, dtype=D)


def solve(name, checkpointing=None, field=None, y0=None, **keywords):
    """Gradient of a loss on all outputs, and the ledger."""
    field, y0 = field or Field(), initial() if y0 is None else y0
    keywords = {"step_size": 0.06} | keywords
    if find_method(name).implicit:
        keywords.setdefault("petsc_options", TIGHT)
    solver = pnode.Solver(field, method=name, checkpointing=checkpointing, **keywords)
    solution = solver(y0, T)
    weights = torch.arange(1.0, 5.0, dtype=D)[:, None, None]
    return gradients((solution.ys * weights).sum(), field, y0), solution.stats


def few_steps(name):
    """Half as many steps of methods with many stages: repeating them takes longest."""
    return {"step_size": 0.12} if find_method(name).stage_units > 3 else {}


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", [m.name for m in ORDINARY if m.ts_type in ("dirk", "theta", "cn")])
def test_the_last_state_of_a_checkpoint_is_the_end_where_the_table_says_so(name):
    method, field, y0 = find_method(name), Field(), initial().detach()
    integrator = create_integrator(
        IntegratorSettings(method, 6, D),
        SolverOptions(next_prefix(), TIGHT, default_options(method, False, "dense", D)),
    )
    problem = InitialValueProblem.create(field, y0, torch.zeros(1))
    integrator.begin(vector_field(problem, Ledger()), y0.flatten(), 0.0)
    integrator.attempt(0.0, 0.1, 0)
    stages = integrator.checkpoint(None).stages
    assert len(stages) == method.stage_units
    assert torch.equal(stages[-1], copy_out(integrator.solution)) == method.holds_end
    integrator.end()


@pytest.mark.parametrize("name", RESTARTING)
def test_gradient_and_plan_do_not_depend_on_the_budget(name):
    """The same bits where a step depends on nothing but its start; plan and ledger agree."""
    method, steps = find_method(name), few_steps(name)
    expected, free = solve(name, **steps)
    assert free.backward.recomputed == 0
    for extra in (0, 2, 9):
        memory = (method.stage_units + extra) * STATE
        found, stats = solve(name, memory, **steps)
        plan = pnode.plan(name, stats.steps, STATE, memory)
        assert plan.recomputed == stats.backward.recomputed > 0
        assert plan.ram_bytes == stats.ram_bytes <= memory
        assert relative_difference(found, expected) < 1e-13
        assert same_bits(found, expected) or not method.same_bits


@pytest.mark.parametrize("store", ["stages", "solutions"])
@pytest.mark.parametrize("name", ["rk4", "cn", "trbdf2"])
def test_each_kind_of_checkpoint_alone(name, store):
    expected, _ = solve(name)
    memory = 12 * STATE
    found, stats = solve(name, pnode.Checkpointing(memory=memory, store=store))
    mixed = pnode.plan(name, stats.steps, STATE, memory)
    assert relative_difference(found, expected) < 1e-13
    assert stats.backward.recomputed >= mixed.recomputed > 0
    assert stats.ram_bytes <= memory


@pytest.mark.parametrize(
    "name", [m.name for m in representatives(ORDINARY) if m.fsal or m.ts_type == "dirk"]
)
def test_reproducible_gives_the_same_bits(name):
    free = pnode.Checkpointing(reproducible=True)
    tight = pnode.Checkpointing(
        memory=(find_method(name).stage_units + 2) * STATE, reproducible=True
    )
    expected, stats = solve(name, free, **few_steps(name))
    found, other = solve(name, tight, **few_steps(name))
    assert other.backward.recomputed > 0
    assert same_bits(found, expected)
    if find_method(name).fsal:  # one more evaluation per step
        assert stats.rhs == find_method(name).stages * stats.steps


@pytest.mark.parametrize("name", ["dopri5", "verner8", "es325", "cn", "ra34pw2"])
@pytest.mark.parametrize("units", [1, 5, 30])
def test_adaptive_steps_within_a_budget(name, units):
    # The error estimate of cn is that of a first-order method: thousands of steps at 1e-7.
    tolerance = 1e-5 if name == "cn" else 1e-7
    keywords = {"step_size": None, "rtol": tolerance, "atol": tolerance}
    expected, free = solve(name, **keywords)
    memory = (find_method(name).stage_units + units) * STATE
    found, stats = solve(name, memory, **keywords)
    assert stats.steps == free.steps
    assert stats.ram_bytes <= memory
    assert relative_difference(found, expected) < 1e-12


def test_second_backward_within_a_budget():
    field, y0 = Field(), initial()
    solver = pnode.Solver(field, method="rk4", step_size=0.06, checkpointing=8 * STATE)
    solution = solver(y0, T)
    tensors = [y0, field.inner, field.outer, field.bias]
    loss = solution.ys.square().sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    once = solution.stats.backward.recomputed
    second = torch.autograd.grad(loss, tensors)
    assert same_bits(first, second)
    # The forward sweep is repeated once more.
    assert solution.stats.backward.recomputed == 2 * once + solution.stats.steps
    assert solution.stats.ram_bytes <= 8 * STATE


def test_events_and_dense_output_within_a_budget():
    def f(t, y):
        return torch.stack([y[1], -torch.sin(y[0])])

    y0 = torch.tensor([1.0, 0.0], dtype=D, requires_grad=True)

    def value(checkpointing, **keywords):
        solver = pnode.Solver(
            f, method="dopri5", rtol=1e-8, atol=1e-8, checkpointing=checkpointing, **keywords
        )
        solution = solver(y0, torch.linspace(0, 5, 7, dtype=D))
        loss = solution.ys.square().sum()
        if solution.event_time is not None:
            loss = loss + solution.event_time
        return torch.autograd.grad(loss, y0)[0], solution.stats

    for keywords in ({"dense": True}, {"event_fn": lambda t, y: y[0]}):
        expected, _ = value(None, **keywords)
        found, stats = value(12 * 16, **keywords)
        assert stats.backward.recomputed > 0
        assert stats.ram_bytes <= 12 * 16
        assert torch.allclose(found, expected, rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("name", ["rk4", "dopri5", "cn", "esdirk6", "bdf"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_disk(name, adaptive, tmp_path):
    """No step is repeated; what does not fit into memory goes to disk, and nothing is left."""
    if adaptive and not find_method(name).adaptive:
        adaptive = False
    keywords = {"step_size": None, "rtol": 1e-6, "atol": 1e-6} if adaptive else {}
    # Not with graphs: an FSAL stage's time may then be the step before's end to the last bit.
    expected, free = solve(name, pnode.Checkpointing(store="stages"), **keywords)
    memory = max(free.ram_bytes // 3, 3 * find_method(name).stage_units * STATE)
    found, stats = solve(name, pnode.Checkpointing(memory=memory, disk=tmp_path), **keywords)
    assert same_bits(found, expected)
    assert stats.ram_bytes <= memory
    assert stats.disk_bytes > 0 or free.ram_bytes <= memory
    assert stats.backward.recomputed == 0
    assert list(tmp_path.iterdir()) == []


def test_folder_is_private_and_removed_when_the_graph_goes(tmp_path):
    field, y0 = Field(), initial()
    solver = pnode.Solver(
        field, method="rk4", step_size=0.06,
        checkpointing=pnode.Checkpointing(memory=20 * STATE, disk=tmp_path),
    )  # fmt: skip
    solutions = [solver(y0, T), solver(y0, T)]
    folders = list(tmp_path.iterdir())
    assert len(folders) == 2
    assert all(str(os.getpid()) in folder.name for folder in folders)
    del solutions
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_folder_is_removed_after_a_failure(tmp_path):
    class Stop(Exception):
        pass

    def field(t, y):
        if float(t) > 0.8:
            raise Stop
        return -y

    solver = pnode.Solver(
        field, method="rk4", step_size=0.02,
        checkpointing=pnode.Checkpointing(memory=20 * STATE, disk=tmp_path),
    )  # fmt: skip
    with pytest.raises(Stop):
        solver(initial(), T)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "header", "delete", "swap"])
def test_damaged_files_are_named(damage, tmp_path):
    field, y0 = Field(), initial()
    solver = pnode.Solver(
        field, method="rk4", step_size=0.03,
        checkpointing=pnode.Checkpointing(memory=12 * STATE, disk=tmp_path),
    )  # fmt: skip
    loss = solver(y0, T).ys.sum()
    (folder,) = tmp_path.iterdir()
    first, second, *_ = sorted(folder.glob("stages-*"))
    data = bytearray(first.read_bytes())
    if damage == "truncate":
        first.write_bytes(data[:-5])
    elif damage == "flip":
        data[-9] ^= 1
        first.write_bytes(data)
    elif damage == "header":
        first.write_bytes(b"{}" + data)
    elif damage == "delete":
        first.unlink()
    else:
        first.write_bytes(second.read_bytes())
    with pytest.raises(pnode.CheckpointError, match=first.name):
        loss.backward()


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(self, name, tensors):
        raise pnode.CheckpointError(f"the checkpoint {self.path / name} could not be written")

    monkeypatch.setattr(DiskFolder, "write", full)
    with pytest.raises(pnode.CheckpointError, match="could not be written"):
        solve("rk4", pnode.Checkpointing(memory=12 * STATE, disk=tmp_path))


def test_a_write_that_fails_leaves_no_file(tmp_path):
    folder = DiskFolder(tmp_path)
    (folder.path / "a.partial").mkdir()  # in the way
    with pytest.raises(pnode.CheckpointError, match="a could not be written"):
        folder.write("a", (torch.ones(3),))
    assert not (folder.path / "a").exists()
    folder.close()


def test_bdf_keeps_every_step_and_says_so():
    with pytest.raises(pnode.CheckpointError, match=r"memory=480.*disk="):
        solve("bdf", 10 * STATE)


@pytest.mark.parametrize("name", ["rk4", "dopri5", "es325"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_too_little_memory_is_an_error_with_the_least(name, adaptive):
    units = find_method(name).stage_units
    keywords = {"step_size": None} if adaptive and find_method(name).adaptive else {}
    with pytest.raises(pnode.ConfigurationError, match=f"at least {units * STATE} bytes"):
        solve(name, units * STATE - 1, **keywords)
    assert solve(name, units * STATE, **keywords)[1].ram_bytes == units * STATE


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"memory": 0}, "memory=0"),
        ({"memory": "lots"}, "'lots'"),
        ({"memory": "1.2.3MB"}, "1.2.3MB"),
        ({"memory": True}, "True"),
        ({"memory": [1]}, r"\[1\]"),
        ({"store": "tapes"}, "'tapes'.*'auto'"),
        ({"disk": "."}, "memory="),
        ({"memory": 100, "disk": "/nonexistent"}, "/nonexistent"),
        ({"memory": 100, "disk": 3.5}, "3.5"),
    ],
)
def test_unusable_checkpointing(keywords, message):
    with pytest.raises(pnode.ConfigurationError, match=message):
        pnode.Checkpointing(**keywords)


@pytest.mark.parametrize(
    ("text", "number"),
    [("256MiB", 2**28), ("2 GB", 2 * 10**9), ("1.5kib", 1536), (4096, 4096), ("77", 77)],
)
def test_amounts_of_memory(text, number):
    assert pnode.Checkpointing(memory=text).bytes == number


def test_stores_that_need_a_known_number_of_steps():
    chosen = pnode.Checkpointing(memory=100 * STATE, store="solutions")
    with pytest.raises(pnode.ConfigurationError, match="known in advance"):
        solve("dopri5", chosen, step_size=None)
    with pytest.raises(pnode.ConfigurationError, match="needs memory="):
        solve("rk4", pnode.Checkpointing(store="solutions"))


def test_allocated_tensors_stay_within_the_budget(monkeypatch):
    """A count of the tensors that are really alive in the store, beside the ledger's own."""
    peak, alive = 0, {}
    original = Account.hold, Account.release

    def hold(self, tensors):
        nonlocal peak
        original[0](self, tensors)
        for tensor in tensors:
            alive[id(tensor)] = tensor.untyped_storage().nbytes()
        peak = max(peak, sum(alive.values()))

    def release(self, tensors):
        gone = original[1](self, tensors)
        for tensor in gone:
            alive.pop(id(tensor), None)
        return gone

    monkeypatch.setattr(Account, "hold", hold)
    monkeypatch.setattr(Account, "release", release)
    monkeypatch.setattr(Slabs, "takes", lambda *arguments: False)
    _, stats = solve("rk4", 15 * STATE, step_size=0.01)
    assert peak == stats.ram_bytes <= 15 * STATE
    assert not alive or sum(alive.values()) <= 15 * STATE


def test_process_memory_does_not_grow_with_the_steps():
    """60 MB of stages without a limit: the resident set grows by a fraction of that."""
    resource = Path("/proc/self/statm")
    if not resource.exists():
        pytest.fail("this test reads /proc/self/statm")
    page = os.sysconf("SC_PAGE_SIZE")

    def resident():
        return int(resource.read_text().split()[1]) * page

    y0 = torch.ones(25_000, dtype=D, requires_grad=True)  # 200 kB
    f = torch.nn.Tanh()
    solver = pnode.Solver(
        lambda t, y: f(y), method="rk4", step_size=1 / 75, checkpointing="4MB", params=[]
    )
    t = torch.tensor([0.0, 1.0], dtype=D)
    solver(y0, t).ys[-1].sum().backward()  # PETSc's own vectors
    before = resident()
    solution = solver(y0, t)
    assert resident() - before < 12e6
    solution.ys[-1].sum().backward()
    assert solution.stats.ram_bytes <= 4_000_000
    assert 4 * 200_000 * solution.stats.steps == 60_000_000


def test_plan_of_the_documented_example():
    plan = pnode.plan("rk4", 100, 8000, memory=14 * 8000)
    assert isinstance(plan, pnode.Plan)
    assert plan.ram_bytes == 14 * 8000
    free = pnode.plan("rk4", 100, 8000)
    assert (free.recomputed, free.ram_bytes) == (0, 4 * 100 * 8000)
    for wrong in ({"steps": 0}, {"steps": 1.5}, {"state_bytes": 0}):
        with pytest.raises(pnode.ConfigurationError, match=next(iter(wrong))):
            pnode.plan(**{"method": "rk4", "steps": 3, "state_bytes": 8} | wrong)
    with pytest.raises(pnode.ConfigurationError, match="nothing to plan"):
        pnode.plan("bdf", 100, 8000)


@pytest.mark.parametrize("units", [6, 20, 100])
def test_plan_with_a_disk(units, tmp_path):
    memory = units * STATE
    _, stats = solve("rk4", pnode.Checkpointing(memory=memory, disk=tmp_path))
    plan = pnode.plan("rk4", stats.steps, STATE, memory, tmp_path)
    assert (plan.recomputed, plan.ram_bytes, plan.disk_bytes) == (
        0, stats.ram_bytes, stats.disk_bytes
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


class Noisy(torch.nn.Module):
    """A field that is not a function of t and y in training mode."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, t, y):
        return self.layer(y) - y


class Averaging(torch.nn.Module):
    """Subtracts a running mean, which it updates in training mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, dtype=D))

    def forward(self, y):
        if self.training:
            self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return y - self.mean


@pytest.mark.parametrize(
    ("layer", "message"),
    [(lambda: torch.nn.Dropout(0.5), "random numbers"), (Averaging, "buffers")],
)
@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_stochastic_and_stateful_fields_are_refused(layer, message, method):
    field = Noisy(layer())
    solver = pnode.Solver(field, method=method, step_size=0.1)
    with pytest.raises(pnode.VectorFieldError, match=message):
        solver(initial(), T)
    if method == "rk4":  # no gradient, no harm (Newton's method would not converge)
        with torch.no_grad():
            assert bool(torch.isfinite(solver(initial(), T).ys).all())
    field.eval()
    solver(initial(), T).ys.sum().backward()


@pytest.mark.parametrize("name", ["rk4", "bosh3", "es325", "cn"])
def test_live_stages_of_repeated_steps_are_in_the_ledger(name, monkeypatch):
    """The peak over what the store holds and the stages whose adjoint is taken."""
    peak = 0
    original = Trajectory.stages

    def stages(self, index, integrator):
        nonlocal peak
        live = original(self, index, integrator)
        tensors = [*live.tensors(), *(t for kept in self._store._top._kept.values() for t in kept)]
        sizes = {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        peak = max(peak, sum(sizes.values()))
        return live

    monkeypatch.setattr(Trajectory, "stages", stages)
    monkeypatch.setattr(Slabs, "takes", lambda *arguments: False)
    for extra in range(10):
        memory = (find_method(name).stage_units + extra) * STATE
        peak = 0
        _, stats = solve(name, memory, **few_steps(name))
        assert peak <= stats.ram_bytes <= memory


def test_trajectories_name_what_is_missing():
    trajectory = Trajectory.__new__(Trajectory)
    trajectory._live = None
    with pytest.raises(pnode.CheckpointError, match="no checkpoint of this step"):
        trajectory.stages(3, None)


PROGRAM = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch, pnode
from test_gradients import Field, gradients, initial

folder, method, kill, step = sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5])
taken = 0

def monitor(step, t, y):
    global taken
    taken += 1
    if taken == kill:
        os.kill(os.getpid(), signal.SIGKILL)

keywords = {"step_size": step} if step else {"rtol": 1e-8, "atol": 1e-8}
chosen = pnode.Checkpointing(memory=1920, disk=folder, resume="run")
field, y0 = Field(), initial()
solver = pnode.Solver(field, method=method, checkpointing=chosen, monitor=monitor, **keywords)
solution = solver(y0, torch.linspace(0, 1, 5, dtype=torch.float64))
loss = (solution.ys * torch.arange(1.0, 6.0)[:, None, None]).sum()
torch.save((taken, solution.stats.steps, gradients(loss, field, y0)), sys.argv[6])
"""


def in_one_go(method, step):
    """What the program finds where nothing stops it."""
    keywords = {"step_size": step} if step else {"rtol": 1e-8, "atol": 1e-8}
    field, y0 = Field(), initial()
    solution = pnode.Solver(field, method=method, **keywords)(y0, torch.linspace(0, 1, 5, dtype=D))
    loss = (solution.ys * torch.arange(1.0, 6.0)[:, None, None]).sum()
    return solution.stats.steps, gradients(loss, field, y0)


def run_program(tmp_path, folder, method, kill, step):
    result, program = tmp_path / "result", tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    run = children.run_program(
        program,
        [str(Path(__file__).parent), str(folder), method, str(kill), str(step), str(result)],
    )
    if kill:
        assert run.returncode == -signal.SIGKILL, run.stderr
        return None
    assert run.returncode == 0, run.stderr
    return torch.load(result)


@pytest.mark.parametrize(
    ("method", "step", "kills"),
    [
        ("rk4", 0.01, (60, 25)), ("cn", 0.01, (60, 25)), ("es325", 0.02, (30, 12)),
        ("dopri5", 0, (3, 8)), ("ra34pw2", 0.01, (70,)), ("rk4", 0.01, (2,)),
    ],
)  # fmt: skip
def test_resume_after_a_kill(method, step, kills, tmp_path):
    """The same gradient as of a sweep in one go, with fewer steps than that in the last process."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    steps, expected = in_one_go(method, step)
    for kill in kills:
        run_program(tmp_path, scratch, method, kill, step)
    taken, total, found = run_program(tmp_path, scratch, method, 0, step)
    assert total == steps
    assert taken < steps or max(kills) < 10
    assert relative_difference(found, expected) < 1e-12
    assert same_bits(found, expected) or not find_method(method).same_bits
    assert list(scratch.iterdir()) == []


def test_resume_wants_the_same_problem_and_one_solve_at_a_time(tmp_path):
    chosen = pnode.Checkpointing(memory=1920, disk=tmp_path, resume="run")

    class Stop(Exception):
        pass

    def monitor(step, t, y):
        if t > stop:
            raise Stop

    solver = pnode.Solver(
        lambda t, y: -y, method="rk4", step_size=0.01, checkpointing=chosen, monitor=monitor
    )
    stop = 0.7
    with pytest.raises(Stop):
        solver(initial(), T)
    with pytest.raises(pnode.CheckpointError, match=r"pnode-run.*another sweep: tensors"):
        solver(initial() + 1.0, T)
    with pytest.raises(pnode.CheckpointError, match="times"):
        solver(initial(), T + 1.0)
    stop = 2.0
    solution = solver(initial(), T)
    assert solution.stats.rhs < 4 * 99
    with pytest.raises(pnode.CheckpointError, match=f"in use by process {os.getpid()}"):
        solver(initial(), T)
    del solution  # its steps stay, and the name is free again
    gc.collect()
    solution = solver(initial(), T)
    solution.ys.sum().backward()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keywords", [{"method": "bdf"}, {"dense": True}, {"event_fn": len}])
def test_resume_is_refused_where_one_state_is_not_enough(keywords, tmp_path):
    chosen = pnode.Checkpointing(memory=1920, disk=tmp_path, resume="run")
    solver = pnode.Solver(lambda t, y: -y, checkpointing=chosen, **keywords)
    with pytest.raises(pnode.ConfigurationError, match="resume='run'"):
        solver(initial(), T)
    for wrong in ("a/b", "", 5):
        with pytest.raises(pnode.ConfigurationError, match="resume="):
            pnode.Checkpointing(memory=1920, disk=tmp_path, resume=wrong)
    with pytest.raises(pnode.ConfigurationError, match="without disk="):
        pnode.Checkpointing(memory=1920, resume="run")


@pytest.mark.parametrize("name", ["rk4", "dopri5", "cn", "bdf"])
@pytest.mark.parametrize("memory", [STATE, 20 * STATE])
def test_one_time_takes_no_checkpoints(name, memory):
    y0 = initial()
    solver = pnode.Solver(Field(), method=name, step_size=0.1, checkpointing=memory)
    solution = solver(y0, T[:1])
    (gradient,) = torch.autograd.grad(solution.ys.square().sum(), y0)
    assert torch.equal(gradient, 2 * y0)
    assert solution.stats.ram_bytes == 0


def test_the_working_directory_may_change(tmp_path, monkeypatch):
    expected, _ = solve("rk4")
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    chosen = pnode.Checkpointing(memory=12 * STATE, disk="here")
    monkeypatch.chdir(tmp_path / "there")
    field, y0 = Field(), initial()
    solution = pnode.Solver(field, method="rk4", step_size=0.06, checkpointing=chosen)(y0, T)
    assert len(list((tmp_path / "here").iterdir())) == 1
    monkeypatch.chdir(tmp_path)
    weights = torch.arange(1.0, 5.0, dtype=D)[:, None, None]
    assert same_bits(gradients((solution.ys * weights).sum(), field, y0), expected)
    assert list((tmp_path / "here").iterdir()) == []
    DiskFolder("here").close()
    assert list((tmp_path / "here").iterdir()) == []


def test_a_fork_leaves_the_folder_alone_and_does_not_wait_for_the_thread(tmp_path):
    store = CheckpointStore(Ledger(), 24, lambda: DiskFolder(tmp_path))
    for index in range(4):
        store.put(("stages", index), (torch.full((3,), float(index), dtype=D),))
    assert len(list(tmp_path.glob("*/stages-*"))) == 3
    child = os.fork()
    if child == 0:
        try:
            store.put(("stages", 4), (torch.ones(3, dtype=D),))
        except pnode.CheckpointError as error:
            store.close()  # what a collected graph, too, would do
            os._exit(42 if "forked" in str(error) else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 42
    assert torch.equal(store.get(("stages", 0))[0], torch.zeros(3, dtype=D))
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_was_read_counts_as_memory(tmp_path):
    ledger = Ledger()
    store = CheckpointStore(ledger, 24, lambda: DiskFolder(tmp_path))
    for index in range(4):
        store.put(("stages", index), (torch.full((3,), float(index), dtype=D),))
    for index in range(3, -1, -1):
        assert torch.equal(store.get(("stages", index))[0], torch.full((3,), float(index), dtype=D))
        assert store._ram.bytes == 24  # no room to read ahead
        assert store._disk._reading is None
        store.discard(("stages", index))
    assert ledger.ram_bytes == 24
    store.close()


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_small_tensors_side_by_side_are_what_tensors_are(seed, disk, tmp_path, monkeypatch):
    """Any order of uses, with tensors shared and held: the same values, and the same bytes."""

    def run(side_by_side):
        draw, ledger = random.Random(seed), Ledger()
        folder = (lambda: DiskFolder(tmp_path)) if disk else None
        with monkeypatch.context() as patch:
            if not side_by_side:
                patch.setattr(Slabs, "takes", lambda *arguments: False)
            store = CheckpointStore(ledger, 700 if disk else 10**6, folder)
            return [ledger, *uses(draw, store)], ledger

    def uses(draw, store):
        stack, number = [], 0
        for _ in range(300):
            action = draw.choice(["put", "put", "get", "hold", "end", "discard"])
            if action == "put" and len(stack) < 60:
                tensors = [torch.tensor([float(number)] * draw.choice([1, 1, 3]), dtype=D)]
                tensors += [torch.tensor(number + 0.5, dtype=D) for _ in range(draw.choice([0, 2]))]
                if stack and draw.random() < 0.6:  # as endpoint theta methods do
                    previous = store.peek(stack[-1])
                    tensors[:0] = [] if previous is None else [previous[-1]]
                if draw.random() < 0.2:
                    tensors.append(tensors[0])
                stack.append(("stages", number))
                store.put(stack[-1], tuple(tensors))
                number += 1
            elif stack and action in ("get", "hold"):
                found = store.get(stack[-1] if disk else draw.choice(stack))
                store.hold(found)
                # What is read from the disk stays in memory until it is discarded.
                gone = disk or (action == "hold" and draw.random() < 0.5)
                if gone:
                    store.discard(stack.pop())
                store.release(found)
                yield [tensor.tolist() for tensor in found]
            elif stack and stack[-1][0] == "stages" and action == "end":  # KeepEnd
                _, index = key = stack.pop()
                end = store.get(key)[-1]
                store.discard(key)
                stack.append(("solution", index + 1))
                store.put(stack[-1], (end,))
            elif stack and action == "discard":
                store.discard(stack.pop(draw.randrange(len(stack))))
            yield store._ram.bytes
        while stack:
            store.discard(stack.pop())
        yield store._ram.bytes
        store.close()

    found, ledger = run(True)
    expected, other = run(False)
    assert ledger.ram_bytes > 0
    assert found == expected
    assert ledger == other


def test_slots_are_used_again():
    slabs = Slabs(10**6)
    for _ in range(50):
        packed = [slabs.put((torch.ones(1, dtype=D), torch.zeros(1, dtype=D)), lambda _: 0)[0]
                  for _ in range(40)]  # fmt: skip
        for slots in packed:
            assert slabs.drop(slots) == 16
    assert len(slabs._slabs) == 1


def test_a_tensor_whose_slot_was_given_away_is_a_new_one():
    slabs = Slabs(10**6)
    old, new = torch.ones(1, dtype=D), torch.zeros(1, dtype=D)
    slabs.drop(slabs.put((old,), lambda _: 0)[0])
    slots, _ = slabs.put((new,), lambda _: 0)
    assert slabs.find(old) is None
    assert torch.equal(slabs.get(slots)[0], new)
    assert slabs.hold((old, new)) == [old]


def test_steps_are_a_list_of_steps():
    expected = [Step(i, 0.1 * i, 0.1, 0.1 * (i + 1), i % 3) for i in range(7)]
    expected[4] = Step(4, 0.1 * 4, 0.05, 0.1 * 5, TakenOrder.of(2, 0.1, [(0.2, 3)]))
    steps = Steps(expected)
    assert list(steps) == expected
    assert len(steps) == 7
    assert steps[-1] == expected[-1]
    assert steps[:1] == expected[:1]
    assert steps[2:5] == expected[2:5]
    assert steps[4].order.failed == ((0.2, 3),)
    with pytest.raises(IndexError):
        steps[7]
    assert not Steps()


def test_room_for_tensors_shared_with_a_checkpoint_that_moves(tmp_path):
    a, b, c = torch.ones(3, 3, dtype=D)
    ledger = Ledger()
    store = CheckpointStore(ledger, 2 * 24, lambda: DiskFolder(tmp_path))
    store.put(("stages", 0), (a, b))
    with pytest.raises(pnode.CheckpointError, match=r"memory=48: raise it to 72 bytes or more$"):
        store.put(("stages", 1), (b, c, a))
    assert ledger.ram_bytes == 48
    store.close()


@pytest.mark.parametrize("more", [{}, {"dense": True}, {"event_fn": lambda t, y: y[0] - 2.0}])
@pytest.mark.parametrize("name", ["rk4", "cn", "rodaspr"])
def test_a_single_output_time_within_a_budget(name, more):
    """There are no steps, and the gradient is that of the identity."""
    y0 = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    solver = pnode.Solver(lambda t, y: -y, method=name, step_size=0.1, checkpointing=1000, **more)
    solution = solver(y0, torch.tensor([0.0]))
    assert solution.stats.steps == 0
    solution.ys.square().sum().backward()
    assert y0.grad.tolist() == [2.0, 6.0]
