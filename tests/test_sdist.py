"""The source distribution: all of the repository, and it builds and tests without it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pnode

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("pnode/solvers", "pnode/adjoint", "tools/editable/pnode")


def run(command: list[str], folder: Path, **environment: str) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def tracked() -> set[str]:
    """Return what belongs to the repository: of git's, or all but what is made."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a checkout of git's")
    return {name for name in listed.stdout.splitlines() if os.path.lexists(ROOT / name)}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "repository"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        run(["cp", "-a", str(ROOT / name), str(copy / name)], folder)
    build = f"import setuptools.build_meta as build; build.build_sdist({str(folder)!r})"
    run([sys.executable, "-c", build], copy)
    with tarfile.open(folder / f"pnode-{pnode.__version__}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"pnode-{pnode.__version__}"


def test_it_has_everything(unpacked: Path) -> None:
    files = {
        str(Path(place, name).relative_to(unpacked))
        for place, folders, names in os.walk(unpacked)
        for name in [*names, *(each for each in folders if Path(place, each).is_symlink())]
    }
    assert tracked() - files == set()
    made = {name for name in files - tracked() if not name.startswith("pnode.egg-info/")}
    assert made == {"PKG-INFO", "setup.cfg"}
    for link in LINKS:
        assert os.readlink(unpacked / link) == os.readlink(ROOT / link)


def test_it_builds_and_tests(unpacked: Path, tmp_path: Path) -> None:
    build = f"import setuptools.build_meta as build; build.build_wheel({str(tmp_path)!r})"
    run([sys.executable, "-c", build], unpacked)
    (wheel,) = tmp_path.glob("pnode-*.whl")
    assert wheel.name == f"pnode-{pnode.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # pnode from the wheel, its tests from the source distribution.
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(tmp_path / "site"), *(each for each in others if each and each != str(ROOT))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/test_schedule.py", "-k", "test_one_kind_of_checkpoint"]
    (unpacked / "pnode").rename(tmp_path / "hidden")
    try:
        run(command, unpacked, PYTHONPATH=os.pathsep.join(path))
    finally:
        (tmp_path / "hidden").rename(unpacked / "pnode")


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {pnode.__version__}\n" in (ROOT / "CITATION.cff").read_text()
