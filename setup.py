"""Where the packages lie; all other metadata are in pyproject.toml.

``solvers/`` and ``adjoint/`` stand at the top of the repository and are installed as
``pnode.solvers`` and ``pnode.adjoint``. The links ``pnode/solvers`` and ``pnode/adjoint`` show the
same package to a plain clone, to an editable install and to mypy.
"""

from setuptools import find_packages, setup

FOLDERS = {"pnode": "pnode", "pnode.solvers": "solvers", "pnode.adjoint": "adjoint"}

packages = list(FOLDERS)
for package, folder in FOLDERS.items():
    inner = find_packages(folder, exclude=["solvers*", "adjoint*"])
    packages += [f"{package}.{name}" for name in inner]

setup(packages=packages, package_dir=FOLDERS)
