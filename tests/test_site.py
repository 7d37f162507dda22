"""The documentation site: it builds without a warning and without network, and all is on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import pnode
from pnode import controllers, controls, errors, parallel, testing

pytest.importorskip("sphinx")
for name in ("myst_parser", "numpydoc", "sphinx_gallery", "furo"):
    pytest.importorskip(name)
ROOT = Path(__file__).resolve().parent.parent
# Connections are refused where Python makes them.
NO_NETWORK = """
import socket, sys
def refuse(*arguments, **keywords):
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("href", "src") and value:
                self.links.append(value)
            if key in ("id", "name") and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "examples", "pnode", "solvers", "adjoint"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(folder)], check=True)
    for made in ("api", "gallery", "systems", "_build"):
        subprocess.run(["rm", "-rf", str(folder / "docs" / made)], check=True)
    command = [sys.executable, "-c", NO_NETWORK, "-q", "-W", "--keep-going", "-b", "html"]
    command += [str(folder / "docs"), str(folder / "html")]
    environment = {key: value for key, value in os.environ.items() if "ONLINE" not in key}
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "html"


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    anchors = {
        anchor
        for path in (site / "api").glob("*.html")
        for anchor in Page(path.read_text()).anchors
    }
    wanted = {f"pnode.errors.{name}" for name in errors.__all__}
    for module in (pnode, parallel, testing, controllers, controls):
        wanted |= {f"{module.__name__}.{name}" for name in module.__all__}
    elsewhere = {f"pnode.{name}" for name in errors.__all__}
    wanted -= elsewhere | {"pnode.__version__", "pnode.controls", "pnode.parallel", "pnode.testing"}
    assert wanted <= anchors, wanted - anchors
    for method in ("plot", "table", "save", "to_xarray", "write_xdmf", "stages", "vec"):
        assert f"pnode.Solution.{method}" in anchors


def test_all_links_lead_somewhere(site: Path) -> None:
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 30
    missing = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"\w+:", link) or path.name in ("search.html", "genindex.html"):
                continue
            target, anchor = urldefrag(unquote(link))
            where = (path.parent / target.partition("?")[0]).resolve() if target else path
            found = pages.get(where)
            if not where.exists() or (anchor and found and anchor not in found.anchors):
                missing.append((str(path.relative_to(site)), link))
    assert not missing


def test_gallery_search_and_errors(site: Path) -> None:
    figures = {path.name for path in (site / "_images").iterdir()}
    for name in ("plot_robertson", "plot_events", "plot_learning"):
        assert f"sphx_glr_{name}_001.png" in figures
        assert f"sphx_glr_{name}_001.png" in (site / "gallery" / f"{name}.html").read_text()
    index = (site / "searchindex.js").read_text()
    assert '"Solver"' in index and "getting_started" in index
    page = (site / "api" / "errors.html").read_text()
    assert all(f"pnode.errors.{name}" in page for name in errors.__all__)
    assert "robertson.png" in (site / "index.html").read_text()


def test_a_browser_shows_the_start_page_the_search_and_a_figure(site: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_site.py"), str(site)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode == 2:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0 and run.stdout.count("ok\n") == 3, run.stdout + run.stderr


def test_nothing_is_left_of_links_to_files(site: Path) -> None:
    """Files of the repository that have no page are plain text."""
    for path in site.glob("*.html"):
        assert not re.search(r"\]\(\.\./", path.read_text()), path.name
