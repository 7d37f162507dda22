"""Whether solves can be compiled here."""

from __future__ import annotations

from pnode.diagnosis.facts import Facts
from pnode.diagnosis.finding import Finding

__all__ = ["check_compiled_solves", "compile_a_program"]

_PROGRAM = 'extern "C" int answer() { return 42; }'


def compile_a_program() -> str:
    """Compile a program, keep and load it as those of solves; return why not, if so."""
    try:
        from pnode.solvers.compiled.inductor import compile_source

        compile_source(_PROGRAM, ("-O0", "-fPIC", "-shared"), "doctor-").answer()
    except Exception as error:  # whatever a compiler, a disk or a loader says
        return " ".join(str(error).split())
    return ""


def check_compiled_solves(facts: Facts) -> Finding | None:
    """Whether a program in C++ was compiled, kept and loaded."""
    if facts.compilation is None:
        return None
    title = "compiled solves"
    if facts.compilation:
        return Finding(
            title, "note", f"not here: {facts.compilation}",
            "solves work without, more slowly. It takes g++, a folder of this user's "
            "(PNODE_CACHE_DIR), and one for temporary files (TMPDIR) that allows programs, mounted "
            "without noexec: docs/compile.md",
        )  # fmt: skip
    return Finding(title, "ok", "a program in C++ was compiled, kept and loaded")
