"""Where the packages lie; all other metadata are in pyproject.toml.

``solvers/`` and ``adjoint/`` stand at the top of the repository and are installed as
``pnode.solvers`` and ``pnode.adjoint``. The links ``pnode/solvers`` and ``pnode/adjoint`` show the
same package to a plain clone, to an editable install and to mypy.

An editable install is a line in a .pth file, which mypy and editors follow (they do not run import
hooks): the path of ``tools/editable``, where there is a link to pnode and nothing else.
"""

import sys

from setuptools import find_packages, setup

FOLDERS = {"pnode": "pnode", "pnode.solvers": "solvers", "pnode.adjoint": "adjoint"}

packages = list(FOLDERS)
for package, folder in FOLDERS.items():
    inner = find_packages(folder, exclude=["solvers*", "adjoint*"])
    packages += [f"{package}.{name}" for name in inner]

setup(
    packages=packages,
    package_dir={"": "tools/editable"} if "editable_wheel" in sys.argv else FOLDERS,
)
