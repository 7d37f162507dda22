"""Memory: nothing is left behind by a solve, and checkpoints take what they should."""

from __future__ import annotations

import gc
import re
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from children import run_program

import pnode

D = torch.float64
ROOT = Path(__file__).resolve().parent.parent

# What one solve may leave behind on average: less than a PETSc vector with its header, let alone a
# TS. PETSc itself keeps about 0.5 KiB of each new options prefix (odeint); the rest is how far the
# allocator wanders.
ALLOWED_EACH, ALLOWED_ANYHOW = 1536, 2**20
LOOP = """
import gc, os, sys, torch, pnode
torch.set_num_threads(1)
weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
t = torch.tensor([0.0, 0.1], dtype=torch.float64)
def field(t, y):
    return -weight * y
def use(ys):
    ys.sum().backward()
def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
{setup}
def many(number):
    for _ in range(number):
        y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
        {body}
many(700)  # by then "auto" has compiled what it does, which stays
before = resident()
many({number})
print('grown by', resident() - before, flush=True)
"""
FIXED = "params=[weight], step_size=0.1"
VARIETY_SETUP = f"""
solver = pnode.Solver(field, method="rk4", {FIXED})
others = [pnode.Solver(field, method="cn", jacobian="matrix-free", {FIXED}),
          pnode.Solver(field, params=[weight], method="bosh3", rtol=1e-2)]
broken = pnode.Solver(lambda t, y: 1 / 0, method="rk4", {FIXED})
sizes = iter(range(10**9))
"""
VARIETY = """
        for other in others:
            use(other(y0, t).ys)
        solver(y0, t)
        with torch.no_grad():
            solver(y0, t)
        ys = solver(y0, t).ys
        ys.sum().backward(retain_graph=True)
        use(ys)
        torch.autograd.grad(solver(y0, t).ys.sum(), y0, create_graph=True)
        y0 = torch.ones(1 + next(sizes) % 9, dtype=torch.float64, requires_grad=True)
        use(solver(y0, t).ys)
        try:
            broken(y0, t)
        except ZeroDivisionError:
            pass
"""
LOOPS = {
    "solver-explicit": (
        2000, f"solver = pnode.Solver(field, method='rk4', {FIXED})", "use(solver(y0, t).ys)"
    ),
    "solver-implicit": (
        2000, f"solver = pnode.Solver(field, method='cn', {FIXED})", "use(solver(y0, t).ys)"
    ),
    "odeint-explicit": (1000, "", f"use(pnode.odeint(field, y0, t, method='rk4', {FIXED}))"),
    "odeint-implicit": (2000, "", f"use(pnode.odeint(field, y0, t, method='cn', {FIXED}))"),
    "variety": (500, VARIETY_SETUP, VARIETY),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LOOPS))
def test_resident_memory_stays_flat(name, tmp_path):
    number, setup, body = LOOPS[name]
    script = LOOP
    for slot, text in {"{setup}": setup, "{body}": body, "{number}": str(number)}.items():
        script = script.replace(slot, text)
    program = tmp_path / "program.py"
    program.write_text(script)
    # One arena that gives freed memory back soon: growth is then what is still referred to.
    arena = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = run_program(program, timeout=300, started_with=arena)
    assert done.returncode == 0, done.stderr
    grown = int(re.search(r"grown by (-?\d+)", done.stdout)[1])
    assert grown < ALLOWED_ANYHOW + ALLOWED_EACH * number


def test_petsc_objects_are_freed(tmp_path):
    """-log_view counts creations and destructions of every class: all but a few must go."""
    script = textwrap.dedent("""
    import torch, pnode
    t = torch.tensor([0.0, 0.1], dtype=torch.float64)
    for number in range(30):
        for keywords in ({"method": "rk4"}, {"method": "cn"},
                         {"method": "cn", "jacobian": "matrix-free"}):
            y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
            pnode.odeint(lambda t, y: -y, y0, t, step_size=0.1, **keywords).sum().backward()
    """)
    program = tmp_path / "program.py"
    program.write_text(script)
    done = run_program(program, ["-log_view"])
    assert done.returncode == 0, done.stderr
    created, destroyed = {}, {}
    for line in done.stdout.split("Object Type")[1].splitlines():
        words = line.split()
        if len(words) >= 3 and words[-1].isdigit() and words[-2].isdigit():
            name = " ".join(words[:-2])
            created[name] = created.get(name, 0) + int(words[-2])
            destroyed[name] = destroyed.get(name, 0) + int(words[-1])
    assert created["TS"] >= 90
    for name, number in created.items():
        assert number - destroyed[name] <= 10, name


class Marked(torch.nn.Module):
    """A field that can be watched being freed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3, dtype=D))

    def forward(self, t, y):
        return -self.weight * y


KINDS = {
    "rk4": {"method": "rk4", "step_size": 0.1},
    "dopri5": {"method": "dopri5"},
    "cn": {"method": "cn", "step_size": 0.1},
    "cn-matrix-free": {"method": "cn", "step_size": 0.1, "jacobian": "matrix-free"},
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def times():
    return torch.tensor([0.0, 0.5, 1.0], dtype=D)


def state(size=3):
    return torch.linspace(0.1, 1.0, size, dtype=D).requires_grad_()


@pytest.fixture
def no_collector():
    """Only reference counts free memory: what a cycle keeps alive is kept too long."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@every_kind
def test_field_is_freed_with_the_last_result(kind, backward):
    field = Marked()
    watched = weakref.ref(field)
    ys = pnode.odeint(field, state(), times(), **KINDS[kind])
    if backward:
        ys.sum().backward()
    del field, ys
    assert watched() is None


@pytest.mark.usefixtures("no_collector")
@every_kind
def test_idle_solver_keeps_no_tensor_of_a_call(kind):
    kept = []

    def field(t, y):
        kept.append(weakref.ref(y))
        return -y

    solver = pnode.Solver(field, **KINDS[kind])
    y0 = state()
    watched = weakref.ref(y0)
    ys = solver(y0, times()).ys
    ys.sum().backward()
    del y0, ys
    assert watched() is None
    assert all(reference() is None for reference in kept)


@pytest.mark.usefixtures("no_collector")
@every_kind
def test_trajectory_is_freed_with_the_output(kind):
    solver = pnode.Solver(Marked(), **KINDS[kind])
    solution = solver(state(1000), times())
    node = solution.ys.grad_fn
    while node is not None and "Solve" not in type(node).__name__:
        node = node.next_functions[0][0]
    assert node is not None
    watched = weakref.ref(node.runs.only().sweep.trajectory)
    assert watched() is not None
    del node, solution
    assert watched() is None


@pytest.mark.usefixtures("no_collector")
@every_kind
def test_backward_frees_the_checkpoints(kind):
    solution = pnode.Solver(Marked(), **KINDS[kind])(state(), times())
    node = solution.ys.grad_fn
    while "Solve" not in type(node).__name__:
        node = node.next_functions[0][0]
    trajectory = node.runs.only().sweep.trajectory
    assert trajectory.ready and node.runs.only().ys is not None
    assert ("stages", 0) in trajectory._store
    solution.ys.sum().backward()
    assert not trajectory.ready and node.runs.only().ys is None
    assert ("stages", 0) not in trajectory._store
    assert trajectory._store._ram.bytes == 0


@pytest.mark.usefixtures("no_collector")
@every_kind
def test_failed_solve_keeps_nothing_but_its_exception(kind):
    class Token:
        pass

    token = Token()
    watched = weakref.ref(token)

    def field(t, y, token=token):
        if t > 0.3:
            raise ValueError
        return -y

    solver = pnode.Solver(field, **KINDS[kind])
    try:
        solver(state(), times())
    except ValueError:
        pass
    del field, solver, token
    assert watched() is None


# What is really held, beside the ledger: with every object of Python in it, and deterministic.

HELD = """
import ctypes, gc, sys, torch, pnode
sys.path.insert(0, sys.argv[4])
from growth import allocated
weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
method, memory, steps = sys.argv[1], sys.argv[2], int(sys.argv[5])
solver = pnode.Solver(
    lambda t, y: -weight * torch.sin(y), params=[weight], method=method, step_size=1 / steps,
    checkpointing=pnode.Checkpointing(memory=memory, store=sys.argv[3]),
)
y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
solver(y0, torch.tensor([0.0, 0.01], dtype=torch.float64)).ys.sum().backward()
solver(y0, torch.tensor([0.0, 1.0], dtype=torch.float64))  # what a process holds once, it holds now
gc.collect()
before = allocated()
solution = solver(y0, torch.tensor([0.0, 1.0], dtype=torch.float64))
gc.collect()
stats = solution.stats
assert stats.steps == steps
print("held", allocated() - before, stats.ram_bytes)
if method == "rk4":  # repeating implicit steps takes long, and nothing is measured of it
    solution.ys.sum().backward()
"""
#: Bytes a step that docs/checkpointing.md says are held beside the ledger; once a sweep it allows
#: 128 kB, of which so few steps get a share, so that what each of them holds counts as much.
BESIDE_EACH, BESIDE, STEPS = 800, 2**15, 500


@pytest.mark.parametrize("memory", ["5kB", "1MB"])
@pytest.mark.parametrize("method", ["rk4", "cn", "bdf2", "ra34pw2"])
def test_what_a_budget_really_holds_of_a_small_state(method, memory, tmp_path):
    if method == "bdf2" and memory == "5kB":
        memory = "17kB"  # it keeps every step
    store = "stages" if memory == "1MB" else "auto"
    program = tmp_path / "program.py"
    program.write_text(HELD)
    arguments = [method, memory, store, str(ROOT / "benchmarks"), str(STEPS)]
    done = run_program(program, arguments, timeout=300, started_with={"PYTHONMALLOC": "malloc"})
    assert done.returncode == 0, done.stderr
    held, ledger = map(int, re.search(r"held (-?\d+) (\d+)", done.stdout).groups())
    assert held > 0
    assert held <= ledger + BESIDE_EACH * STEPS + BESIDE


# What is stored.

STAGES = {
    "euler": 1, "heun2": 2, "midpoint": 2, "fehlberg2": 3, "rk3": 3, "bosh3": 3, "rk4": 4,
    "fehlberg5": 6, "dopri5": 6, "bosh5": 7, "verner6": 8, "verner7": 10, "verner8": 13,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("method", list(STAGES))
def test_stored_bytes_of_explicit_methods(method, size, dtype):
    y0 = torch.linspace(0.1, 1.0, size, dtype=dtype).requires_grad_()
    stats = pnode.Solver(Marked().to(dtype), method=method, step_size=0.1)(y0, times()).stats
    assert stats.steps == 10
    assert stats.ram_bytes == STAGES[method] * stats.steps * size * y0.element_size()


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize(
    ("method", "states"), [("cn", lambda n: n + 1), ("implicit_midpoint", lambda n: n)]
)
def test_stored_bytes_of_implicit_methods(method, states, size):
    stats = pnode.Solver(Marked(), method=method, step_size=0.1)(state(size), times()).stats
    assert stats.ram_bytes == states(stats.steps) * size * 8


def test_stored_bytes_do_not_count_twice():
    y0 = state()
    solution = pnode.Solver(Marked(), method="rk4", step_size=0.1)(y0, times())
    stored = solution.stats.ram_bytes
    loss = solution.ys.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert stored == solution.stats.ram_bytes == 4 * 10 * 3 * 8


DETECTION = """
import resource, torch, pnode
torch.set_num_threads(1)
def field(t, y):
    inside = torch.nn.functional.pad(y, (1, 1))
    return inside[2:] - 2.0 * y + inside[:-2] - y**3
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.no_grad():
    for cells in (1000, 5000):
        before = peak()
        solver = pnode.Solver(field, method="rosw_theta1", jacobian="sparse", step_size=0.1,
                              compile=False)
        solver(torch.ones(cells, dtype=torch.float64), [0.0, 0.1])
print('grown by', peak() - before, flush=True)
"""


def test_detection_of_a_pattern_takes_no_dense_jacobian(tmp_path):
    """It looks at blocks of 8 MiB, some at a time; a Jacobian is 200 MB, and more was taken."""
    program = tmp_path / "program.py"
    program.write_text(DETECTION)
    done = run_program(program)
    assert done.returncode == 0, done.stderr
    grown = int(re.search(r"grown by (\d+)", done.stdout)[1])
    assert grown < 5000**2 * 8
