"""Run the gallery's examples in full, into results/: figures, tables and numbers.

    python tools/gallery.py [NAME ...] [--again] [--figures]
    python tools/gallery.py --summary

An example is left out where results/ has its numbers from the same source, version and options.
--figures copies the figures, made small, to docs/figures, where the documentation takes them from.
All tables, and what each example took, are put together in results/summary.md at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, RESULTS, FIGURES = ROOT / "examples", ROOT / "results", ROOT / "docs" / "figures"
WIDTH, COLORS = 1000, 64  # of a figure in the documentation
sys.path.insert(0, str(EXAMPLES))


def names() -> list[str]:
    """Return the examples: what can be run and uses what the gallery shares."""
    return sorted(
        path.stem
        for path in EXAMPLES.glob("*.py")
        if "from gallery_common import" in (text := path.read_text("utf-8")) and "def main" in text
    )


def done(name: str) -> bool:
    """Whether results/ has the numbers of this example as it is, with its defaults."""
    import importlib

    from gallery_common import fingerprint

    import pnode

    try:
        found = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        expected = importlib.import_module(name).parse([]).settings
    except (OSError, ValueError):
        return False
    facts = (pnode.__version__, fingerprint(name), json.loads(json.dumps(expected, default=str)))
    return (found["version"], found["source"], found["options"]) == facts


def shrink(name: str) -> None:
    """Copy a figure to the documentation, with few colors."""
    from PIL import Image

    with Image.open(RESULTS / f"{name}.png") as image:
        small = image.convert("RGB")
        small.thumbnail((WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
        small.quantize(COLORS, Image.Quantize.MAXCOVERAGE).save(
            FIGURES / f"{name}.png", optimize=True
        )
    print(f"docs/figures/{name}.png: {(FIGURES / f'{name}.png').stat().st_size / 1000:.0f} kB")


def beside(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with CPU time and memory of peers by those of the nearest row of pnode's above.

    Rows that have a ratio of their own are left as they are.
    """
    result, ours = [], dict[str, Any]()
    for row in rows:
        named = any("pnode" in text for text in row.values() if isinstance(text, str))
        ratios = {
            f"{name} / pnode's above": row[name] / ours[name]
            for name in ("CPU s", "CPU ms", "MiB")
            if not named and "ratio" not in row and row.get(name) and ours.get(name)
        }
        ours = row if named else ours
        result.append({**row, **ratios})
    return result


def summary() -> str:
    """Return what all runs found as one page: seconds of each, and its table, from results/."""
    from gallery_common import cell, columns

    found = [(name, RESULTS / f"{name}.json") for name in names()]
    runs = {name: json.loads(path.read_text("utf-8")) for name, path in found if path.exists()}
    times = [
        {
            "example": name, "s": run["seconds"], "CPU s": run["cpu_seconds"],
            "size": "quick" if run["options"].get("quick") else "full",
            "ranks": run["ranks"], "version": run["version"],
        }
        for name, run in runs.items()
    ]  # fmt: skip
    parts = ["# The gallery's runs"]
    for title, rows in [("", times), *((name, beside(run["rows"])) for name, run in runs.items())]:
        heads = columns(rows)
        lines = [heads, ["---"] * len(heads), *([cell(row.get(h)) for h in heads] for row in rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines if line)
        parts.append(f"## {title}\n\n{table}" if title else table)
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Run; return how many examples failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="examples, all by default")
    parser.add_argument("--again", action="store_true", help="run what is done as well")
    parser.add_argument("--figures", action="store_true", help="copy figures to docs/figures")
    parser.add_argument("--summary", action="store_true", help="run nothing, write the summary")
    options = parser.parse_args()
    known = names()
    for name in options.names:
        if name not in known:
            parser.error(f"there is no example {name}; there are {', '.join(known)}")
    failed = []
    progress = tqdm([] if options.summary else options.names or known, disable=options.summary)
    for name in progress:
        progress.set_description(name)
        if options.again or not done(name):
            command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--output", str(RESULTS)]
            # What an interrupted run has saved is of use if it was of the same options.
            saved = any(RESULTS.glob(f"{name}-*.pt"))
            code = subprocess.run([*command, *(["--resume"] if saved else [])], check=False)
            if code.returncode:
                failed.append(name)
                continue
        if options.figures:
            shrink(name)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "summary.md").write_text(summary(), "utf-8")
    print(f"wrote {RESULTS / 'summary.md'}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
