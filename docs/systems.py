"""The pages of the gallery's larger programs, made of the files themselves; called by conf.py.

They take minutes and are not run here: ``tools/gallery.py`` runs them and keeps their figures.
"""

import ast
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
Published systems
=================

Systems that others have published, each rebuilt on pnode in one file and measured beside a peer.
``python examples/NAME.py`` runs one, ``make gallery`` all.
"""


def examples() -> list[Path]:
    """Return the programs that use what the gallery shares."""
    return sorted(
        path
        for path in (ROOT / "examples").glob("*.py")
        if "from gallery_common import" in (text := path.read_text("utf-8")) and "def main" in text
    )


def split(path: Path) -> tuple[str, str, str]:
    """Return a program's title, the rest of its docstring, and its code."""
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    title, _, rest = (ast.get_docstring(tree) or path.stem).partition("\n")
    code = "\n".join(text.split("\n")[tree.body[0].end_lineno :]).strip("\n")
    return title.rstrip("."), rest.strip("\n"), code


def page(path: Path, figure: str | None) -> str:
    """Return the page of one program as reStructuredText."""
    title, rest, code = split(path)
    label = f".. highlight:: none\n\n.. _system-{path.stem}:"  # equations are no Python
    parts = [label, f"{title}\n{'=' * len(title)}"]
    if figure:
        parts.append(f".. image:: {figure}\n   :alt: {title}\n   :width: 100%")
        parts.append("..")  # what may follow is indented, and no part of the image
    heading = f"The program, ``examples/{path.name}``"
    parts += [rest, f"{heading}\n{'-' * len(heading)}"]
    indented = "\n".join(f"   {line}".rstrip() for line in code.split("\n"))
    parts.append(f".. code-block:: python\n\n{indented}")
    return "\n\n".join(parts) + "\n"


def write(folder: Path) -> None:
    """Write a page for each program, and one that shows them all."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows, names = [], []
    for path in examples():
        figure = f"../figures/{path.stem}.png"
        shown = figure if (folder / figure).exists() else None
        (folder / f"{path.stem}.rst").write_text(page(path, shown), "utf-8")
        names.append(path.stem)
        picture = (
            f".. image:: {shown}\n            :width: 260px\n            :target: {path.stem}.html"
            f"\n            :alt: {path.stem}"
            if shown
            else f"``{path.stem}``"
        )
        rows.append(f"    *   - {picture}\n        - :ref:`system-{path.stem}`")
    table = ".. list-table::\n    :widths: 40 60\n\n" + "\n".join(rows)
    tree = ".. toctree::\n    :hidden:\n\n" + "\n".join(f"    {name}" for name in names)
    parts = [HEADER, *([table, tree] if names else [])]
    (folder / "index.rst").write_text("\n\n".join(parts) + "\n", "utf-8")
