"""The documentation runs and agrees with the code."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import pnode
from pnode.solvers.methods import METHODS, markdown_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {page: re.findall(r"```python\n(.*?)```", page.read_text(), re.S) for page in PAGES}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCKS[page]], ids=lambda page: page.name
)
def test_python_blocks_run(page, capsys):
    """Later blocks of a page may use what earlier ones have defined."""
    threads = torch.get_num_threads()
    namespace = {"__name__": "documentation"}
    try:
        for block in BLOCKS[page]:
            exec(compile(block, "<documentation>", "exec"), namespace)
    finally:
        torch.set_num_threads(threads)


def test_readme_has_a_python_block():
    assert BLOCKS[ROOT / "README.md"]


def test_readme_shows_the_method_table():
    assert markdown_table() in (ROOT / "README.md").read_text()


def test_the_start_page_counts_the_methods():
    start = (ROOT / "docs" / "index.md").read_text()
    assert f"{len(METHODS)} methods" in " ".join(start.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [
        target for target in targets if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing


@pytest.mark.parametrize(
    "module", ["pnode", "pnode.testing", "pnode.solver", "pnode.layout.grids", "pnode.parallel"]
)
def test_docstring_examples(module):
    result = doctest.testmod(
        importlib.import_module(module), extraglobs={"torch": torch, "pnode": pnode}
    )
    assert result.attempted > 0
    assert result.failed == 0


def test_no_placeholder_is_left():
    for page in PAGES:
        assert not re.search(r"@[A-Z_]+@|TIME_[A-Z]+|TODO", page.read_text()), page
