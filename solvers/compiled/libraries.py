"""Libraries of the C++ that torch's inductor writes for a graph, in less time than by inductor.

A compiler spends most of its time on what all graphs share: the interface that inductor puts into
each library, and torch's headers. Both are compiled once and kept beside the graphs. What differs,
the calls of kernels and the kernels, are two files, compiled at the same time with inductor's own
options: the numbers are the same.

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["build", "locked"]

_OPTIONS = {
    "aot_inductor.package": True, "aot_inductor.package_cpp_only": True,
    # Here they are, and not in a folder of /tmp whose name is known beforehand.
    "aot_inductor.precompile_headers": False,
    # A compiler that knows C++20 knows the instruction sets that inductor would try one by one.
    "cpp.vec_isa_ok": True,
}  # fmt: skip
_KERNELS = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
_MODEL = "torch::aot_inductor::AOTInductorModelBase<torch::aot_inductor::AOTInductorModel>"
# What the calls need of the model stands in the interface, which has all of it: here the compiler
# would read it anew for each graph, and the regular expression that names a device with it.
_ELSEWHERE = """\
#ifdef __GLIBCXX__
namespace std::__detail {
using Text = std::string::const_iterator;
using Matches = std::allocator<std::sub_match<Text>>;
extern template class _Scanner<char>;
extern template class _Compiler<std::regex_traits<char>>;
extern template class _Executor<Text, Matches, std::regex_traits<char>, true>;
extern template class _Executor<Text, Matches, std::regex_traits<char>, false>;
}
#endif
namespace torch::aot_inductor {
using Model = AOTInductorModelBase<AOTInductorModel>;
template <> Model::AOTInductorModelBase(
    size_t, size_t, size_t, const std::string&, std::optional<std::string>, bool);
template <> Model::~AOTInductorModelBase();
template <> void Model::update_constants_map(std::shared_ptr<ConstantMap>, bool);
template <> void Model::update_constants_array(std::shared_ptr<std::vector<ConstantHandle>>);
}
"""
# Checks of arguments that an environment variable would ask for: half of the calls' text.
_CHECKS = re.compile(
    r"^AOTI_NOINLINE static void check_input_\d+\(.*?^}\n|^ *check_input_\d+\(input_handles\);\n",
    re.MULTILINE | re.DOTALL,
)
# Warnings on generated code take longer than the code.
_LEFT_OUT = {"-Wall", "-pedantic", "-g1", "-O3"}


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
    made = inductor.aot_compile(graph, tuple(examples), options={**options, **_OPTIONS})
    files = [Path(file) for file in made]
    (source,) = (file for file in files if file.name.endswith(".wrapper.cpp"))
    (flags,) = (file for file in files if file.name.endswith("_compile_flags.json"))
    headers, interface, calls, kernels = _parts(source.read_text(encoding="utf-8"))
    compiler = _Compiler(json.loads(flags.read_text(encoding="utf-8")), kept, fingerprint)
    lines = headers.splitlines(True)
    includes = "".join(line for line in lines if line.startswith("#include <torch"))
    jobs = [
        (package.with_name("calls"), "-O1", includes, _ELSEWHERE + calls),
        (package.with_name("kernels"), "-O3", _KERNELS, kernels),
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = [pool.submit(compiler.compile, *job) for job in jobs]
        text = f"{headers}{interface}\ntemplate class {_MODEL};\n"
        objects.append(pool.submit(compiler.interface, includes, text))
        parts = [each.result() for each in objects]
    library = source.with_suffix(".so")
    compiler.link([*parts, *(file for file in files if file.suffix == ".o")], library)
    notes = [file for file in files if file.suffix == ".json" and "_flags" not in file.name]
    packages = importlib.import_module("torch._inductor.package")
    packages.package_aoti(str(package), [str(file) for file in (library, source, *notes)])


def _parts(source: str) -> tuple[str, str, str, str]:
    """Return the headers, the interface, what calls the kernels, and the kernels."""
    codegen = importlib.import_module("torch._inductor.codegen")
    file = Path(codegen.__path__[0], "aoti_runtime", "interface.cpp")
    interface = file.read_text(encoding="utf-8").strip()
    before, found, rest = source.partition(interface)
    calls, kernels_begin, kernels = rest.partition(_KERNELS)
    if not found:
        raise ValueError("inductor writes its interface in another way")
    return before, found, _CHECKS.sub("", calls), kernels_begin + kernels


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

    def compile(self, path: Path, level: str, includes: str, text: str) -> Path:
        """Return the object file of a text, whose first lines would be ``includes``."""
        header = self._header(level, includes)
        source, made = path.with_suffix(".cpp"), path.with_suffix(".o")
        source.write_text(text, encoding="utf-8")
        self._run(level, "-c", str(source), "-include", str(header), "-o", str(made))
        return made

    def interface(self, includes: str, text: str) -> Path:
        """Return the object file of the interface, whose text begins with ``includes``."""
        path = self._kept / f"interface-{self._name(text)}.o"

        def make(partial: Path) -> None:
            source = partial.with_suffix(".cpp")
            source.write_text(text, encoding="utf-8")
            header = self._header("-O1", includes)
            self._run("-O1", "-c", str(source), "-include", str(header), "-o", str(partial))
            source.unlink()

        return self._once(path, make)

    def _header(self, level: str, includes: str) -> Path:
        """Return a header beside which there is what the compiler makes of it."""
        path = self._kept / f"headers-{self._name(level, includes)}.h"

        def make(partial: Path) -> None:
            path.write_text(includes, encoding="utf-8")
            self._run(level, "-x", "c++-header", str(path), "-o", str(partial))

        return self._once(path.with_suffix(".h.gch"), make).with_suffix("")

    def _once(self, path: Path, make: Callable[[Path], None]) -> Path:
        """Return a file that is made if it is not there."""
        if not path.exists():
            with locked(path.with_suffix(".lock")):
                if not path.exists():
                    partial = path.with_suffix(f".{os.getpid()}.partial")
                    make(partial)
                    partial.replace(path)
        return path

    def link(self, objects: Sequence[Path], library: Path) -> None:
        """Make a library that lacks nothing."""
        torch_libraries = Path(torch.__file__).parent / "lib"
        self._run(
            "-O3", "-shared", "-Wl,--no-undefined", *map(str, objects), "-o", str(library),
            f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10", "-lgomp",
        )  # fmt: skip

    def _run(self, *arguments: str) -> None:
        command = [*self._compiler, *self._options, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
