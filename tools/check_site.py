"""Look at the built site with a browser: the start page, the search, a figure of the gallery.

    python tools/check_site.py [FOLDER]      # docs/_build/html by default; make docs-browser

What only a browser runs is looked at here: the search is JavaScript. Chromium (or Chrome) without a
window prints the page as it is after its scripts have run; ``CHROMIUM`` names one that is not on
the path. Exit code 0: all is there; 1: something is missing; 2: nothing was looked at, since there
is no browser or no site. Nothing is fetched but from this machine.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SITE = Path(__file__).resolve().parent.parent / "docs" / "_build" / "html"
FIGURE = "sphx_glr_plot_robertson_001.png"
#: Page, what it must show once its scripts have run, and a file that it must have asked for.
LOOKS = (
    ("index.html", "exact discrete gradients", "/_images/plot_robertson.png"),
    ("search.html?q=Solver", 'href="api/', "/searchindex.js"),
    ("gallery/plot_robertson.html", FIGURE, f"/_images/{FIGURE}"),
)


def browser() -> str | None:
    """Return the path of a Chromium, None if there is none."""
    named = os.environ.get("CHROMIUM")
    found = [shutil.which(name) for name in ([named] if named else NAMES)]
    return next(filter(None, found), None)


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, set[str]]]:
    """Serve a folder on this machine; yield its address and the files that were asked for."""
    sent: set[str] = set()

    class Handler(SimpleHTTPRequestHandler):
        def send_response(self, code: int, message: str | None = None) -> None:
            if code in (200, 304):
                sent.add(self.path.partition("?")[0])
            super().send_response(code, message)

        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()


def page(program: str, address: str) -> str:
    """Return a page as it is after its scripts have run, blanks and line ends as one blank."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program, "--headless", "--disable-gpu", "--no-sandbox", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom", address,
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if run.returncode:
        raise SystemExit(f"{program} ended with {run.returncode}: {run.stderr[-2000:]}")
    return " ".join(run.stdout.split())


def main(folder: Path) -> int:
    """Look at the site."""
    program = browser()
    if program is None:
        looked = os.environ.get("CHROMIUM") or ", ".join(NAMES)
        print(f"NOT CHECKED: no browser. Looked for {looked}; set CHROMIUM=/path/to/it.")
        return 2
    if not (folder / "index.html").exists():
        print(f"NOT CHECKED: no site in {folder}: make docs")
        return 2
    missing = 0
    with served(folder) as (address, sent):
        for where, shown, asked in LOOKS:
            text = page(program, f"{address}/{where}")
            faults = [f"does not show {shown!r}"] if shown not in text else []
            faults += [f"has not loaded {asked}"] if asked not in sent else []
            print(f"{where}: {' and '.join(faults) or 'ok'}")
            missing += len(faults)
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else SITE))
