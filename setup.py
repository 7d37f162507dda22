"""Where the packages lie; all other metadata are in pyproject.toml.

``solvers/`` and ``adjoint/`` stand at the top of the repository and are installed as
``pnode.solvers`` and ``pnode.adjoint``. The links ``pnode/solvers`` and ``pnode/adjoint`` show the
same package to a plain clone, to an editable install and to mypy.

An editable install is a line in a .pth file, which mypy and editors follow (they do not run import
hooks): the path of ``tools/editable``, where there is a link to pnode and nothing else.

A source distribution has these links as links, which setuptools would follow.
"""

import os
import sys

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

LINKS = ("pnode/solvers", "pnode/adjoint", "tools/editable/pnode")
FOLDERS = {"pnode": "pnode", "pnode.solvers": "solvers", "pnode.adjoint": "adjoint"}

packages = list(FOLDERS)
for package, folder in FOLDERS.items():
    inner = find_packages(folder, exclude=["solvers*", "adjoint*"])
    packages += [f"{package}.{name}" for name in inner]


class SourceDistribution(sdist):
    """The files that MANIFEST.in names, and links."""

    def make_release_tree(self, base_dir, files):  # noqa: D102
        followed = tuple(f"{link}/" for link in LINKS)
        super().make_release_tree(base_dir, [f for f in files if not f.startswith(followed)])
        for link in LINKS:
            path = os.path.join(base_dir, link)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(os.readlink(link), path)


setup(
    cmdclass={"sdist": SourceDistribution},
    packages=packages,
    package_dir={"": "tools/editable"} if "editable_wheel" in sys.argv else FOLDERS,
)
