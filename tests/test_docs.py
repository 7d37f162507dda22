"""The documentation runs and agrees with the code."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import pnode
from pnode.solvers.methods import markdown_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{index}")
    for page in PAGES
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block, capsys):
    threads = torch.get_num_threads()
    try:
        exec(compile(block, "<documentation>", "exec"), {"__name__": "documentation"})
    finally:
        torch.set_num_threads(threads)


def test_readme_has_a_python_block():
    assert any(parameter.id.startswith("README") for parameter in BLOCKS)


def test_readme_shows_the_method_table():
    assert markdown_table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [
        target for target in targets if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing


@pytest.mark.parametrize("module", ["pnode", "pnode.testing", "pnode.integrate"])
def test_docstring_examples(module):
    result = doctest.testmod(
        importlib.import_module(module), extraglobs={"torch": torch, "pnode": pnode}
    )
    assert result.attempted > 0
    assert result.failed == 0


def test_no_placeholder_is_left():
    for page in PAGES:
        assert not re.search(r"@[A-Z_]+@|TIME_[A-Z]+|TODO", page.read_text()), page
