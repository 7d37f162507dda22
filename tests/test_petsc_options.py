"""PETSc's options: the dictionary of one solver, the command line, start-up and logging."""

from __future__ import annotations

import copy
import os
import pickle
import re
import tempfile
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from children import run_program

import pnode
from pnode.base.options import PETSc, SolverOptions

CN = {"method": "cn", "step_size": 0.25}


def decay(t, y):
    return -y


def cubic(t, y):
    return -(y**3) + torch.roll(y, 1)


def state(grad=False):
    return torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64, requires_grad=grad)


def times():
    return torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


def solve(solver):
    y0 = state(grad=True)
    solution = solver(y0, times())
    solution.ys[-1].sum().backward()
    return solution, y0.grad


def run(script, *arguments, first="", **environment):
    """Run a script in a process of its own and return what it printed."""
    prelude = """
    import torch, pnode
    def solve(solver, grad=True):
        y0 = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64, requires_grad=grad)
        solution = solver(y0, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
        if grad:
            solution.ys[-1].sum().backward()
        return solution
    def field(t, y):
        return -y**3 + torch.roll(y, 1)
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text("\n".join((first, textwrap.dedent(prelude), textwrap.dedent(script))))
        done = run_program(path, arguments, os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# The dictionary.


def test_dictionary_works_for_one_solver_and_leaks_into_no_other():
    before = PETSc.Options().getAll()
    tight = pnode.Solver(cubic, petsc_options={"snes_rtol": 1e-14, "snes_stol": 0.0}, **CN)
    loose = pnode.Solver(cubic, petsc_options={"snes_rtol": 1e-1, "snes_stol": 0.0}, **CN)
    plain = pnode.Solver(cubic, **CN)
    alone, _ = solve(plain)
    counts = [solve(solver)[0].stats.newton for solver in (tight, loose, plain, loose, tight)]
    assert counts[0] == counts[4] > counts[2] == alone.stats.newton > counts[1] == counts[3]
    assert PETSc.Options().getAll() == before


def test_failing_solve_leaves_no_options_behind():
    before = PETSc.Options().getAll()
    with pytest.raises(pnode.SolveError):
        pnode.Solver(
            cubic, jacobian="matrix-free", petsc_options={"ksp_max_it": 1, "snes_max_it": 1}, **CN
        )(state(), times())
    with pytest.raises(pnode.ConfigurationError):
        pnode.Solver(cubic, petsc_options={"ts_type": "rk"}, **CN)(state(), times())
    assert PETSc.Options().getAll() == before


def test_what_a_sweep_has_inserted_is_of_no_command_line():
    """Integrators of trial steps are made while their sweep's options are in force."""
    kinds = "basic", "none"
    first, second = (SolverOptions("pnode_own_", {}, {"ts_adapt_type": kind}) for kind in kinds)
    with first.inserted():
        again = SolverOptions("pnode_own_", {}, {"ts_adapt_type": "none"})
        assert PETSc.Options("pnode_own_")["ts_adapt_type"] == "basic"
    assert again.values == second.values == {"ts_adapt_type": "none"}
    assert "ts_adapt_type" not in PETSc.Options("pnode_own_").getAll()


def test_dictionary_of_a_module_copy_is_its_own():
    options = {"snes_rtol": 1e-14, "snes_stol": 0.0}
    solver = pnode.Solver(cubic, petsc_options=options, **CN)
    expected = solve(solver)[0].stats.newton
    options["snes_rtol"] = 1e-1
    assert solve(solver)[0].stats.newton == expected


def test_nested_dictionary():
    flat, _ = solve(
        pnode.Solver(cubic, petsc_options={"ksp_type": "bcgs", "pc_type": "none"}, **CN)
    )
    nested, _ = solve(
        pnode.Solver(cubic, petsc_options={"ksp": {"type": "bcgs"}, "pc": {"type": "none"}}, **CN)
    )
    assert torch.equal(flat.ys, nested.ys) and flat.stats.krylov == nested.stats.krylov


@pytest.mark.parametrize("linear_solver", ["gmres", "bcgs", "lu", {"ksp_type": "fgmres"}])
@pytest.mark.parametrize("jacobian", ["dense", "matrix-free"])
def test_linear_solver_changes_no_digit_that_matters(linear_solver, jacobian):
    if (linear_solver, jacobian) == ("lu", "matrix-free"):
        with pytest.raises(pnode.PnodeError):
            solve(pnode.Solver(cubic, jacobian=jacobian, linear_solver=linear_solver, **CN))
        return
    reference, gradient = solve(pnode.Solver(cubic, **CN))
    solution, other = solve(
        pnode.Solver(cubic, jacobian=jacobian, linear_solver=linear_solver, **CN)
    )
    torch.testing.assert_close(solution.ys, reference.ys, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(other, gradient, rtol=1e-6, atol=1e-8)


def test_options_of_an_inner_preconditioner_are_used():
    # PETSc creates the blocks' solvers, and reads their options, in the first solve.
    options = {"ksp_type": "gmres", "pc_type": "bjacobi", "sub_pc_type": "lu",
               "sub_ksp_type": "preonly"}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution, gradient = solve(pnode.Solver(cubic, petsc_options=options, **CN))
    reference, expected = solve(pnode.Solver(cubic, **CN))
    torch.testing.assert_close(solution.ys, reference.ys, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
    assert solution.stats.krylov == solution.stats.newton


def test_unused_option_warns_once():
    solver = pnode.Solver(decay, petsc_options={"snes_rotl": 1e-3, "snes_rtol": 1e-9}, **CN)
    with pytest.warns(UserWarning, match="'snes_rotl'") as caught:
        solve(solver)
        solve(solver)
    assert len(caught) == 1


@pytest.mark.parametrize("key", ["-ksp_type", "--ksp_type", "ksp type", ""])
def test_key_that_is_no_option_name_is_refused(key):
    with pytest.raises(pnode.ConfigurationError, match="petsc_options") as info:
        pnode.Solver(decay, petsc_options={key: "gmres"}, **CN)
    assert repr(key) in str(info.value)


@pytest.mark.parametrize(
    ("method", "options"),
    [("cn", {"ts_type": "beuler"}), ("rk4", {"ts_type": "cn"}), ("rk4", {"ts_rk_type": "5dp"})],
)
def test_option_that_changes_the_method_is_refused(method, options):
    solver = pnode.Solver(decay, method=method, step_size=0.1, petsc_options=options)
    for _ in range(2):
        with pytest.raises(pnode.ConfigurationError, match=f"method='{method}'") as info:
            solver(state(), times())
    assert next(iter(options)) in str(info.value)


@pytest.mark.parametrize(
    "options",
    [{"ksp_type": "nonsense"}, {"pc_type": "nonsense"}, {"snes_max_it": "many"}],
    ids=lambda options: next(iter(options)),
)
def test_unusable_value_is_a_configuration_error(options):
    with pytest.raises(pnode.ConfigurationError, match=next(iter(options.values()))):
        pnode.Solver(decay, petsc_options=options, **CN)(state(), times())


@pytest.mark.parametrize(
    "options",
    [{"ts_max_snes_failures": -1}, {"ts_max_snes_failures": 10}, {"ts_max_step_rejections": 10},
     {"ts_max_snes_failures": -1, "ts_max_step_rejections": 50}],
    ids=lambda options: "-".join(map(str, options.values())),
)  # fmt: skip
def test_no_option_makes_petsc_shrink_a_step_behind_the_sweep(options):
    """After a failed Newton solve PETSc would take a shorter step, which is not the one noted."""

    def wiggle(t, y):
        return 40.0 * torch.sin(5.0 * y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((pnode.NonlinearSolveFailed, pnode.ConfigurationError)):
            pnode.Solver(
                wiggle, method="cn", step_size=0.5, petsc_options={"snes_max_it": 3} | options
            )(state(), times())


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "cn"])
def test_more_rejections_do_not_lose_steps(method):
    def field(t, y):
        return torch.where(t < 0.5, -y, -20.0 * y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ys = pnode.Solver(
                field, method=method, petsc_options={"ts_max_step_rejections": 10}
            )(state(), times()).ys  # fmt: skip
        except pnode.ConfigurationError:
            return
    expected = state() * torch.exp(torch.tensor(-10.5, dtype=torch.float64))
    torch.testing.assert_close(ys[-1], expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"),
    [("ts_monitor_solution_vtk", "f-%03d.vts"), ("ts_monitor_solution", "vtk:f.vts"),
     ("snes_monitor_solution", "vtk:f.vtu"), ("ts_monitor_error", None),
     ("ts_monitor_sp_swarm", None), ("ts_monitor_envelope", None), ("ts_adjoint_monitor", None),
     ("ts_trajectory_type", "memory"), ("ts_view_solution", None),
     ("ts_monitor_solution_interval", "-1")],
    ids=str,
)  # fmt: skip
def test_monitor_that_would_show_nothing_or_something_wrong_is_refused(option, value):
    solver = pnode.Solver(decay, petsc_options={option: value}, **CN)
    with pytest.raises(pnode.ConfigurationError, match=f"'{option}' is not for pnode: ."):
        solver(state(), times())


def test_refused_option_says_why_first():
    with pytest.raises(pnode.ConfigurationError) as info:
        pnode.Solver(decay, petsc_options={"ksp_type": "nonsense"}, **CN)(state(), times())
    message = str(info.value)
    assert message.index("nonsense") < message.index("snes_rtol") and "() at" not in message


@pytest.mark.parametrize(
    ("given", "meant"), [("snes_rotl", "snes_rtol"), ("ksp_typ", "ksp_type"), ("ts_montior", "ts_")]
)
def test_nearest_option_is_named(given, meant):
    solver = pnode.Solver(decay, petsc_options={given: "1"}, **CN)
    with pytest.warns(UserWarning, match=f"'{given}'.* did you mean '{meant}"):
        solve(solver)


@pytest.mark.parametrize("method", ["cn", "es325", "rk4", "dopri5", "bdf", "rodaspr"])
def test_file_of_a_monitor_keeps_the_forward_sweep(method, tmp_path):
    def views():
        return (tmp_path / "f").read_text().count("Vec Object")

    steps = {"cn": 0.1, "rk4": 0.1}.get(method)
    (tmp_path / "f").write_text("from another run")
    solver = pnode.Solver(
        decay, method=method, step_size=steps, rtol=1e-3, checkpointing="1kB",
        petsc_options={"ts_monitor_solution": f"ascii:{tmp_path / 'f'}"},
    )  # fmt: skip
    number = 0
    for size in (3, 3, 2):  # another size, another TS
        y0 = state(grad=True)[:size]
        solution = solver(y0, times())
        number += solution.stats.steps + 1
        assert views() == number
        solution.ys[-1].sum().backward()
        assert views() == number
    assert "another run" not in (tmp_path / "f").read_text()


@pytest.mark.filterwarnings("error:petsc_options")
@pytest.mark.parametrize(
    "steps", [{}, {"method": "cn", "step_size": 0.1}], ids=["adaptive", "fixed"]
)
def test_monitors_do_not_look_at_the_continuous_adjoint(steps, tmp_path):
    def set_up(ts):
        ts.setMonitor(lambda ts, number, time, u: seen.append(number))

    path, seen = tmp_path / "f", []
    solver = pnode.Solver(
        decay, gradient="continuous", petsc_setup=set_up,
        petsc_options={"ts_monitor_solution": f"ascii:{path}", "ts_view": f"ascii:{path}.ts"},
        **steps,
    )  # fmt: skip
    for solves in (1, 2):
        solution = solver(state(grad=True), times())
        solution.ys.sum().backward()
        assert path.read_text().count("Vec Object") == solves * (solution.stats.steps + 1)
        assert len(seen) == solves * (solution.stats.steps + 1)
    assert (tmp_path / "f.ts").read_text().count("TS Object") == 1


def test_binary_file_of_a_monitor_keeps_the_forward_sweep(tmp_path):
    path = tmp_path / "f"
    solver = pnode.Solver(decay, petsc_options={"ts_monitor_solution": f"binary:{path}"}, **CN)
    solution, _ = solve(solver)
    viewer = PETSc.Viewer().createBinary(str(path), "r")
    found = [PETSc.Vec().load(viewer).array.copy() for _ in range(5)]
    viewer.destroy()
    assert (torch.from_numpy(found[4]) == solution.ys[-1]).all()


def test_monitor_that_cannot_write_is_a_solve_error():
    options = {"ts_monitor_solution": "ascii:/dev/full"}
    with pytest.raises(pnode.SolveError, match="monitor") as info:
        pnode.Solver(decay, petsc_options=options, **CN)(state(), times())
    assert info.value.method == "cn"


def test_numbers_go_to_solvers_alone():
    first = pnode.Solver(decay, **CN)
    number = int(first.options_prefix.split("_")[1])
    pnode.odeint(decay, state(), times(), method="cn", options={"step_size": 0.5})
    pnode.odeint_adjoint(decay, state(), times(), method="es325")
    with pytest.raises(pnode.ConfigurationError):
        pnode.Solver(decay, event_tol=2.0, **CN)
    with pytest.raises(pnode.ConfigurationError):
        pnode.Solver(decay, petsc_options={"-x": 1}, **CN)
    pickled = pickle.dumps(first)
    copies = [copy.deepcopy(first), pickle.loads(pickled), pnode.Solver(decay, **CN)]
    found = [solver.options_prefix for solver in copies]
    assert found == [f"pnode_{number + more}_" for more in (1, 2, 3)]
    for solver in copies:
        solve(solver)


# The command line.

TWO_SOLVERS = """
first = pnode.Solver(field, method="cn", step_size=0.25)
second = pnode.Solver(field, method="cn", step_size=0.25, petsc_options={OPTIONS})
for name, solver in (("second", second), ("first", first), ("second", second), ("first", first)):
    print("solver", name, flush=True)
    stats = solve(solver).stats
    print("krylov", stats.krylov, stats.backward.krylov, flush=True)
"""


def by_solver(text):
    """Return what was printed for each solver in turn."""
    parts = {"first": [], "second": []}
    for block in re.split("^solver ", text, flags=re.MULTILINE)[1:]:
        name, _, rest = block.partition("\n")
        parts[name].append(rest)
    return parts


def two_solvers(*arguments, options=None):
    done = run(TWO_SOLVERS.replace("{OPTIONS}", repr(options)), *arguments)
    return by_solver(done.stdout)


def test_monitors_from_the_command_line_reach_every_solver():
    parts = two_solvers("-pnode_ts_monitor", "-pnode_snes_monitor")
    for blocks in parts.values():
        for block in blocks:
            assert block.count(" TS ") == 5  # the start and four steps
            assert "time 0.25" in block and "time 1." in block
            assert "SNES Function norm" in block


def test_type_from_the_command_line_reaches_both_sweeps():
    done = run(
        'solve(pnode.Solver(field, method="cn", step_size=0.25))',
        "-pnode_ksp_type", "bcgs", "-pnode_pc_type", "none", "-pnode_ksp_view",
    )  # fmt: skip
    assert done.stdout.count("type: bcgs") >= 8  # four steps forward, four back
    assert "type: preonly" not in done.stdout


def test_numbered_option_reaches_one_solver_in_both_sweeps():
    # Solvers are numbered as they are made, whichever is used first.
    for number, name, other in ((0, "first", "second"), (1, "second", "first")):
        parts = two_solvers(f"-pnode_{number}_ksp_converged_reason")
        for block in parts[name]:
            assert block.count("Linear") >= 8
        for block in parts[other]:
            assert "Linear" not in block


def test_command_line_wins_over_the_dictionary_and_the_number_over_both():
    options = {"ksp_type": "gmres", "pc_type": "none"}
    arguments = ("-pnode_ksp_view", "-pnode_pc_type", "none")
    parts = two_solvers(
        *arguments, "-pnode_ksp_type", "bcgs", "-pnode_1_ksp_type", "tfqmr", options=options
    )
    assert all("type: bcgs" in block for block in parts["first"])
    assert all("type: tfqmr" in block for block in parts["second"])
    parts = two_solvers(*arguments, "-pnode_ksp_type", "bcgs", options=options)
    assert all("type: bcgs" in block for block in parts["second"])


def test_method_cannot_be_changed_from_the_command_line():
    done = run(
        """
        try:
            solve(pnode.Solver(field, method="cn", step_size=0.25))
        except pnode.ConfigurationError as error:
            print("refused:", error)
        """,
        "-pnode_ts_type", "beuler",
    )  # fmt: skip
    assert "refused: the option ts_type='beuler'" in done.stdout


def test_log_view_names_the_stages_and_events():
    done = run(
        """
        solve(pnode.Solver(field, method="cn", step_size=0.25, jacobian="matrix-free"))
        solve(pnode.Solver(field, method="rk4", step_size=0.25))
        """,
        "-log_view",
    )
    rows = run('solve(pnode.Solver(lambda t, y: -(y**3), samples="independent"))', "-log_view")
    assert "pnode forward" in rows.stdout and "pnode adjoint" in rows.stdout
    for name in ("pnode forward", "pnode adjoint", "pnode rhs", "pnode vjp", "pnode jvp"):
        assert name in done.stdout


def test_log_stages_survive_failures():
    done = run(
        """
        def boom(t, y):
            if t > 0.3:
                raise ValueError
            return field(t, y)
        solver = pnode.Solver(boom, method="rk4", step_size=0.25)
        for _ in range(3):
            try:
                solve(solver)
            except ValueError:
                print("raised")
        solve(pnode.Solver(field, method="rk4", step_size=0.25))
        """,
        "-log_view",
    )
    assert done.stdout.count("raised") == 3 and "pnode adjoint" in done.stdout


def test_options_that_nobody_reads_are_told_once():
    done = run(
        """
        for method in ("cn", "rk4"):
            for _ in range(2):
                solve(pnode.Solver(field, method=method, step_size=0.5))
        pnode.odeint(field, torch.ones(2), torch.tensor([0.0, 1.0]), options={"step_size": 0.5})
        """,
        "-pnode_snes_rotl", "1e-9", "-pnode_snes_atol", "1e-9", "-pnode_1_ksp_tpye", "preonly",
        "-pnode_odeint_ts_montior", "-pnode_9_snes_rtol", "1e-9", "-pnode_ksp_bcgsl_ell", "7",
        PETSC_OPTIONS="-pnode_pc_tpye lu",
    )  # fmt: skip
    for given, meant in (
        ("pnode_snes_rotl", "snes_rtol"), ("pnode_1_ksp_tpye", "ksp_type"),
        ("pnode_odeint_ts_montior", "ts_monitor"), ("pnode_pc_tpye", "pc_type"),
    ):  # fmt: skip
        assert done.stderr.count(f"-{given} was not used: did you mean '{meant}") == 1
    last = "no solver has used -pnode_9_snes_rtol, -pnode_ksp_bcgsl_ell"
    assert done.stderr.count(last) == 1
    assert done.stderr.count("Warning") == 5 and "snes_atol" not in done.stderr
    assert "WARNING" not in done.stdout + done.stderr


@pytest.mark.parametrize("prefix", ["-pnode_", "-pnode_0_"])
def test_file_of_the_command_line_keeps_the_forward_sweep(prefix, tmp_path):
    done = run(
        """
        from pnode.base.options import PETSc
        import sys
        before = PETSc.Options().getAll()
        solver = pnode.Solver(field, method="es325", checkpointing=500)
        for _ in range(2):
            solve(solver)
            print(solver(torch.ones(2), torch.tensor([0.0, 1.0])).stats.steps, end=" ")
        print(PETSc.Options().getAll() == before)
        """,
        f"{prefix}ts_monitor", f"ascii:{tmp_path / 'f'}",
    )  # fmt: skip
    *steps, same = done.stdout.split()
    text = (tmp_path / "f").read_text()
    assert same == "True" and len(steps) == 2
    assert text.count(" time 0.\n") == text.count(" time 1.\n") == 4


# Signals.

SIGNALS = """
import faulthandler, os, signal, sys, tempfile
got = []
names = "SIGHUP SIGINT SIGQUIT SIGTERM SIGPIPE SIGUSR1 SIGFPE SIGSEGV SIGBUS SIGILL".split()
own = names if "own" in sys.argv else []
for name in own:
    signal.signal(getattr(signal, name), lambda number, frame: got.append(number))
"""


def test_signal_handlers_of_the_program_stay():
    done = run(
        """
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))
        solve(pnode.Solver(field, method="cn", step_size=0.5))
        print([name for name in names if getattr(signal, name) not in got])
        """,
        "own", first=SIGNALS,
    )  # fmt: skip
    assert done.stdout == "[]\n"


def test_signals_without_a_handler_do_what_they_do_in_python():
    done = run(
        """
        ends = os.pipe()
        os.close(ends[0])
        try:
            os.write(ends[1], b"x")
        except BrokenPipeError:
            print("exception", flush=True)
        for name in ("SIGHUP", "SIGTERM", "SIGSEGV", "SIGFPE", "SIGPIPE", "SIGINT"):
            child = os.fork()
            if child == 0:
                try:
                    os.kill(os.getpid(), getattr(signal, name))
                    os._exit(3)
                except KeyboardInterrupt:
                    os._exit(4)
            status = os.waitpid(child, 0)[1]
            print(name, os.waitstatus_to_exitcode(status), flush=True)
        """,
        # Whoever runs the tests may have told their processes to ignore these.
        first=SIGNALS
        + "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        + "signal.signal(signal.SIGINT, signal.default_int_handler)\n",
    )
    assert done.stdout.split() == [
        "exception", "SIGHUP", "-1", "SIGTERM", "-15", "SIGSEGV", "-11", "SIGFPE", "-8",
        "SIGPIPE", "3", "SIGINT", "4",
    ]  # fmt: skip
    assert "PETSC ERROR" not in done.stderr


# The program's own arguments.


@pytest.mark.parametrize("flags", [["-h", "-v"], ["--help", "--version"]])
def test_flags_of_the_program_are_left_to_it(flags):
    done = run('import sys; print("program saw", sys.argv[1:])', *flags)
    assert done.stdout == f"program saw {flags}\n"
    assert done.stderr == ""


def test_arguments_of_the_program_are_not_complained_about():
    done = run(
        'import sys; solve(pnode.Solver(field, method="cn", step_size=0.25)); print(sys.argv[1:])',
        "--epochs", "5", "-o", "file", "-pnode_snes_rtol", "1e-9",
    )  # fmt: skip
    assert "WARNING" not in done.stdout + done.stderr


def test_incomplete_options_do_no_harm():
    done = run(
        'print(solve(pnode.Solver(field, method="rk4", step_size=0.25)).reason)',
        "-pnode_", "-pnode_0_", "-pnode_0", "-pnode",
    )  # fmt: skip
    assert "t_end" in done.stdout


def test_petsc_started_by_the_user():
    done = run(
        'print(solve(pnode.Solver(field, method="cn", step_size=0.5), grad=False).reason)',
        "-pnode_ts_monitor",
        first="import sys, petsc4py; petsc4py.init(sys.argv); from petsc4py import PETSc",
    )
    assert "t_end" in done.stdout
    assert done.stdout.count(" TS ") == 3


@pytest.mark.parametrize("variable", ["PETSC_DIR", "PETSC_ARCH"])
def test_misleading_environment_warns(variable):
    done = run(
        'import os; print(solve(pnode.Solver(field, method="cn", step_size=0.25)).reason, '
        f'os.environ["{variable}"])',
        **{variable: "/nowhere"},
    )
    assert "t_end /nowhere" in done.stdout
    assert "UserWarning" in done.stderr and variable in done.stderr
