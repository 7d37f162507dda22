"""The folder of a sweep that can be taken up again: whose it is, what is in it, one at a time."""

import argparse
import fcntl
import functools
import gc
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import pnode
from pnode.adjoint import lock
from pnode.adjoint.disk import DiskFolder
from pnode.adjoint.identity import describe
from pnode.adjoint.resume import Progress
from pnode.solvers.stepping import Step

SAME = {"f": "x"}
STATE = torch.tensor([1.0, 2.0], dtype=torch.float64)
T = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


def begin(folder, steps=5, identity=SAME):
    """Leave a folder behind as a killed sweep of as many steps would; the output is at step 2."""
    progress = Progress(folder, "run", identity)
    progress.add_output(0, 0, STATE)
    for index in range(steps):
        progress.add_step(Step(index, 0.1 * index, 0.1, 0.1 * (index + 1), 0))
        progress.write(f"stages-{index}", (STATE, STATE * (1.0 + index)))
        if index == 1:
            progress.add_output(1, 2, STATE * 7.0)
    progress.leave()
    return progress.path


def taken_up(folder, identity=SAME):
    progress = Progress(folder, "run", identity)
    progress.leave()
    return progress


def modes(path):
    return {oct(stat.S_IMODE(found.lstat().st_mode)) for found in path.iterdir()}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_the_folder_is_for_this_user_alone(umask, tmp_path):
    before = os.umask(umask)
    try:
        path = begin(tmp_path) if umask != 0o777 else Progress(tmp_path, "run", SAME).path
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert modes(path) <= {"0o600", "0o0"}


def test_a_sweep_goes_on_where_it_was(tmp_path):
    begin(tmp_path)
    for _ in range(2):  # and again, if it is killed at once
        found = taken_up(tmp_path)
        assert [step.index for step in found.steps] == [0, 1, 2, 3]
        assert [count for count, _ in found.outputs] == [0, 2]
        assert torch.equal(found.outputs[1][1], STATE * 7.0)
        assert torch.equal(found.start, STATE * 5.0)
        assert found.steps[3] == Step(3, 0.1 * 3, 0.1, 0.1 * 4, 0)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_was_being_written_is_dropped(cut, tmp_path):
    path = begin(tmp_path)
    journal = path / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][: -min(cut, len(lines[-1]))])
    assert [step.index for step in taken_up(tmp_path).steps] == [0, 1, 2]


def damage_length(path):
    """Change a step's length by half of it: another number, of the same form."""
    data = (path / "journal").read_bytes()
    number = (0.1).hex().encode()
    assert number in data
    (path / "journal").write_bytes(data.replace(number, (0.15).hex().encode(), 1))


def replace(name, content):
    def act(path):
        (path / name).write_bytes(content)

    return act


def change(name, function):
    def act(path):
        (path / name).write_bytes(function((path / name).read_bytes()))

    return act


def folder_instead(name):
    def act(path):
        (path / name).unlink()
        (path / name).mkdir()

    return act


def pipe_instead(name):
    def act(path):
        (path / name).unlink()
        os.mkfifo(path / name)

    return act


def link_instead(name):
    """Move a file and link to it: even right contents are not read through a link."""

    def act(path):
        (path / name).rename(path.parent / "elsewhere")
        (path / name).symlink_to(path.parent / "elsewhere")

    return act


DAMAGE = {
    "length": ("journal", damage_length),
    "line": ("journal", change("journal", lambda d: d.replace(b"\n", b"\n\n", 1))),
    "swapped lines' halves": ("journal", change("journal", lambda d: d[:30] + d[31:])),
    "garbage": ("journal", replace("journal", bytes(range(256)))),
    "zeros": ("journal", change("journal", lambda d: d[:-20] + bytes(20))),
    "no journal": ("journal", lambda path: (path / "journal").unlink()),
    "no output": ("output-1", lambda path: (path / "output-1").unlink()),
    "output cut": ("output-1", change("output-1", lambda d: d[:-3])),
    "output garbage": ("output-1", replace("output-1", b"\xff\x00")),
    "another's output": ("output-1", lambda p: shutil.copy(p / "output-0", p / "output-1")),
    "stages cut": ("stages-4", change("stages-4", lambda d: d[: len(d) // 2])),
    "stages empty": ("stages-4", replace("stages-4", b"")),
    "dtype": ("stages-4", change("stages-4", lambda d: d.replace(b"float64", b"int64"))),
    "shape": ("stages-4", change("stages-4", lambda d: d.replace(b"[2]", b"[1]"))),
    "no problem": ("problem.json", lambda path: (path / "problem.json").unlink()),
    "problem cut": ("problem.json", change("problem.json", lambda d: d[:-9])),
    "problem of another kind": ("problem.json", replace("problem.json", b"[1, 2]")),
    "problem of before": ("problem.json", replace("problem.json", b'{"method": "rk4"}')),
    **{
        f"{name} {kind.__name__}": (name, kind(name))
        for kind in (folder_instead, pipe_instead, link_instead)
        for name in ("journal", "problem.json", "stages-4", "output-0", "lock")
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_error_with_the_file_and_the_remedy(kind, tmp_path):
    path = begin(tmp_path)
    name, act = DAMAGE[kind]
    act(path)
    with pytest.raises(pnode.CheckpointError) as caught:
        taken_up(tmp_path)
    assert str(path / name) in str(caught.value)
    assert "remove the folder" in str(caught.value)
    for each in sorted(path.iterdir()):
        each.rmdir() if each.is_dir() and not each.is_symlink() else each.unlink()
    path.rmdir()
    assert taken_up(tmp_path).start is None


def test_files_of_another_sweep_are_not_taken(tmp_path):
    (tmp_path / "other").mkdir()
    other = begin(tmp_path / "other")
    path = begin(tmp_path)
    (path / "stages-4").write_bytes((other / "stages-4").read_bytes())
    with pytest.raises(pnode.CheckpointError, match="stages-4 is damaged"):
        taken_up(tmp_path)


def test_planted_links_are_not_followed(tmp_path):
    """Neither by what is written anew nor by the removal of the folder."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = begin(tmp_path)
    for name in ("journal.partial", "problem.json.partial", "stages-9.partial", "stages-9"):
        (path / name).symlink_to(victim)
    progress = Progress(tmp_path, "run", SAME)
    progress.write("stages-9", (STATE,))
    assert torch.equal(progress.read("stages-9")[0], STATE)
    progress.close()
    assert victim.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [victim]


@pytest.mark.parametrize("kind", ["link", "file", "another user", "writable", "hard link"])
def test_a_folder_that_is_not_ours_is_left_alone(kind, tmp_path, monkeypatch):
    path = tmp_path / "pnode-run"
    if kind == "link":
        (tmp_path / "target").mkdir()
        path.symlink_to(tmp_path / "target")
    elif kind == "file":
        path.write_text("mine")
    else:
        begin(tmp_path)
    if kind == "writable":
        path.chmod(0o777)
    elif kind == "another user":
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    elif kind == "hard link":
        (path / "lock").unlink()
        (tmp_path / "victim").write_text("mine")
        (tmp_path / "victim").chmod(0o600)
        os.link(tmp_path / "victim", path / "lock")
    with pytest.raises(pnode.CheckpointError, match=str(path)):
        taken_up(tmp_path)
    if kind == "link":
        assert list((tmp_path / "target").iterdir()) == []
    elif kind in ("file", "hard link"):
        assert (path if kind == "file" else tmp_path / "victim").read_text() == "mine"


def test_a_scratch_folder_that_is_gone(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    chosen = pnode.Checkpointing(memory=1920, disk=scratch, resume="run")
    scratch.rmdir()
    scratch.write_text("a file now")
    solver = pnode.Solver(lambda t, y: -y, method="rk4", step_size=0.1, checkpointing=chosen)
    with pytest.raises(pnode.PnodeError, match="scratch"):
        solver(STATE.clone().requires_grad_(), T)


# ------------------------------------------------------------------------------------------- lock

HOLD = """
import os, sys, time
from pnode.adjoint.resume import Progress
progress = Progress(sys.argv[1], "run", {"f": "x"})
if sys.argv[2] == "fork" and os.fork() == 0:
    print("held", os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
if sys.argv[2] != "fork":
    print("held", os.getpid(), flush=True)
time.sleep(60)
"""


def test_the_lock_goes_with_the_process(tmp_path):
    """Whatever number it had, and though a fork of it lives on."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "fork"], stdout=subprocess.PIPE, text=True
    )
    child = int(holder.stdout.readline().split()[1])
    try:
        with pytest.raises(pnode.CheckpointError, match=f"in use by process {holder.pid} on "):
            taken_up(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        os.kill(child, 0)
        assert taken_up(tmp_path).start is None
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.stdout.close()


def test_a_lock_with_our_own_number_of_another_container(tmp_path):
    """Process 1 of a killed container wrote it: the number lives, the lock does not."""
    path = begin(tmp_path)
    (path / "lock").write_text(str(os.getpid()))
    assert len(taken_up(tmp_path).steps) == 4
    with (path / "lock").open() as file:  # a holder that cannot be asked
        fcntl.flock(file, fcntl.LOCK_EX)
        (path / "lock").write_text("garbage")
        with pytest.raises(pnode.CheckpointError, match="in use by another process"):
            taken_up(tmp_path)


def test_without_locks_it_says_so(tmp_path, monkeypatch):
    def none(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with pytest.raises(pnode.CheckpointError, match=r"cannot be locked.*choose a disk= folder"):
        taken_up(tmp_path)
    monkeypatch.undo()
    assert taken_up(tmp_path).start is None


def test_a_lock_taken_all_the_same_is_noticed(tmp_path, monkeypatch):
    """Where each host has locks of its own; the folder is then the other's to remove."""
    first = Progress(tmp_path, "run", SAME)
    monkeypatch.setattr(lock.fcntl, "flock", lambda *arguments: None)
    second = Progress(tmp_path, "run", SAME)
    with pytest.raises(pnode.CheckpointError, match="removed or taken over"):
        first.add_step(Step(0, 0.0, 0.1, 0.1, 0))
    first.close()
    second.add_step(Step(0, 0.0, 0.1, 0.1, 0))
    second.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("act", ["removed", "moved"])
def test_a_folder_that_goes_while_it_is_used(act, tmp_path):
    progress = Progress(tmp_path, "run", SAME)
    if act == "removed":
        subprocess.run(["rm", "-r", str(progress.path)], check=True)
    else:
        progress.path.rename(tmp_path / "moved")
    with pytest.raises(pnode.CheckpointError, match="removed or taken over"):
        progress.add_step(Step(0, 0.0, 0.1, 0.1, 0))
    with pytest.raises(pnode.CheckpointError, match="could not be written"):
        progress.add_output(0, 0, STATE)
    progress.close()
    assert taken_up(tmp_path).start is None


def test_a_fork_leaves_the_folder_to_its_parent(tmp_path):
    progress = Progress(tmp_path, "run", SAME)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            progress.add_step(Step(0, 0.0, 0.1, 0.1, 0))
        except pnode.CheckpointError:
            progress.close()
            code = 0
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    progress.add_step(Step(0, 0.0, 0.1, 0.1, 0))
    with pytest.raises(pnode.CheckpointError, match="in use"):
        Progress(tmp_path, "run", SAME)
    progress.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path):
    """In the middle of a line: an error, and the sweep can be taken up from before it."""
    path = begin(tmp_path)
    progress = Progress(tmp_path, "run", SAME)
    size = (path / "journal").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 12, limits[1]))
    try:
        with pytest.raises(pnode.CheckpointError, match="journal could not be written"):
            progress.add_step(Step(4, 0.4, 0.1, 0.5, 0))
        with pytest.raises(pnode.CheckpointError, match="stages-5 could not be written"):
            progress.write("stages-5", (torch.zeros(size),))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    progress.leave()
    assert not list(path.glob("*.partial"))
    assert len(taken_up(tmp_path).steps) == 4


# -------------------------------------------------------------------------------------- scratch


def test_scratch_files_are_private_and_checked(tmp_path):
    before = os.umask(0)
    try:
        folder = DiskFolder(tmp_path)
        victim = tmp_path / "victim"
        victim.write_text("mine")
        (folder.path / "a.partial").symlink_to(victim)
        folder.write("a", (STATE,))
    finally:
        os.umask(before)
    assert modes(folder.path) == {"0o600"}
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert victim.read_text() == "mine"
    (folder.path / "a").rename(tmp_path / "moved")
    (folder.path / "a").symlink_to(tmp_path / "moved")
    with pytest.raises(pnode.CheckpointError, match=r"cannot be read.*solve again"):
        folder.read("a")
    (folder.path / "a").unlink()
    os.mkfifo(folder.path / "a")
    with pytest.raises(pnode.CheckpointError, match="not a regular file"):
        folder.read("a")


@pytest.mark.parametrize("bit", range(0, 8 * 60, 41))
def test_every_bit_of_a_checkpoint_counts(bit, tmp_path):
    folder = DiskFolder(tmp_path)
    folder.write("a", (STATE, STATE.to(torch.float32)))
    data = bytearray((folder.path / "a").read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (folder.path / "a").write_bytes(data)
    with pytest.raises(pnode.CheckpointError, match="damaged"):
        folder.read("a")


# ------------------------------------------------------------------------------------- the problem


class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(2, dtype=torch.float64), persistent=False)
        self.power, self.table = 1, np.ones(2)
        self.child = torch.nn.Dropout(0.0)

    def forward(self, t, y):
        return -self.scale * y**self.power + self.shift


class Stop(Exception):
    pass


def stopped(function, folder, stop, **keywords):
    """Solve with a name, up to a time."""

    def monitor(step, t, y):
        if t > stop:
            raise Stop

    keywords = {"method": "rk4", "step_size": 0.02, **keywords}
    function = () if function is None else (function,)
    solver = pnode.Solver(
        *function, monitor=monitor,
        checkpointing=pnode.Checkpointing(memory=1920, disk=folder, resume="run"), **keywords,
    )  # fmt: skip
    return solver(STATE.clone().requires_grad_(), T)


def set_buffer(field):
    field.scale.mul_(1.0 + 1e-15)


def set_attribute(field):
    field.power = 2


def set_hidden(field):
    field.shift = torch.full((2,), 1e-300, dtype=torch.float64)


def set_array(field):
    field.table[1] = 2.0


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (set_buffer, "f.scale"), (set_hidden, "f.shift"), (set_attribute, "f.power"),
        (set_array, "f.table"), (lambda field: field.child.eval(), "f.child.training"),
    ],
)  # fmt: skip
def test_what_a_module_holds_is_compared(act, name, tmp_path):
    field = Field()
    with pytest.raises(Stop):
        stopped(field, tmp_path, 0.7)
    act(field)
    with pytest.raises(pnode.CheckpointError, match=f"{name} differ"):
        stopped(field, tmp_path, 2.0)
    assert stopped(Field(), tmp_path, 2.0).stats.rhs < 4 * 49


def test_a_mass_matrix_is_compared(tmp_path):
    mass = torch.eye(2, dtype=torch.float64) * 2.0

    def solve(stop):
        return stopped(lambda t, y: -y, tmp_path, stop, method="cn", mass=mass)

    with pytest.raises(Stop):
        solve(0.7)
    mass[0, 1] = 1e-9
    with pytest.raises(pnode.CheckpointError, match=r"mass\['values'\]"):
        solve(2.0)
    mass[0, 1] = 0.0
    assert solve(2.0).stats.rhs > 0


def test_tolerances_are_compared_to_the_last_bit(tmp_path):
    atol = torch.full((2,), 1e-9, dtype=torch.float64)

    def solve(stop):
        keywords = {"method": "dopri5", "step_size": None, "rtol": 1e-9, "atol": atol}
        return stopped(lambda t, y: -y, tmp_path, stop, **keywords)

    with pytest.raises(Stop):
        solve(0.7)
    atol[1] *= 1.0 + 1e-9  # which a printed tensor does not show
    with pytest.raises(pnode.CheckpointError, match=r"steps\['atol'\] differ"):
        solve(2.0)


@pytest.mark.parametrize("form", ["imex", "residual"])
def test_constants_of_other_forms_are_compared(form, tmp_path):
    rates = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def explicit(t, y):
        return -rates * y

    def solve(stop):
        if form == "imex":
            keywords = {"implicit": lambda t, y: -y, "explicit": explicit, "method": "ars122"}
        else:
            keywords = {"residual": lambda t, y, v: v + rates * y, "method": "beuler"}
        return stopped(None, tmp_path, stop, **keywords)

    with pytest.raises(Stop):
        solve(0.7)
    rates[1] = 2.5
    with pytest.raises(pnode.CheckpointError, match="rates differ"):
        solve(2.0)


RATE = torch.tensor(1.0)


class Slotted:
    __slots__ = ("k",)

    def __init__(self, k):
        self.k = k

    def __call__(self, t, y):
        return -self.k * y

    def method(self, t, y):
        return self(t, y)


def with_default(k):
    return lambda t, y, k=k: -k * y


def with_keyword(k):
    def f(t, y, *, k=k):
        return -k * y

    return f


def with_global(k):
    global RATE
    RATE = k
    return lambda t, y: -RATE * y


def with_dictionary(k):
    u = {"u": [k, (1, {2, 3})]}
    return lambda t, y: -u["u"][0] * y


def with_inner(k):
    def g(y):
        return k * y

    return lambda t, y: (lambda: -g(y))()


def with_namespace(k):
    u = types.SimpleNamespace(k=k, more=argparse.Namespace(a=1))
    return lambda t, y: -u.k * y


def with_code(k):
    return (lambda t, y: -y) if float(k) == 1.0 else (lambda t, y: -2.0 * y)


KINDS = [
    lambda k: lambda t, y: -k * y,
    lambda k: functools.partial(lambda k, t, y: -k * y, k),
    lambda k: functools.partial(lambda t, y, k: -k * y, k=k),
    lambda k: Slotted(k),
    lambda k: Slotted(k).method,
    with_default, with_keyword, with_global, with_dictionary, with_inner, with_namespace, with_code,
]  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    "values",
    [
        (1.0, 1.0 + 2e-16), (torch.ones(()), torch.ones(()).double()),
        (np.ones(1), np.ones(1) * 2), (torch.eye(2).to_sparse(), 2 * torch.eye(2).to_sparse()),
        (torch.ones(2, dtype=torch.complex128), 1j * torch.ones(2, dtype=torch.complex128)),
    ],
)  # fmt: skip
def test_constants_are_found(make, values):
    if make is with_code:
        values = (1.0, 2.0)
    first, again, other = (describe("f", make(k)) for k in (values[0], values[0], values[1]))
    assert first == again
    assert first != other


def test_the_same_problem_in_another_process():
    """Nothing of an address, an order of hashing or a place in memory."""
    program = (
        "import torch, json\n"
        "from pnode.adjoint.identity import describe\n"
        "net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())\n"
        "torch.nn.init.ones_(net[0].weight), torch.nn.init.ones_(net[0].bias)\n"
        "u = {'names': {'a', 'b', 'c'}, 'object': object(), 'log': __import__('logging').root}\n"
        "u['self'] = u\n"
        "@torch.no_grad()\n"
        "def f(t, y): return net(y) * len(u) if y.sum() not in {'x', 'y', 'z'} else y\n"
        "print(json.dumps(describe('f', f)))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


def test_the_gradient_after_damage_was_removed(tmp_path):
    """A damaged checkpoint shows in the backward sweep too; the name serves again afterwards."""
    with pytest.raises(Stop):
        stopped(Field(), tmp_path, 0.7)
    path = tmp_path / "pnode-run"
    (path / "stages-3").write_bytes(b"nothing")
    solution = stopped(Field(), tmp_path, 2.0)
    with pytest.raises(pnode.CheckpointError, match=r"stages-3 is damaged.*remove the folder"):
        solution.ys.sum().backward()
    del solution
    gc.collect()
    if path.exists():
        subprocess.run(["rm", "-r", str(path)], check=True)
    y0 = STATE.clone().requires_grad_()
    solver = pnode.Solver(
        Field(), method="rk4", step_size=0.02,
        checkpointing=pnode.Checkpointing(memory=1920, disk=tmp_path, resume="run"),
    )  # fmt: skip
    (found,) = torch.autograd.grad(solver(y0, T).ys.sum(), y0)
    free = pnode.Solver(Field(), method="rk4", step_size=0.02)
    (expected,) = torch.autograd.grad(free(y0, T).ys.sum(), y0)
    assert torch.equal(found, expected)
    assert list(tmp_path.iterdir()) == []
