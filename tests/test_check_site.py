"""tools/check_site.py: what a browser shows is looked at, and the lack of one is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "check_site.py"
# In place of Chromium: prints a page, and asks for the files that the page names; of the search,
# what Sphinx's script would make of its index.
BROWSER = f"""#!{sys.executable}
import re, sys, urllib.parse, urllib.request
address = sys.argv[-1]
def get(name):
    where = urllib.parse.urljoin(address, name)
    try:
        return urllib.request.urlopen(where).read().decode()
    except OSError:
        return ""
text = get(address)
for name in re.findall('src="([^"]*)"', text):
    text += get(name)
print(text)
"""


def look(folder: Path, path: Path | None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"CHROMIUM": str(path or folder / "nowhere")}
    return subprocess.run(
        [sys.executable, str(TOOL), str(folder)], capture_output=True, text=True, check=False,
        env=environment, timeout=60,
    )  # fmt: skip


@pytest.fixture
def site(tmp_path):
    figure = "sphx_glr_plot_robertson_001.png"
    for name, text in {
        "index.html": 'with exact discrete gradients <img src="_images/plot_robertson.png">',
        "search.html": '<script src="searchindex.js"></script>',
        "searchindex.js": '<a href="api/solver.html">',
        "gallery/plot_robertson.html": f'<img src="../_images/{figure}">',
        "_images/plot_robertson.png": "",
        f"_images/{figure}": "",
    }.items():
        path = tmp_path / "html" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "html"


@pytest.fixture
def browser(tmp_path):
    path = tmp_path / "chromium"
    path.write_text(BROWSER)
    path.chmod(0o755)
    return path


def test_no_browser_and_no_site_are_told(site, browser, tmp_path):
    done = look(site, None)
    assert done.returncode == 2 and "NOT CHECKED: no browser" in done.stdout
    done = look(tmp_path / "nothing", browser)
    assert done.returncode == 2 and "NOT CHECKED: no site" in done.stdout


def test_a_whole_site_passes(site, browser):
    done = look(site, browser)
    assert done.returncode == 0 and done.stdout.count("ok\n") == 3, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name, told",
    [
        ("_images/sphx_glr_plot_robertson_001.png", "has not loaded"),
        ("searchindex.js", "does not show 'href=\"api/'"),
        ("index.html", None),
    ],
)
def test_what_is_missing_is_found(site, browser, name, told):
    (site / name).unlink()
    done = look(site, browser)
    assert done.returncode == (2 if told is None else 1), done.stdout + done.stderr
    assert told is None or told in done.stdout
