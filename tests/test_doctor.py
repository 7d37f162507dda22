"""``python -m pnode doctor``: every check with made-up facts, then real runs."""

from __future__ import annotations

import _ctypes
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from launch import mpiexec

from pnode.base.launchers import Claim, claims, find_mismatch, launcher_mismatch
from pnode.cli import asked_for_doctor, main
from pnode.diagnosis import checks
from pnode.diagnosis.checks import MINIMUM
from pnode.diagnosis.facts import Facts, MPIFacts, PETScFacts, ScratchFacts, TorchFacts
from pnode.diagnosis.finding import Finding
from pnode.diagnosis.probe import cpu_quota, mpi_libraries, scratch_facts
from pnode.doctor import examine, merge, report
from pnode.solvers.methods import markdown_table

ROOT = Path(__file__).parents[1]
MPI = MPIFacts("MPICH Version: 5.0.2", size=1, rank=0)
PETSC = PETScFacts((3, 26, 1), folder="/opt/petsc", mpi="MPICH")
TORCH = TorchFacts()
# A healthy machine with two cores.
GOOD = Facts(
    python="3.11.7",
    versions=MINIMUM | {"petsc4py": "3.26.1", "torch": "2.13.0+cpu"},
    mpi=MPI,
    petsc=PETSC,
    torch=TORCH,
    mpi_libraries={"/opt/mpich/libmpi.so.12": "mpi4py"},
    blas={"/usr/lib/libopenblas.so.0": 1},
    cores=(0, 1),
    scratch=ScratchFacts("/scratch", filesystem="ext4"),
    solve="",
    compilation="",
)
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}


def ranks(number, **changes):
    """Facts of several healthy ranks on one node."""
    return [
        replace(GOOD, mpi=replace(MPI, size=number, rank=rank), **changes) for rank in range(number)
    ]


def test_all_is_well_on_a_healthy_machine():
    findings = examine([GOOD])
    assert len(findings) == len(checks.CHECKS) + 1
    assert {finding.status for finding in findings} == {"ok"}
    assert not any(finding.remedy for finding in findings)


# (facts, check, status, words of what is found, words of the remedy)
CASES = {
    "crash": (
        replace(GOOD, crash="ends the process with signal 11"),
        checks.check_packages, "error", "signal 11", "--no-binary mpi4py",
    ),
    "crash under a launcher": (
        replace(GOOD, crash="ended with status 16", environment=OPEN_MPI),
        checks.check_packages, "error", "status 16", "without the launcher",
    ),
    "no petsc4py": (
        replace(GOOD, import_errors={"petsc4py.PETSc": "No module named 'petsc4py'"}),
        checks.check_packages, "error", "petsc4py.PETSc: No module", "docs/install.md",
    ),
    "no libmpi": (
        replace(GOOD, import_errors={"petsc4py.PETSc": "libmpi.so.12: cannot open"}),
        checks.check_packages, "error", "libmpi.so.12", "pip install mpich",
    ),
    "no openblas": (
        replace(GOOD, import_errors={"petsc4py.PETSc": "libopenblas.so.0: cannot open"}),
        checks.check_packages, "error", "libopenblas.so.0", "libopenblas0",
    ),
    "old torch": (
        replace(GOOD, versions=GOOD.versions | {"torch": "2.3.1+cu121"}),
        checks.check_packages, "error", "torch 2.3.1+cu121 is older than 2.4", "install",
    ),
    "no petsctools": (
        replace(GOOD, versions={k: v for k, v in GOOD.versions.items() if k != "petsctools"}),
        checks.check_packages, "error", "petsctools is not installed", "install",
    ),
    "two MPIs": (
        replace(GOOD, mpi_libraries=GOOD.mpi_libraries | {"/usr/lib/libmpi.so.40": "petsc4py"}),
        checks.check_one_mpi, "error", "/usr/lib/libmpi.so.40 (petsc4py)", "one mpicc",
    ),
    "PETSc sees fewer ranks": (
        replace(GOOD, mpi=replace(MPI, size=2)),
        checks.check_one_mpi, "error", "mpi4py sees 2 ranks, PETSc 1", "one mpicc",
    ),
    "PETSc for another MPI": (
        replace(GOOD, petsc=replace(PETSC, mpi="Open MPI")),
        checks.check_one_mpi, "error", "configured with Open MPI", "one mpicc",
    ),
    "funneled": (
        replace(GOOD, mpi=replace(MPI, threads="FUNNELED")),
        checks.check_one_mpi, "note", "FUNNELED", "thread_level",
    ),
    "foreign launcher": (
        replace(GOOD, environment=OPEN_MPI),
        checks.check_launcher, "error", "Open MPI's mpiexec started 4 processes", "srun --mpi",
    ),
    "MPI does not start under the launcher": (
        replace(GOOD, mpi=None, environment=OPEN_MPI, own_mpiexec="/env/bin/mpiexec"),
        checks.check_launcher, "warning", "MPI did not start", "(perhaps /env/bin/mpiexec)",
    ),
    "launcher and MPI count differently": (
        replace(GOOD, mpi=replace(MPI, size=2), environment=OPEN_MPI),
        checks.check_launcher, "warning", "started 4 processes, but MPI sees 2", "mpiexec",
    ),
    "torchrun": (
        replace(GOOD, environment={"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "RANK": "0"}),
        checks.check_launcher, "note", "torchrun started 4", "mpiexec",
    ),
    "foreign mpiexec on the path": (
        replace(GOOD, mpiexec=("/usr/bin/mpiexec", "mpiexec (OpenRTE) 4.1.4")),
        checks.check_launcher, "warning", "/usr/bin/mpiexec is Open MPI's", "PATH",
    ),
    "petsc4py of another PETSc": (
        replace(GOOD, versions=GOOD.versions | {"petsc4py": "3.25.0"}),
        checks.check_petsc_versions, "error", "petsc4py 3.25.0 has loaded PETSc 3.26.1",
        "petsc4py==3.26.*",
    ),
    "PETSC_DIR of another PETSc": (
        replace(GOOD, environment={"PETSC_DIR": "/home/petsc", "PETSC_ARCH": "arch-opt"}),
        checks.check_petsc_versions, "warning", "/home/petsc/arch-opt", "unset",
    ),
    "complex": (
        replace(GOOD, petsc=replace(PETSC, scalar="complex128")),
        checks.check_petsc_types, "error", "complex128", "--with-scalar-type=real",
    ),
    "single": (
        replace(GOOD, petsc=replace(PETSC, scalar="float32", real="float32")),
        checks.check_petsc_types, "warning", "float32", "--with-precision=double",
    ),
    "debug": (
        replace(GOOD, petsc=replace(PETSC, debug=True)),
        checks.check_petsc_build, "warning", "debug", "--with-debugging=0",
    ),
    "many BLAS threads": (
        replace(GOOD, blas={"/usr/lib/libopenblas.so.0": 64}),
        checks.check_blas, "note", "libopenblas.so.0 (64 threads)", "OPENBLAS_NUM_THREADS=1",
    ),
    "reference BLAS": (
        replace(GOOD, blas={"/usr/lib/x86_64-linux-gnu/blas/libblas.so.3.11": None}),
        checks.check_blas, "note", "reference", "OpenBLAS",
    ),
    "driver missing": (
        replace(GOOD, torch=TorchFacts(1, "CUDA 12.4")),
        checks.check_gpu, "note", "no device visible", "nvidia-smi",
    ),
    "PETSc without devices": (
        replace(GOOD, torch=TorchFacts(1, "HIP 6.0", ("MI250X",))),
        checks.check_gpu, "note", "no device support", "--with-hip",
    ),
    "devices differ": (
        replace(
            GOOD, torch=TorchFacts(1, "CUDA 12.4", ("A100",)),
            petsc=replace(PETSC, devices=("hip",)),
        ),
        checks.check_gpu, "warning", "PETSc has hip", "--with-cuda",
    ),
    "MPI is not GPU-aware": (
        replace(
            GOOD, torch=TorchFacts(1, "CUDA 12.4", ("A100",)), mpi=replace(MPI, size=2),
            petsc=replace(PETSC, devices=("cuda",)),
        ),
        checks.check_gpu, "warning", "MPI does not say", "-use_gpu_aware_mpi 0",
    ),
    "scratch that was named": (
        replace(GOOD, scratch=ScratchFacts("/none", True, "FileNotFoundError: no such folder")),
        checks.check_scratch, "error", "/none: FileNotFoundError", "--scratch",
    ),
    "scratch by default": (
        replace(GOOD, scratch=ScratchFacts("/none", False, "PermissionError: read-only")),
        checks.check_scratch, "warning", "read-only", "--scratch",
    ),
    "scratch is full": (
        replace(GOOD, scratch=ScratchFacts("/scratch", free=5 * 2**20)),
        checks.check_scratch, "warning", "5 MiB free", "free space",
    ),
    "scratch in memory": (
        replace(GOOD, scratch=ScratchFacts("/tmp", filesystem="tmpfs")),
        checks.check_scratch, "note", "tmpfs", "take memory",
    ),
    "scratch on a server": (
        replace(GOOD, scratch=ScratchFacts("/home", filesystem="lustre")),
        checks.check_scratch, "note", "lustre", "node's own disk",
    ),
    "wrong solve": (
        replace(GOOD, solve="ImportError: broken"),
        checks.check_solve, "error", "ImportError: broken", "above first",
    ),
    "no compiler": (
        replace(GOOD, compilation="InvalidCxxCompiler: No working C++ compiler found"),
        checks.check_compiled_solves, "note", "No working C++ compiler", "g++",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "check", "status", "found", "remedy"), CASES.values(), ids=CASES)
def test_checks_find_what_is_wrong(facts, check, status, found, remedy):
    finding = check(facts)
    assert finding.status == status
    assert found in finding.found
    assert remedy in finding.remedy
    # And the report as a whole has it.
    assert finding == Finding(*_plain(finding, examine([facts])))


def _plain(finding, merged):
    (one,) = [one for one in merged if one.title == finding.title]
    return one.title, one.status, one.found, one.remedy


@pytest.mark.parametrize(
    ("facts", "check"),
    [
        (replace(GOOD, petsc=replace(PETSC, integer="int64")), checks.check_petsc_types),
        (replace(GOOD, petsc=replace(PETSC, debug=None)), checks.check_petsc_build),
        (replace(GOOD, petsc=replace(PETSC, mpi="")), checks.check_one_mpi),
        (replace(GOOD, mpi=replace(MPI, library="Intel(R) MPI 2021.9")), checks.check_one_mpi),
        (replace(GOOD, mpi=replace(MPI, library="HPE MPT 2.25")), checks.check_one_mpi),
        (replace(GOOD, environment={"PETSC_DIR": "/opt/petsc/"}), checks.check_petsc_versions),
        (replace(GOOD, mpiexec=("/bin/mpiexec", "HYDRA build details")), checks.check_launcher),
        (replace(GOOD, mpi=replace(MPI, size=4), environment=OPEN_MPI), checks.check_launcher),
        (replace(GOOD, blas={"/usr/lib/openblas-pthread/libblas.so.3": None}), checks.check_blas),
        (
            replace(
                GOOD, torch=TorchFacts(1, "CUDA 12.4", ("A100",)),
                mpi=replace(MPI, size=2, gpu_aware=True), petsc=replace(PETSC, devices=("cuda",)),
            ),
            checks.check_gpu,
        ),
    ],
)  # fmt: skip
def test_checks_leave_in_peace_what_is_right(facts, check):
    assert check(facts).status == "ok"


def test_what_is_absent_is_not_judged():
    bare = Facts("3.11.7", import_errors={"mpi4py.MPI": "RuntimeError: cannot load MPI library"})
    findings = examine([bare])
    assert [finding.title for finding in findings] == ["packages", "launcher", "threads"]
    assert findings[0].status == "error"


# ------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize(
    ("node", "status", "found", "remedy"),
    [
        (ranks(2), "ok", "2 ranks on the node, 2 threads in all, 2 cores", ""),
        ([replace(GOOD, torch=TorchFacts(2))], "ok", "1 rank on the node, 2 threads", ""),
        (ranks(2, torch=TorchFacts(2)), "warning", "4 threads in all, 2 cores", "THREADS=1 "),
        (ranks(2, blas={"libopenblas": 2}), "warning", "4 threads in all", "OPENBLAS_NUM_THREADS"),
        (
            ranks(2, torch=TorchFacts(4), cores=tuple(range(6))),
            "warning", "8 threads in all, 6 cores", "OMP_NUM_THREADS=3",
        ),
        (ranks(3), "warning", "3 ranks on the node", "at most 2 ranks"),
        # Bound to cores of their own, and within them.
        (
            [
                replace(one, torch=TorchFacts(2), cores=(2 * one.mpi.rank, 2 * one.mpi.rank + 1))
                for one in ranks(2)
            ],
            "ok", "4 threads in all, 4 cores", "",
        ),
        # In all there are enough, but one rank has few.
        (
            [replace(GOOD, torch=TorchFacts(2), cores=(0,)), replace(GOOD, cores=(1, 2, 3))],
            "warning", "a rank with 2 threads is bound to 1 core", "OMP_NUM_THREADS=1",
        ),
        (
            [replace(GOOD, torch=TorchFacts(2), quota=1.5)],
            "warning", "1 core (2 and a quota of 1.5)", "OMP_NUM_THREADS=1",
        ),
    ],
)  # fmt: skip
def test_threads_are_counted_against_cores(node, status, found, remedy):
    finding = checks.check_threads(node)
    assert finding.status == status
    assert found in finding.found
    assert remedy in finding.remedy
    assert bool(remedy) == bool(finding.remedy)


def test_threads_are_counted_node_by_node():
    crowded = ranks(4)
    spread = [replace(one, mpi=replace(one.mpi, node=one.mpi.rank // 2 * 2)) for one in crowded]
    status = {"crowded": examine(crowded)[-1].status, "spread": examine(spread)[-1].status}
    assert status == {"crowded": "warning", "spread": "ok"}


def test_quota_of_control_groups(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (one / "cpu,cpuacct" / "job").mkdir(parents=True)
    (one / "cpu,cpuacct" / "job" / "cpu.cfs_quota_us").write_text("150000\n")
    (one / "cpu,cpuacct" / "job" / "cpu.cfs_period_us").write_text("100000\n")
    (two / "job" / "step").mkdir(parents=True)
    (two / "job" / "cpu.max").write_text("400000 100000\n")  # the parent's limit holds as well
    (two / "job" / "step" / "cpu.max").write_text("max 100000\n")
    assert cpu_quota("4:memory:/\n2:cpu,cpuacct:/job\n", one) == 1.5
    assert cpu_quota("0::/job/step\n", two) == 4.0
    assert cpu_quota("0::/\n", two) is None


# ----------------------------------------------------------------------------------- launchers


@pytest.mark.parametrize(
    ("environment", "size", "expected"),
    [
        ({}, 1, None),
        (OPEN_MPI, 4, None),
        (OPEN_MPI, 1, 4),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, 1, 2),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, 2, None),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, 1, None),
        ({"MV2_COMM_WORLD_SIZE": "8"}, 1, 8),
        # Hydra counts one process on each of two nodes, too.
        ({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "1"}, 1, 2),
        ({"PMI_SIZE": "8", "MPI_LOCALNRANKS": "4"}, 8, None),
        ({"MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "0"}, 1, 4),
        ({"MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "0"}, 8, None),
        # In a Slurm step, in a batch script, and an mpiexec with its daemons in a step.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, 1, 4),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, 4, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1, None),
        (
            {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"},
            1, None,
        ),
        ({"PMI_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "1"}, 8, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "1"}, 1, 4),
        ({"PMIX_RANK": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}, 1, 4),
        ({"PMIX_RANK": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}, 4, None),
        ({"PMI_SIZE": "many"}, 1, None),
    ],
)  # fmt: skip
def test_claims_of_launchers(environment, size, expected):
    claim = find_mismatch(size, environment)
    assert (None if claim is None else claim.size) == expected
    assert (launcher_mismatch(size, environment) is None) == (expected is None)


@pytest.mark.parametrize("name", ["PMIX_RANK", "PALS_RANKID"])
def test_a_rank_above_the_size_is_a_mismatch(name):
    assert find_mismatch(1, {name: "0"}) is None
    assert find_mismatch(4, {name: "3"}) is None
    assert find_mismatch(1, {name: "3"}).rank == 3
    assert "several processes" in launcher_mismatch(1, {name: "3"})


def test_claims_say_who_and_how_many():
    assert claims(OPEN_MPI) == (Claim("Open MPI's mpiexec", 4, 2),)
    text = launcher_mismatch(1, OPEN_MPI)
    assert "Open MPI's mpiexec started 4 processes" in text
    assert "python -m pnode doctor" in text


# -------------------------------------------------------------------------------------- report


def test_findings_that_differ_name_their_ranks():
    everyone = ranks(4, cores=(0, 1, 2, 3))
    everyone[2] = replace(everyone[2], scratch=ScratchFacts("/scratch", False, "OSError: full"))
    everyone = [replace(one, petsc=replace(PETSC, size=4)) for one in everyone]
    findings = examine(everyone)
    scratch = {one.status: one.ranks for one in findings if one.title == "scratch"}
    assert scratch == {"ok": (0, 1, 3), "warning": (2,)}
    assert all(one.ranks == () for one in findings if one.title != "scratch")
    lines = report(findings, 4)
    assert "scratch [ranks 0-1, 3]: /scratch (ext4)" in lines
    assert "WARNING scratch [rank 2]: /scratch: OSError: full" in lines
    assert lines.splitlines()[-1] == "0 errors, 1 warning, 0 notes"
    assert max(map(len, lines.splitlines())) <= 98


def test_merging_keeps_findings_of_a_title_together():
    a, b, c = (Finding(title, "ok", "") for title in "abc")
    other = Finding("a", "error", "")
    merged = merge([[a, b], [other, b, c]])
    assert [(one.title, one.status, one.ranks) for one in merged] == [
        ("a", "ok", (0,)), ("a", "error", (1,)), ("b", "ok", ()), ("c", "ok", (1,)),
    ]  # fmt: skip


def test_oldest_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = dict((text + ">=0").split(">=")[:2] for text in project["dependencies"])
    assert declared == MINIMUM


# --------------------------------------------------------------------------------- gathering


def test_mpi_libraries_are_told_from_their_helpers():
    libraries = [
        "/usr/lib/libmpi.so.40.30.4", "/opt/lib/libmpich.so.12", "/opt/lib/libmpi_abi.so.1",
        "/opt/cray/lib/libmpi_gnu_123.so.12.0.0", "/site/x.libs/libmpi-0123abcd.so.12",
    ]  # fmt: skip
    helpers = [
        "/usr/lib/libmpi_cxx.so.40", "/usr/lib/libmpi_mpifh.so.40", "/usr/lib/libmpifort.so.12",
        "/opt/cray/lib/libmpi_gtl_cuda.so.0", "/site/mpi4py/MPI.mpich.cpython-311.so",
        "/usr/lib/libmpicxx.so.12", "/usr/lib/libpmi2.so.0", "/usr/lib/libmpc.so.3",
    ]  # fmt: skip
    assert mpi_libraries(libraries + helpers) == libraries


def test_scratch_is_tried(tmp_path):
    good = scratch_facts(str(tmp_path))
    assert (good.folder, good.error, good.given) == (str(tmp_path), "", True)
    assert good.free > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "NotADirectoryError" in scratch_facts(str(tmp_path / "file")).error
    assert "FileNotFoundError" in scratch_facts(str(tmp_path / "none")).error
    assert not scratch_facts().given


# ------------------------------------------------------------------------------ real processes


def run(command, **variables):
    names = ("PETSC_DIR", "PETSC_ARCH")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | variables
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, check=False
    )


def doctor(*arguments, launcher=(), **variables):
    return run([*launcher, sys.executable, "-m", "pnode", "doctor", *arguments], **variables)


def titles(content, status):
    return [finding["title"] for finding in content["findings"] if finding["status"] == status]


def entitled(content, title):
    (finding,) = [finding for finding in content["findings"] if finding["title"] == title]
    return finding


def test_on_one_process(tmp_path):
    outcome = doctor("--scratch", str(tmp_path))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0] == "pnode doctor, 1 rank"
    assert lines[-1].startswith("0 errors")
    assert any("ok      a small solve" in line for line in lines)


def test_a_folder_that_compiled_solves_cannot_use_is_a_note(tmp_path):
    """Nobody else may write to it; without a compiler the note comes likewise."""
    tmp_path.chmod(0o777)
    outcome = doctor("--json", PNODE_CACHE_DIR=str(tmp_path))
    assert outcome.returncode == 0
    finding = entitled(json.loads(outcome.stdout), "compiled solves")
    assert finding["status"] == "note" and "chmod 700" in finding["found"]


def test_json_has_all_findings_and_an_error_is_exit_status_one(tmp_path):
    outcome = doctor("--json", "--scratch", str(tmp_path / "none"))
    assert outcome.returncode == 1
    content = json.loads(outcome.stdout)
    assert (content["status"], content["size"]) == ("error", 1)
    keys = {"title", "status", "found", "remedy", "ranks"}
    assert all(set(finding) == keys for finding in content["findings"])
    assert len(content["findings"]) == len(checks.CHECKS) + 1
    assert titles(content, "error") == ["scratch"]


def test_on_two_ranks_one_prints():
    outcome = doctor("--json", launcher=(mpiexec(), "-n", "2"))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    content = json.loads(outcome.stdout)  # one report, not two
    assert content["size"] == 2
    launcher = entitled(content, "launcher")
    assert launcher["status"] == "ok"
    assert launcher["found"] == "2 ranks, and the launcher agrees"


def test_a_foreign_launcher_gives_one_report():
    """Two processes that are alone for MPI, as with the mpiexec of another MPI."""
    outcomes = [doctor(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK=rank) for rank in ("0", "1")]
    assert [outcome.returncode for outcome in outcomes] == [1, 1]
    assert "ERROR   launcher: Open MPI's mpiexec started 2 processes" in outcomes[0].stdout
    assert outcomes[1].stdout == ""


def broken(folder, code):
    """A folder with a petsc4py whose import of PETSc runs ``code``."""
    package = folder / "petsc4py"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "3.26.1"\n')
    (package / "PETSc.py").write_text(code)
    return f"{folder}{os.pathsep}{ROOT}"


def test_it_runs_where_petsc4py_does_not_import_and_finds_a_second_mpi(tmp_path):
    """The second MPI library is a copy of some extension module under that name."""
    second = tmp_path / "libmpi.so.40"
    shutil.copy(_ctypes.__file__, second)
    code = f"import ctypes\nctypes.CDLL({str(second)!r})\n"
    path = broken(tmp_path, f"{code}raise ImportError('libopenblas.so.0: cannot open')\n")
    outcome = doctor("--json", PYTHONPATH=path)
    assert outcome.returncode == 1, outcome.stderr
    content = json.loads(outcome.stdout)
    assert "libopenblas.so.0" in entitled(content, "packages")["found"]
    assert "install OpenBLAS" in entitled(content, "packages")["remedy"]
    assert f"{second} (petsc4py)" in entitled(content, "MPI library")["found"]
    assert titles(content, "error") == ["packages", "MPI library"]
    # The package itself tells the truth: it does not import.
    assert run([sys.executable, "-c", "import pnode"], PYTHONPATH=path).returncode == 1


def test_it_survives_an_import_that_ends_the_process(tmp_path):
    frames = (
        "[node:7] Signal: Aborted (6)\n" + "[node:7] [18] libc.so.6(+0x85)[0x7fc123a45305]\n" * 20
    )
    code = f"import os, sys\nsys.stderr.write({frames!r})\nsys.stderr.flush()\nos.abort()\n"
    outcome = doctor("--json", PYTHONPATH=broken(tmp_path, code))
    assert outcome.returncode == 1, outcome.stderr
    content = json.loads(outcome.stdout)
    found = entitled(content, "packages")["found"]
    assert "signal 6: [node:7] Signal: Aborted (6)" in found and "0x7fc" not in found
    assert {finding["title"] for finding in content["findings"]} == {
        "packages", "launcher", "scratch", "threads",
    }  # fmt: skip


def test_methods_prints_the_table(capsys):
    assert main(["methods"]) == 0
    assert capsys.readouterr().out == markdown_table() + "\n"


def test_a_reader_that_stops_early_is_no_error():
    outcome = run(["bash", "-c", f"{sys.executable} -m pnode methods | head -n 1"])
    assert outcome.stdout.startswith("| method |")
    assert outcome.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "original", "expected"),
    [
        (["-m", "doctor"], ["python", "-m", "pnode", "doctor"], True),
        (["-m", "doctor", "--json"], ["python", "-u", "-mpnode", "doctor", "--json"], True),
        (["/bin/pnode", "doctor"], ["python", "/bin/pnode", "doctor"], True),
        (["-m", "doctor"], ["python", "-m", "other", "doctor"], False),
        (["-m", "methods"], ["python", "-m", "pnode", "methods"], False),
        (["train.py", "doctor"], ["python", "train.py", "doctor"], False),
        (["-m"], ["python", "-m", "pnode"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_only_the_doctor_does_without_the_rest(arguments, original, expected):
    assert asked_for_doctor(arguments, original) == expected
