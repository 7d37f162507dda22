"""Several ranks: programs of this folder in subprocesses with a hard limit."""

from __future__ import annotations

import pytest
from launch import check, launch

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_with_their_own_batches_average_to_one_gradient(ranks):
    check("program_average_gradient.py", ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ghost_cells_and_their_adjoints(ranks):
    check("program_layouts.py", ranks)


@pytest.mark.parametrize(
    ("ranks", "sections"),
    [
        (1, ("explicit",)),
        (2, ("explicit", "implicit", "taylor", "checkpoints")),
        (3, ("explicit", "checkpoints")),
    ],
)
def test_gradients_over_ranks(ranks, sections):
    check("program_gradients.py", ranks, *sections, limit=400)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_field_that_changes_is_the_same_error_on_all(ranks):
    check("program_field_changed.py", ranks, limit=200)


@pytest.mark.parametrize(
    ("ranks", "sections"),
    [
        (2, ("sweeps", "interrupts", "damaged_files", "mismatches")),
        (3, ("sweeps", "few", "interrupts", "interrupt_before_other_failures", "mismatches")),
    ],
)
def test_failures_on_one_rank_are_errors_on_all(ranks, sections):
    check("program_faults.py", ranks, *sections, limit=400)


def test_states_on_simulated_devices_of_several_ranks():
    check("program_devices.py", 2)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_rank_that_dies_ends_the_job(how):
    run = launch("program_faults.py", 2, "death", how, limit=60)
    assert run.stdout.count("alive") == 2, run.stdout + run.stderr
    assert run.returncode == (3 if how == "exit" else 9)
    assert "ranks" not in run.stdout


def test_solves_do_not_grow_and_sums_of_gradients():
    check("program_lifetime.py", 2, limit=400)
