"""Pages that come from the code: the reference of all public names, methods, and errors."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pnode
from pnode import controllers, controls, errors, parallel, testing
from pnode.solvers.methods import markdown_table

ROOT = Path(__file__).resolve().parents[1]
#: Title of a page, and the names on it, in the order in which they are read.
PAGES = {
    "solving": (
        "Solving",
        ["Solver", "Steps", "LinearAlgebra", "Output", "Checkpointing", "Event",
         "odeint", "odeint_adjoint", "odeint_event", "plan", "Plan"],
    ),
    "results": (
        "Results",
        ["Solution", "Stats", "Ledger", "Occurrences", "Stage", "load", "sensitivities",
         "Sensitivities"],
    ),
    "methods": ("Methods", ["methods", "Method", "tableau"]),
}  # fmt: skip
MODULES = {
    "parallel": parallel,
    "controls": controls,
    "testing": testing,
    "controllers": controllers,
}


def write(folder: Path) -> None:
    """Write the pages into a folder; files that stay the same are not touched."""
    folder.mkdir(exist_ok=True)
    pages = {name: _page(title, "pnode", names) for name, (title, names) in PAGES.items()}
    for name, module in MODULES.items():
        intro = f".. automodule:: pnode.{name}\n   :no-index:\n"
        pages[name] = _page(f"pnode.{name}", f"pnode.{name}", module.__all__, intro)
    for name, text in pages.items():
        _write(folder / f"{name}.rst", text)
    _write(folder / "errors.rst", _errors())
    _write(folder / "table.md", f"# Table of methods\n\n{markdown_table()}\n")
    inner = "\n".join(["solving", "results", "methods", "table", *MODULES, "errors"])
    _write(folder / "index.md", f"# Reference\n\n```{{toctree}}\n:maxdepth: 1\n\n{inner}\n```\n")


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _page(title: str, prefix: str, names: list[str], intro: str = "") -> str:
    parts = [f"{title}\n{'=' * len(title)}\n", intro]
    owner: Any = pnode if prefix == "pnode" else MODULES[prefix.removeprefix("pnode.")]
    for name in names:
        value = getattr(owner, name)
        if inspect.isclass(value):
            members = (
                "   :members:\n   :undoc-members:\n   :special-members: __call__\n"
                if name == "Solution"
                else "   :members:\n"
            )
            inherited = "   :inherited-members: Module, object\n" if name == "Solution" else ""
            parts.append(f".. autoclass:: {prefix}.{name}\n{members}{inherited}")
        elif callable(value):
            parts.append(f".. autofunction:: {prefix}.{name}\n")
        else:
            parts.append(f".. autodata:: {prefix}.{name}\n   :no-value:\n")
    return "\n".join(parts)


def _errors() -> str:
    """Return the page of errors: the tree, and each class."""
    classes = [getattr(errors, name) for name in errors.__all__]
    lines = ["Errors", "======", "", inspect.cleandoc(errors.__doc__ or ""), ""]

    def branch(base: type, depth: int) -> None:
        for each in classes:
            if base in each.__bases__:
                lines.append(f"{'  ' * depth}* :class:`pnode.errors.{each.__name__}`\n")
                branch(each, depth + 1)

    lines += ["* :class:`pnode.errors.PnodeError`\n"]
    branch(errors.PnodeError, 1)
    for each in classes:
        lines.append(f".. autoexception:: pnode.errors.{each.__name__}\n   :show-inheritance:\n")
    return "\n".join(lines)


_LINK = re.compile(r"\]\((?!\w+://|#)([^)#\s]+)(#[^)\s]*)?\)")


def adapt_links(app: Any, name: str, source: list[str]) -> None:
    """Let links to files that have no page be plain text: they are in the repository."""
    path = Path(app.srcdir, f"{name}.md")
    if not path.exists():
        return

    def adapted(found: re.Match[str]) -> str:
        base = ROOT / "examples" if name == "examples" else path.parent
        target = (base / found[1]).resolve()
        if target.suffix == ".md" and target.parent == Path(app.srcdir).resolve():
            return f"]({target.name}{found[2] or ''})"
        if target == ROOT / "examples" / "README.md":
            return "](examples.md)"
        return "]"

    def whole(found: re.Match[str]) -> str:
        text = _LINK.sub(adapted, found[0])
        # A link without a target is its text.
        return re.sub(r"\[([^\[\]]*)\](?!\(|\[|:)", r"\1", text)

    text = source[0] if name != "examples" else (ROOT / "examples/README.md").read_text("utf-8")
    if name == "examples":
        text = text.replace("# Examples", "# Programs", 1)
    pieces = re.split(r"(```.*?```|`[^`\n]*`(?!\]))", text, flags=re.S)
    links = re.compile(r"(?<!!)\[(?:[^\[\]]|\[[^\[\]]*\])*\]\([^)\s]*\)")
    source[0] = "".join(
        piece if index % 2 else links.sub(whole, piece) for index, piece in enumerate(pieces)
    )
