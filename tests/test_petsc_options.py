"""PETSc's options: the dictionary of one solver, the command line, start-up and logging."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import pnode
from pnode.options import PETSc

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
        done = subprocess.run(
            [sys.executable, str(path), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | environment,
            check=False,
        )
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
