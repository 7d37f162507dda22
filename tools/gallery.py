"""Run the gallery's examples in full, into results/: figures, tables and numbers.

    python tools/gallery.py [NAME ...] [--again] [--figures]

An example is left out where results/ has its numbers from the same source, version and options.
--figures copies the figures, made small, to docs/figures, where the documentation takes them from.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

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


def main() -> int:
    """Run; return how many examples failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="examples, all by default")
    parser.add_argument("--again", action="store_true", help="run what is done as well")
    parser.add_argument("--figures", action="store_true", help="copy figures to docs/figures")
    options = parser.parse_args()
    known = names()
    for name in options.names:
        if name not in known:
            parser.error(f"there is no example {name}; there are {', '.join(known)}")
    failed = []
    progress = tqdm(options.names or known)
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
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
