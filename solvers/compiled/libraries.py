"""Libraries of the C++ that torch's inductor writes for a graph, in less time than by inductor.

A compiler spends most of its time on what all graphs share: torch's headers, which are compiled
once and kept beside the graphs, and the model that inductor puts around each graph, whose place
``graph_library.cpp`` takes. What differs, the kernels and the calls of them, is compiled with
inductor's own options: the numbers are the same.

This holds on to the text that inductor writes, which may be another one in another torch. Whatever
fails here, inductor is asked to build the library itself.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from pnode.solvers.compiled import scratch
from pnode.solvers.compiled.workshops import note_use

__all__ = [
    "SOURCES", "agree_in_layout", "build", "environment", "is_right", "locked", "unpack",
]  # fmt: skip

_environment_lock = threading.RLock()

_OPTIONS = {
    "aot_inductor.package": True, "aot_inductor.package_cpp_only": True,
    # Here they are, and not in a folder of /tmp whose name is known beforehand.
    "aot_inductor.precompile_headers": False,
    # A compiler that knows C++20 knows the instruction sets that inductor would try one by one.
    "cpp.vec_isa_ok": True,
}  # fmt: skip
_KERNELS = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
# What the kernels include, and, of what a model does, that which their calls need.
_HEADERS = _KERNELS + "".join(
    f"#include <torch/csrc/inductor/{name}.h>\n"
    for name in (
        "aoti_runtime/utils",
        "aoti_runtime/scalar_to_tensor",
        "aoti_torch/generated/c_shim_cpu",
    )
)
_MODEL = """
namespace torch::aot_inductor {
using DeviceStreamType = void*;
struct AOTInductorModel {
    void run_impl(AtenTensorHandle*, AtenTensorHandle*, DeviceStreamType, AOTIProxyExecutorHandle);
    int32_t device_idx_ = -1;
};
"""
#: Files that libraries are made by.
SOURCES = (__file__, scratch.__file__, str(Path(__file__).with_name("graph_library.cpp")))
_LIBRARY = Path(SOURCES[-1]).read_text(encoding="utf-8")
_TORCH = "libtorch_cpu.so"
# Kernels of other devices, and checks of arguments that an environment variable would ask for.
_NOT_CALLED = re.compile(
    r"^.*\b(?:kernels_|__check_inputs_outputs|_check_aoti_runtime_check_inputs_env)\b.*\n",
    re.MULTILINE,
)
_NUMBERS = re.compile(r"AOTInductorModelBase\(\s*(\d+),\s*(\d+),\s*(\d+),")
_FUNCTION = re.compile(r"\bAOTIRuntimeError\s+(AOTInductor\w+)\(")
# Warnings on generated code take longer than the code.
_LEFT_OUT = {"-Wall", "-pedantic", "-g1"}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make a file; where there are no locks, all make it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(file)


def is_right(graph: torch.fx.GraphModule, run: Any, examples: Sequence[torch.Tensor]) -> bool:
    """Whether machine code runs where its graph does, with results that lie as the graph says.

    And whose numbers are the graph's, at other ones than the examples, which may be zeros.
    """
    try:
        with torch.no_grad():
            graph(*examples)
    except Exception:
        return True  # these numbers tell nothing
    try:
        if not agree_in_layout(graph, run(list(examples))):
            return False
    except Exception:
        return False
    generator = torch.Generator().manual_seed(5)
    others = [_near(x, generator) for x in examples]
    try:
        with torch.no_grad():
            expected = graph(*others)
    except Exception:
        return True
    try:
        return all(map(_alike, run(others), expected))
    except Exception:
        return False


def _near(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return other numbers, which lie alike."""
    y = torch.empty_like(x)
    if not x.is_floating_point() or y.stride() != x.stride():
        return x
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
    return y.copy_(x + 0.1 * noise.to(x.device))


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether numbers are the same, but for what makes of round-off a thousand times as much.

    Those that are not finite are left out: code that is compiled has its own order of sums.
    """
    finite = expected.isfinite()
    a, b = found[finite], expected[finite]
    if not expected.is_floating_point() or not b.numel():
        return True
    scale = torch.finfo(expected.dtype).eps ** 0.25 * b.abs().max()
    return bool(((a - b).abs() <= scale).all())


def agree_in_layout(graph: torch.fx.GraphModule, results: Sequence[torch.Tensor]) -> bool:
    """Whether results have the strides that a graph says, which those who read them rely on."""
    expected: Any = graph.graph.output_node().args[0]
    return all(
        size < 2 or found == stride or not result.numel()
        for node, result in zip(expected, results, strict=True)
        for size, found, stride in zip(
            result.shape, result.stride(), node.meta["val"].stride(), strict=True
        )
    )


def build(
    graph: torch.fx.GraphModule, examples: Sequence[torch.Tensor], options: dict[str, Any],
    package: Path, kept: Path, fingerprint: Callable[..., str],
) -> None:  # fmt: skip
    """Compile a graph.

    Parameters
    ----------
    graph : GraphModule
        Takes tensors, returns a tuple of them.
    examples : sequence of Tensor
        Its arguments.
    options : dict
        Inductor's.
    package : Path
        What is made; the folder is for this alone.
    kept : Path
        A folder of this user alone, for what all graphs share.
    fingerprint : callable
        Names what depends on the machine, on torch, and on its arguments.
    """
    inductor = importlib.import_module("torch._inductor")
    with _dtypes_set_up_once():
        made = inductor.aot_compile(graph, tuple(examples), options={**options, **_OPTIONS})
    files = [Path(file) for file in made]
    (source,) = (file for file in files if file.name.endswith(".wrapper.cpp"))
    (flags,) = (file for file in files if file.name.endswith("_compile_flags.json"))
    compiler = _Compiler(json.loads(flags.read_text(encoding="utf-8")), kept, fingerprint)
    part = compiler.compile(package.with_name("graph"), _text(source.read_text(encoding="utf-8")))
    library = source.with_suffix(".so")
    compiler.link(part, library)
    notes = [file for file in files if file.suffix == ".json" and "_flags" not in file.name]
    packages = importlib.import_module("torch._inductor.package")
    packages.package_aoti(str(package), [str(file) for file in (library, source, *notes)])


def unpack(package: Path, folder: Path | None, kept: Path) -> Any:
    """Return torch's loader of a package, which it unpacks in a folder, or in TMPDIR.

    ``aoti_load_package`` looks for the best instruction set before, by running a program for each
    that it compiles in TMPDIR or in ``kept``.
    """
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(environment("TMPDIR", folder))
        try:
            return torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
        except (AttributeError, TypeError):  # another torch
            inductor = importlib.import_module("torch._inductor")
            isa = {"cpp.vec_isa_ok": _OPTIONS["cpp.vec_isa_ok"]}
            stack.enter_context(inductor.config.patch(isa))
            if os.access(kept, os.W_OK):
                stack.enter_context(environment("TORCHINDUCTOR_CACHE_DIR", kept))
            return inductor.aoti_load_package(str(package)).loader


@contextmanager
def environment(name: str, folder: Path) -> Iterator[None]:
    """Name a folder in the environment, for one thread at a time."""
    with _environment_lock:
        before = os.environ.get(name)
        os.environ[name] = str(folder)
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before


@contextmanager
def _dtypes_set_up_once() -> Iterator[None]:
    """Let inductor's only table of dtypes be filled once a graph, not for each operation in it.

    That took a third of the time of the step of a network.
    """
    try:
        module = importlib.import_module("torch._inductor.dtype_propagation")
        table = module.DtypePropagationOpsHandler
    except (ImportError, AttributeError):  # torch before 2.6
        yield
        return
    fill = table.__init__

    def fill_once(self: Any) -> None:
        fill(self)
        table.__init__ = lambda self: None

    table.__init__ = fill_once
    try:
        yield
    finally:
        table.__init__ = fill


def _text(source: str) -> str:
    """Return what is compiled of a library that inductor has written, behind ``_HEADERS``."""
    codegen = importlib.import_module("torch._inductor.codegen")
    file = Path(codegen.__path__[0], "aoti_runtime", "interface.cpp")
    interface = file.read_text(encoding="utf-8").strip()
    before, found, rest = source.partition(interface)
    calls, kernels_begin, kernels = rest.partition(_KERNELS)
    declared, model, calls = calls.partition("namespace torch::aot_inductor {")
    numbers = _NUMBERS.search(calls)
    _, run, calls = calls.partition("void AOTInductorModel::run_impl(")
    if not (found and model and numbers and run):
        raise ValueError("inductor writes its interface in another way")
    calls = _NOT_CALLED.sub("", calls)
    inputs, outputs, constants = map(int, numbers.groups())
    if constants:
        raise ValueError("a graph has constants")
    more = [line for line in before.splitlines(True) if "aoti_include/cpu.h" not in line]
    # What torch looks for and does not call here.
    others = sorted({*_FUNCTION.findall(interface)} - {*_FUNCTION.findall(_LIBRARY)})
    stubs = "".join(f'extern "C" int32_t {name}() {{ return 1; }}\n' for name in others)
    return "".join((
        *more, declared, scratch.CLASS, _MODEL, run, scratch.on_the_stack(calls),
        f"constexpr size_t INPUTS = {inputs}, OUTPUTS = {outputs};\n", _LIBRARY, stubs,
        kernels_begin, kernels,
    ))  # fmt: skip


class _Compiler:
    """The C++ compiler, with inductor's options.

    Parameters
    ----------
    flags : dict
        As inductor writes them for CMake.
    kept : Path
        A folder of this user alone, for what all graphs share.
    fingerprint : callable
        Names it.
    """

    def __init__(self, flags: dict[str, Any], kept: Path, fingerprint: Callable[..., str]) -> None:
        builder = importlib.import_module("torch._inductor.cpp_builder")
        self._kept = kept
        self._compiler = shlex.split(flags["compiler"])
        options = [
            *(f"-D{name.strip()}" for name in flags["definitions"]),
            *(f"-{flag}" for flag in flags["cflags"]),
            *(option for text in flags["passthrough_args"] for option in shlex.split(text)),
            *(f"-I{folder}" for folder in flags["include_dirs"]),
        ]
        self._options = [option for option in options if option not in _LEFT_OUT] + ["-w"]
        version = builder.get_compiler_version_info(flags["compiler"])
        self._name = lambda *parts: fingerprint(*self._compiler, version, *self._options, *parts)

    def compile(self, path: Path, text: str) -> Path:
        """Return the object file of a text, whose first lines would be ``_HEADERS``."""
        header, source, made = self._header(), path.with_suffix(".cpp"), path.with_suffix(".o")
        source.write_text(text, encoding="utf-8")
        self._run("-c", str(source), "-include", str(header), "-o", str(made))
        return made

    def _header(self) -> Path:
        """Return a header beside which there is what the compiler makes of it."""
        path = self._kept / f"headers-{self._name(_HEADERS)}.h"

        def make(partial: Path) -> None:
            path.write_text(_HEADERS, encoding="utf-8")
            self._run("-x", "c++-header", str(path), "-o", str(partial))

        return self._once(path.with_suffix(".h.gch"), make).with_suffix("")

    def _once(self, path: Path, make: Callable[[Path], None]) -> Path:
        """Return a file that is made if it is not there."""
        if not path.exists():
            with locked(path.with_suffix(".lock")):
                if not path.exists():
                    partial = path.with_suffix(f".{os.getpid()}.partial")
                    make(partial)
                    partial.replace(path)
        note_use(path)
        return path

    def link(self, part: Path, library: Path) -> None:
        """Make a library; that torch's has what it lacks shows when it is loaded, in less time."""
        nothing = self._kept / f"{self._name(_TORCH)}-{_TORCH}"

        def make(partial: Path) -> None:
            self._run(
                "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{_TORCH}", "-o", str(partial)
            )

        self._once(nothing, make)
        self._run("-shared", str(part), "-Wl,--no-as-needed", str(nothing), "-o", str(library))

    def _run(self, *arguments: str) -> None:
        command = [*self._compiler, *self._options, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
