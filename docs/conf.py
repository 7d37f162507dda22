"""Sphinx, by `make docs`. Nothing is fetched, unless PNODE_DOCS_ONLINE=1: names elsewhere."""

import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("MPLBACKEND", "Agg")

import reference  # noqa: E402
import systems  # noqa: E402

project = "pnode"
author = "pnode developers"
copyright = "2026, pnode developers"
release = version = runpy.run_path(str(HERE.parent / "pnode/base/version.py"))["__version__"]

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
exclude_patterns = ["_build", "gallery/*.ipynb", "gallery/*.zip", "**/GALLERY_HEADER.*"]
html_theme = "furo"
html_title = f"pnode {version}"
# Programs have lines of 100 characters.
html_theme_options = {"light_css_variables": {"code-font-size": "0.75rem"}}
html_show_sourcelink = False
html_copy_source = False

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
suppress_warnings = ["config.cache"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

online = bool(os.environ.get("PNODE_DOCS_ONLINE"))
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "petsc4py": ("https://petsc.org/release/petsc4py", None),
    }
    if online
    else {}
)

sphinx_gallery_conf = {
    "examples_dirs": str(HERE.parent / "examples" / "gallery"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "download_all_examples": False,
    "abort_on_example_error": True,
    "show_memory": False,
    "min_reported_time": 1e9,
    "notebook_extensions": [],
    "show_signature": False,
}


def setup(app: object) -> None:
    """Write the pages that come from the code."""
    reference.write(HERE / "api")
    systems.write(HERE / "systems")
    app.connect("source-read", reference.adapt_links)  # type: ignore[attr-defined]
