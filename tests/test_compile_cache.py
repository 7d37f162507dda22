"""Whose libraries are loaded, and what of a file that is cut short, or cannot be written."""

import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pnode
from pnode.base import private_files
from pnode.solvers.compiled import inductor, libraries, workshops

SOURCE = 'extern "C" int answer() { return %d; }'
FLAGS = ("-O0", "-fPIC", "-shared")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PNODE_CACHE_DIR", str(folder))
    return folder


def answer(number=7):
    return inductor.compile_source(SOURCE % number, FLAGS, "answer-").answer()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A file as it is kept, of a library that says 666."""
    before = os.environ.get("PNODE_CACHE_DIR")
    os.environ["PNODE_CACHE_DIR"] = str(tmp_path_factory.mktemp("planted"))
    try:
        assert answer(666) == 666
        path = file_of(inductor.cache_folder())
        return path.read_bytes()
    finally:
        os.environ.pop("PNODE_CACHE_DIR")
        if before is not None:
            os.environ["PNODE_CACHE_DIR"] = before


def file_of(folder, number=7):
    (path,) = folder.glob("answer-*.so")
    return path


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o027])
def test_folder_and_files_are_for_this_user_alone(umask, cache):
    before = os.umask(umask)
    try:
        assert answer() == 7
    finally:
        os.umask(before)
    assert mode(cache) == 0o700
    path = file_of(cache)
    assert set(cache.iterdir()) == {path, path.with_name(f"{path.name}.lock")}
    assert all(mode(each) == 0o600 for each in cache.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2], lambda data: data[:100], lambda data: b"",
        lambda data: data[:-1], lambda data: data + b"x", lambda data: b"nothing" * 100,
        lambda data: data[:4000] + bytes([data[4000] ^ 1]) + data[4001:],
    ],
)  # fmt: skip
def test_damaged_libraries_are_made_again(damage, cache):
    """A library cut short kills a process that maps it: here this one."""
    assert answer() == 7
    path = file_of(cache)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert answer() == 7
    assert len(path.read_bytes()) == len(whole)


def test_what_programs_share_is_compiled_once(cache, monkeypatch):
    """Steps of all fields of one size; what is damaged of it is not linked, but made again."""
    made, keep = [], inductor._keep
    monkeypatch.setattr(inductor, "_keep", lambda *a: [made.append(a), keep(*a)][1])

    def sum_with(number, shared=5):
        own = f'int part(); extern "C" int answer() {{ return part() + {number}; }}'
        text = f"int part() {{ return {shared}; }}"
        return inductor.compile_source(own, FLAGS, "answer-", shared=text).answer()

    assert [sum_with(1), sum_with(2), sum_with(2)] == [6, 7, 7]
    assert len(made) == 3
    (part,) = cache.glob("*.o")
    assert mode(part) == 0o600
    part.write_bytes(part.read_bytes()[:-1])
    assert [sum_with(3), sum_with(3, shared=6)] == [8, 9]
    assert len(made) == 7


def test_one_of_those_that_want_a_program_at_once_compiles_it(cache, monkeypatch):
    """The others wait for it: here threads, whose locks of a file exclude one another as well."""
    made, keep, there = [], inductor._keep, threading.Barrier(3)
    monkeypatch.setattr(inductor, "_keep", lambda *a: [made.append(a), keep(*a)][1])
    look, own = inductor._open_library, threading.local()

    def all_look(path):
        if not hasattr(own, "looked"):
            own.looked = True
            there.wait(60.0)  # none has found it when the first begins
        return look(path)

    monkeypatch.setattr(inductor, "_open_library", all_look)
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda _: answer(), range(3))) == [7, 7, 7]
    assert len(made) == 1


@pytest.mark.parametrize("how", ["another user", "writable", "link", "pipe"])
def test_planted_files_are_not_loaded(how, cache, planted, monkeypatch):
    assert answer() == 7
    path = file_of(cache)
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        (cache / "elsewhere").write_bytes(planted)
        path.symlink_to(cache / "elsewhere")
    else:
        path.write_bytes(planted)
        path.chmod(0o666 if how == "writable" else 0o600)
    if how == "another user":
        check = private_files.check_open_file

        def of_another(place, file):
            if os.pread(file, len(planted), 0) == planted:
                raise private_files.NotPrivate(f"{place} belongs to user 12345")
            check(place, file)

        monkeypatch.setattr(private_files, "check_open_file", of_another)
    assert answer() == 7
    assert path.read_bytes() != planted
    if how == "link":
        assert (cache / "elsewhere").read_bytes() == planted


def folder_of_another(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)


def writable_folder(cache, monkeypatch):
    cache.mkdir()
    cache.chmod(0o777)


def file_instead(cache, monkeypatch):
    cache.write_text("a file")


def full_disk(cache, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(private_files, "write", full)


def no_fsync(cache, monkeypatch):
    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)


def test_folders_of_killed_compilations_are_removed(tmp_path):
    old, new = tmp_path / ".building-old", tmp_path / ".building-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "program.cpp").touch()
    os.utime(old, (1.0, 1.0))
    with inductor._workshop(tmp_path) as folder:
        assert folder.is_dir() and not old.exists()
    assert [*tmp_path.iterdir()] == [new]


def test_what_nobody_has_used_for_long_is_removed(cache, tmp_path):
    """And nothing that is not pnode's: the folder may be somebody's home."""
    assert answer() == 7
    used, unused, fresh = file_of(cache), cache / f"{'a' * 32}.so", cache / f"step-{'b' * 32}.pt2"
    kept = [cache / "thesis.so", cache / ".profile", cache / "notes" / f"{'c' * 32}.so"]
    inductors = cache / ".inductor" / "made" / "text.cpp"
    for path in (unused, fresh, *kept, inductors):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for path in (used, unused, *kept, inductors):
        os.utime(path, (1.0, 1.0))
    assert answer() == 7  # which makes it a used one
    workshops._tidy.cache_clear()
    assert answer(8) == 8
    assert not unused.exists() and not inductors.exists()
    assert all(path.exists() for path in (used, fresh, *kept))


NOT_WRITABLE = [
    (folder_of_another, "belongs to user"), (writable_folder, "chmod 700"),
    (file_instead, "not a folder"),
]  # fmt: skip


@pytest.mark.parametrize(("prepare", "reason"), NOT_WRITABLE)
def test_without_a_cache_a_solve_goes_on_with_one_warning(prepare, reason, cache, monkeypatch):
    prepare(cache, monkeypatch)
    solver = pnode.Solver(lambda t, y: -3.0 * y, method="cn", step_size=0.5, compile=True)
    y0, t = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.0, 0.5])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ys = solver(y0, t).ys
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    torch.testing.assert_close(ys[1], y0 * (1.0 - 0.75) / (1.0 + 0.75), rtol=1e-12, atol=0.0)
    assert not cache.is_dir() or not list(cache.glob("*.so")) + list(cache.glob(".building*"))


@pytest.mark.parametrize(
    ("prepare", "reason"), [(full_disk, "No space left"), (no_fsync, "Input/output error")]
)
def test_a_disk_that_is_full_or_broken(prepare, reason, cache, monkeypatch):
    """What :class:`CompilationFailed` says is the warning of the test above."""
    with monkeypatch.context() as patch:
        prepare(cache, patch)
        with pytest.raises(inductor.CompilationFailed, match=reason):
            answer()
    (lock,) = cache.iterdir()  # of those that want it at once
    assert lock.suffix == ".lock" and lock.stat().st_size == 0
    assert answer() == 7


def test_a_write_that_is_cut_short_leaves_nothing(cache):
    inductor.cache_folder()
    (cache / "made").write_bytes(bytes(5000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            inductor._keep(cache / "kept", cache / "made")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(cache.iterdir()) == [cache / "made"]


def test_a_cache_may_be_given_away_read_only(cache):
    """What is there is used; nothing has to be written."""
    assert answer() == 7
    file_of(cache).chmod(0o400)
    cache.chmod(0o500)
    try:
        assert answer() == 7
    finally:
        cache.chmod(0o700)


def test_a_link_of_our_own_may_lead_to_the_cache(cache, tmp_path):
    (tmp_path / "big disk").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "big disk")
    assert answer() == 7
    assert file_of(tmp_path / "big disk").exists()


def test_graphs_are_checked_like_libraries(cache, monkeypatch):
    """Of the same field: built, loaded, and built again when damaged; read alone by the driver."""
    made = []

    def build(path, function, examples):
        made.append(path)
        private_files.make_folder(path.parent / "work")
        (path.parent / "work" / "package").write_bytes(b"a package")
        inductor._keep(path, path.parent / "work" / "package")

    def load(path):
        with inductor._copied(path) as copy:
            assert copy.parent != path.parent
            return copy.read_bytes()

    monkeypatch.setattr(inductor, "_build", build)
    monkeypatch.setattr(inductor, "_load", load)
    for count, damage in enumerate([None, bytes(50), b""], start=1):
        if damage is not None:
            (cache / "graph.pt2").write_bytes(damage)
        for _ in range(2):
            assert inductor.compile_graph("graph", len, []) == b"a package"
        assert len(made) == count
    (cache / "graph.pt2").write_bytes(b"cut short")
    with pytest.raises(inductor.CompilationFailed, match=r"graph\.pt2 is damaged"):
        inductor.open_graph(cache / "graph.pt2")


def test_inductor_keeps_its_files_there_too(cache, monkeypatch):
    """Its own folder, in /tmp, has a name that anybody can know before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_somebody")
    seen, build = [], libraries.build

    def watched(*arguments):
        seen.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        return build(*arguments)

    monkeypatch.setattr(libraries, "build", watched)
    x = torch.arange(3.0)
    compiled = inductor.compile_graph("double", lambda x: (x + x,), [x])
    assert torch.equal(compiled([x])[0], x + x)
    assert seen == [str(cache / ".inductor")] and mode(cache / ".inductor") == 0o700
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/tmp/torchinductor_somebody"
    shutil.rmtree(cache / ".inductor")
    (cache / ".inductor").symlink_to("/tmp")
    with pytest.raises(inductor.CompilationFailed, match="symbolic link"):
        inductor.compile_graph("triple", lambda x: (3 * x,), [x])


UNPACKED = """
import os, sys, torch
from pnode.solvers.compiled import inductor
x = torch.arange(3.0)
compiled = inductor.compile_graph("double", lambda x: (x + x,), [x])
assert torch.equal(compiled([x])[0], x + x)
print(os.environ["TMPDIR"])
"""


def test_nothing_stays_where_torch_unpacks(cache, tmp_path):
    """Neither of the process that compiles nor of one that loads: a node's /tmp is its memory.

    So little that the folder need not be there for the first.
    """
    scratch = tmp_path / "scratch"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", UNPACKED], env={**os.environ, "TMPDIR": str(scratch)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(scratch)
        assert "outdated" not in done.stderr  # torch says so of what it cannot unpack
        scratch.mkdir(exist_ok=True)
        # torch makes its default cache itself, empty.
        assert not [path for path in scratch.rglob("*") if path.is_file()]
    assert len(list(cache.glob("double.pt2"))) == 1
