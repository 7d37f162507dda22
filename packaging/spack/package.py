# ruff: noqa: F403, F405
"""Recipe for spack. Not built by us so far; there is no published release to name a URL of."""

from spack.package import *


class PyPnode(PythonPackage):
    """PETSc time integrators with discrete adjoints for vector fields written in torch."""

    license("BSD-2-Clause")
    # Once there is a release: pypi = "pnode/pnode-0.2.0.tar.gz" and its checksum in version().
    version("0.2.0")

    variant("plot", default=False, description="Pictures of solutions")
    variant("io", default=False, description="HDF5, xarray and XDMF")

    depends_on("python@3.11:", type=("build", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("petsc@3.22:~complex+double", type=("build", "run"))
    depends_on("py-petsc4py@3.22:", type=("build", "run"))
    depends_on("py-mpi4py@4:", type=("build", "run"))
    depends_on("py-torch@2.4:", type=("build", "run"))
    depends_on("py-numpy@1.26:", type=("build", "run"))
    depends_on("py-scipy", type=("build", "run"))
    depends_on("py-tqdm", type=("build", "run"))
    depends_on("py-typing-extensions@4.10:", type=("build", "run"))
    # Not in spack's own repository when this was written.
    depends_on("py-petsctools@2025.3:", type=("build", "run"))
    depends_on("py-matplotlib@3.8:", type=("build", "run"), when="+plot")
    depends_on("py-h5py@3.10:", type=("build", "run"), when="+io")
    depends_on("py-xarray@2024.1:", type=("build", "run"), when="+io")
    depends_on("py-meshio@5.3:", type=("build", "run"), when="+io")
