"""Graphs of torch operations compiled to machine code by torch's inductor, and kept on disk.

One file per graph in a folder of the user's (``PNODE_CACHE_DIR``, else ``$XDG_CACHE_HOME/pnode``,
else ``~/.cache/pnode``). A file appears whole or not at all, so processes may share the folder.

What is loaded is run, so folder and files must be this user's alone, and a file ends with the
checksum of what comes before: to map a library that was cut short kills the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch

from pnode.base import private_files
from pnode.base.notices import LOG, compiling
from pnode.solvers.compiled import decomposition, fast_tanh, libraries, products, slices, trace
from pnode.solvers.compiled.slices import arrange_slices
from pnode.solvers.compiled.trace import compose
from pnode.solvers.compiled.workshops import INDUCTORS as _INDUCTORS
from pnode.solvers.compiled.workshops import note_use
from pnode.solvers.compiled.workshops import workshop as _workshop

__all__ = [
    "CompilationFailed", "Compiled", "CompiledGraph", "cache_folder", "compile_graph",
    "compile_source", "fingerprint", "open_graph",
]  # fmt: skip

#: Takes and returns a list of tensors.
Compiled = Callable[[list[torch.Tensor]], list[torch.Tensor]]

_aten = torch.ops.aten
_Node: TypeAlias = Any  # torch.fx.Node, whose arguments are typed as a union of everything

_SOURCES = (
    __file__, *libraries.SOURCES, trace.__file__, products.__file__, fast_tanh.__file__,
    decomposition.__file__, slices.__file__,
)  # fmt: skip
# Products that are added to something are rounded once.
_INDUCTOR = {"cpp.enable_floating_point_contract_flag": "fast"}

#: What has been loaded, by checksum: no library is ever unloaded.
_LOADED: dict[bytes, Compiled] = {}
_MARK = b"pnode-1:"  # begins the end of a file, before the checksum


class CompilationFailed(Exception):
    """Why a graph could not be compiled."""


class _Damaged(Exception):
    """A file that is to be made again."""


def cache_folder() -> Path:
    """Return the folder of compiled graphs, made if need be.

    Raises
    ------
    OSError
        If it cannot be made, or belongs to somebody else, or others can write to it.
    """
    own = os.environ.get("PNODE_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(own) if own else Path(base) / "pnode"
    # A link of the user's own may lead to it; what counts is where it leads.
    folder = folder.resolve()
    try:
        private_files.make_folder(folder)
    except private_files.NotPrivate as error:
        raise private_files.NotPrivate(
            f"{error}: libraries in it could be anybody's; chmod 700 it if it is yours, or name "
            "another folder in PNODE_CACHE_DIR"
        ) from error
    return folder


def _read(path: Path) -> bytes:
    """Return what was kept in a file.

    Raises
    ------
    _Damaged
        If it is not what was kept.
    OSError
        If there is none, or it is not this user's alone.
    """
    content = private_files.read(path)
    end = len(content) - hashlib.sha256().digest_size
    body = content[: max(0, end - len(_MARK))]
    if content[len(body) :] != _MARK + hashlib.sha256(body).digest():
        raise _Damaged(f"{path} is damaged")
    note_use(path)
    return body


def _keep(path: Path, made: Path) -> None:
    """Keep a file that was made in a private folder; it appears whole or not at all."""
    body = made.read_bytes()
    end = _MARK + hashlib.sha256(body).digest()
    private_files.write(path, (body, end), made.with_suffix(".partial"), sync=True)


@contextlib.contextmanager
def _copied(path: Path, body: bytes | None = None) -> Iterator[Path]:
    """Lend a copy of what was kept, where nobody can change it between the check and its use."""
    body = _read(path) if body is None else body
    with tempfile.TemporaryDirectory(prefix="pnode-") as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(body)
        yield copy


@cache
def _machine() -> str:
    """Return what machine code depends on besides the graph: versions, processor."""
    flags = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    try:
        version = importlib.metadata.version("pnode")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    sources = [Path(file).read_text(encoding="utf-8") for file in _SOURCES]
    capability = torch.backends.cpu.get_cpu_capability()
    return "\n".join((version, torch.__version__, capability, platform.machine(), flags, *sources))


def fingerprint(*parts: str) -> str:
    """Return a name for what a compiled graph depends on."""
    text = "\n".join((_machine(), str(torch.get_num_threads()), *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def compile_graph(
    name: str, function: Callable[..., object], examples: Sequence[torch.Tensor]
) -> Compiled:
    """Compile a function of tensors, or load it if that was done before.

    Parameters
    ----------
    name : str
        Tells it from every other one; see :func:`fingerprint`.
    function : callable
        Takes tensors, returns a tuple of tensors; made of torch operations without effects.
    examples : sequence of Tensor
        Arguments; shapes, strides and dtypes matter.

    Raises
    ------
    CompilationFailed
        With the reason: no compiler, no room on disk...
    """
    try:
        path = cache_folder() / f"{name}.pt2"
        # Made again: one that is damaged, another's, or of a torch that cannot be told apart.
        with contextlib.suppress(Exception):
            return _load(path)
        graph = _build(path, function, examples)
        made = _load(path)
        if graph is not None and not libraries.is_right(graph, made, examples):
            path.unlink()
            raise RuntimeError("the code fails, or its results lie otherwise than the graph says")
        return made
    except Exception as error:
        text = " ".join(str(error).split())
        raise CompilationFailed(
            f"torch's inductor failed ({type(error).__name__}: {text[:300]}); it needs a C++ "
            "compiler such as g++, and room in a folder of this user's, which PNODE_CACHE_DIR can "
            "name, and in TMPDIR, mounted without noexec"
        ) from error


@dataclass(frozen=True, eq=False)
class CompiledGraph:
    """A compiled graph, to be called; ``path`` is its package."""

    path: Path
    run: Compiled

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return its results."""
        return self.run(inputs)


def _load(path: Path) -> CompiledGraph:
    digest = hashlib.sha256(body := _read(path)).digest()
    if digest not in _LOADED:
        with _copied(path, body) as copy, zipfile.ZipFile(copy) as package:
            # Kernels of a GPU alone are read later.
            kernels = any(name.endswith((".cubin", ".hsaco")) for name in package.namelist())
            unpacked = None if kernels else copy.parent
            _LOADED[digest] = libraries.unpack(copy, unpacked, path.parent / _INDUCTORS).run
    return CompiledGraph(path, _LOADED[digest])


def _build(
    path: Path, function: Callable[..., object], examples: Sequence[torch.Tensor]
) -> torch.fx.GraphModule | None:
    """Return the graph that was compiled, None if another process has done so."""
    # By default that is a folder of /tmp whose name is known beforehand.
    folder = path.parent / _INDUCTORS
    private_files.make_folder(folder)
    lock = libraries.locked(folder / f"{path.name}.lock")
    with libraries.environment("TORCHINDUCTOR_CACHE_DIR", folder), lock:
        with contextlib.suppress(OSError, _Damaged):
            _read(path)  # made meanwhile
            return None
        with (
            _workshop(path.parent) as building,
            torch.no_grad(),
            warnings.catch_warnings(),
            compiling("a graph of the vector field"),
        ):
            warnings.simplefilter("ignore")
            partial, graph = building / path.name, prepare(function, examples)
            try:
                libraries.build(graph, examples, _INDUCTOR, partial, folder, fingerprint)
                # Another torch may want more of a library.
                libraries.unpack(partial, building, folder)
            except Exception:  # whatever it is: what inductor itself says is for the user
                partial.unlink(missing_ok=True)
                _build_by_inductor(prepare(function, examples), examples, partial)
            _keep(path, partial)
            return graph


def _build_by_inductor(
    graph: torch.fx.GraphModule, examples: Sequence[torch.Tensor], package: Path
) -> None:
    exported = torch.export.export(graph, tuple(examples), strict=False)
    inductor = importlib.import_module("torch._inductor")
    inductor.aoti_compile_and_package(
        exported, package_path=str(package), inductor_configs=_INDUCTOR
    )


@cache
def open_graph(path: Path) -> ctypes.CDLL:
    """Return the library in a graph's package, for callers of torch's C interface.

    Raises
    ------
    CompilationFailed
        If there is none that can be called without torch's help.
    """
    try:
        with _copied(path) as copy, zipfile.ZipFile(copy) as package:
            names = package.namelist()
            # Operations without a C interface: torch calls them by these notes.
            notes = [n for n in names if n.endswith(".json") and not n.endswith("_metadata.json")]
            if any(json.loads(package.read(name)).get("nodes") for name in notes):
                raise CompilationFailed("it calls operations that only torch can call")
            (name,) = (name for name in names if name.endswith(".so"))
            return ctypes.CDLL(package.extract(name, copy.parent))
    except (OSError, ValueError, _Damaged, zipfile.BadZipFile) as error:
        raise CompilationFailed(f"{type(error).__name__}: {error}") from error


def compile_source(
    source: str, flags: Sequence[str], kind: str = "", shared: str = ""
) -> ctypes.CDLL:
    """Compile a program in C++, or take it from the disk.

    Parameters
    ----------
    source : str
        The program.
    flags : sequence of str
        The compiler's options.
    kind : str
        Begins the file's name.
    shared : str
        The rest of it, which other programs have, too: compiled once for all of them.

    Raises
    ------
    CompilationFailed
        With the reason.
    """
    try:
        cpp_builder = importlib.import_module("torch._inductor.cpp_builder")  # takes a second
        compiler, folder = cpp_builder.get_cpp_compiler(), cache_folder()
        path = folder / f"{kind}{fingerprint(source, shared, compiler, *flags)}.so"
        with contextlib.suppress(OSError, _Damaged):
            return _open_library(path)
        command = [*shlex.split(compiler), *flags]
        part = folder / f"{fingerprint(shared, compiler, *flags)}.o" if shared else None
        if part is not None:
            _built(part, _read, shared, [*command, "-c"])
        library: ctypes.CDLL = _built(path, _open_library, source, command, part)
        return library
    except Exception as error:
        text = " ".join(str(error).split())
        raise CompilationFailed(f"{type(error).__name__}: {text[:300]}") from error


def _open_library(path: Path) -> ctypes.CDLL:
    with _copied(path) as copy:
        return ctypes.CDLL(str(copy))


def _built(
    path: Path, find: Callable[[Path], Any], source: str, command: list[str], part: Any = None
) -> Any:
    """Return what is found at a path, compiled by one process of those that want it at once."""
    with libraries.locked(path.parent / f"{path.name}.lock"), contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, _Damaged):
            return find(path)
        folder = stack.enter_context(_workshop(path.parent))
        code, partial = folder / "program.cpp", folder / path.name
        code.write_text(source, encoding="utf-8")
        parts = [code] if part is None else [code, stack.enter_context(_copied(part))]
        arguments = [*command, "-o", str(partial), *map(str, parts), "-lm"]
        with compiling("steps"):
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode:
            LOG.warning("%s failed, and the solve goes on without: %s", command[0], done.stderr)
            raise RuntimeError(done.stderr)
        _keep(path, partial)
    return find(path)


def prepare(
    function: Callable[..., object], examples: Sequence[torch.Tensor]
) -> torch.fx.GraphModule:
    """Return the graph that is compiled."""
    own = {**fast_tanh.DECOMPOSITIONS, **decomposition.INTEGERS}
    graph = compose(function, examples, own)
    _join_rows(graph)
    arrange_slices(graph)
    _lay_out_single_parts(graph)
    return graph


def _lay_out_single_parts(graph: torch.fx.GraphModule) -> None:
    """Let what is stacked of one tensor be contiguous.

    Inductor copies that tensor with its strides, and the drivers take results for contiguous.
    """
    nodes = graph.graph
    for node in list(nodes.nodes):
        if node.target in (_aten.stack.default, _aten.cat.default) and len(node.args[0]) == 1:
            with nodes.inserting_before(node):
                copy = nodes.call_function(
                    _aten.clone.default, tuple(node.args[0]),
                    {"memory_format": torch.contiguous_format},
                )  # fmt: skip
            node.args = ([copy], *node.args[1:])
    graph.recompile()


def _join_rows(graph: torch.fx.GraphModule) -> None:
    """Replace the concatenation of all rows of a tensor, one after the other, by a view of it."""
    nodes = graph.graph
    for node in list(nodes.nodes):
        if node.target is not _aten.cat.default or len(node.args) > 1:
            continue
        rows = [_strip(part) for part in node.args[0]]
        if any(row.target is not _aten.select.int or row.args[1] != 0 for row in rows):
            continue
        whole = rows[0].args[0]
        shape = whole.meta["val"].shape
        expected = [(whole, index) for index in range(shape[0])]
        if [(row.args[0], row.args[2]) for row in rows] == expected and len(shape) > 2:
            with nodes.inserting_before(node):
                view = nodes.call_function(
                    _aten.view.default, (whole, [shape[0] * shape[1], *shape[2:]])
                )
            view.meta = dict(node.meta)
            node.replace_all_uses_with(view)
            nodes.erase_node(node)
    nodes.eliminate_dead_code()
    graph.recompile()


def _strip(node: _Node) -> _Node:
    while node.target is _aten.detach.default:
        node = node.args[0]
    return node
