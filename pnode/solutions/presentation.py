"""How a solution is shown and kept: text, pictures, labelled arrays, files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pnode.base.version import __version__
from pnode.layout.grids import Grid
from pnode.solutions import hdf5, labelled, plotting, tables, xdmf

__all__ = ["Presentation"]


class Presentation:
    """What :class:`pnode.Solution` can show and keep of itself. Values only: no gradients."""

    def __repr__(self) -> str:
        """Times, shapes, steps and why the solve ended, in one line."""
        return tables.short(self)

    def _repr_html_(self) -> str:
        """The same above a table of the first and last rows, for notebooks."""
        return tables.as_html(self)

    def table(self, rows: int | None = 20, *, names: Sequence[str] | None = None) -> str:
        """Return a table of the states at the output times, as text. Not collective.

        Parameters
        ----------
        rows : int or None
            At most so many rows, half of them the first and half the last; None for all.
        names : sequence of str, optional
            Names of the columns: one for each entry of the state, and of ``costs``. Without them
            at most 12 columns are shown.

        Returns
        -------
        str
            Six significant digits; columns "t", "y[0]", ... and "costs".

        Raises
        ------
        ConfigurationError
            For names of another number, and where each sample has output times of its own.
        """
        return tables.as_text(self, rows, names)

    def plot(
        self,
        ax: Any = None,
        *,
        names: Sequence[str] | None = None,
        xscale: Literal["auto", "linear", "log"] = "auto",
        yscale: Literal["auto", "linear", "log"] = "auto",
    ) -> Any:
        """Draw the states over time with matplotlib. Not collective: of ranks, this one's part.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where; by default in a figure of its own.
        names : sequence of str, optional
            Names of the entries of the state. With them all are drawn as lines; without, states
            of more than 20 entries are drawn as an image, entries over time.
        xscale : {"auto", "linear", "log"}
            "auto" is logarithmic where the output times span two decades or more, and most of
            them lie in the first tenth. A start at zero is kept: the axis is linear up to the
            first output then.
        yscale : {"auto", "linear", "log"}
            "auto" is logarithmic where no entry is negative and some are usually a thousandth of
            the largest, or less.

        Returns
        -------
        matplotlib.axes.Axes
            The axes. Events are marked: a dotted line at each time, a circle at each state.

        Raises
        ------
        ConfigurationError
            For names of another number, and scales that are none.
        MissingPackage
            Without matplotlib: ``pip install 'pnode[plot]'``.
        """
        return plotting.plot(self, ax, names, xscale, yscale)

    def save(self, path: Any, *, comm: Any = None, grid: Grid | None = None) -> None:
        """Write times, states, costs, events and counts to an HDF5 file. Collective.

        Parameters
        ----------
        path : str or os.PathLike
            The file. One that exists is replaced, once the new one is complete.
        comm : mpi4py.MPI.Intracomm, optional
            Ranks that share the state: the file has the parts of all of them, each with its name.
            Rank 0 writes, and holds one other part at a time.
        grid : Grid, optional
            Instead, of a state on a grid: the file can be read by other numbers of ranks, too.

        Raises
        ------
        ConfigurationError
            If the state is in containers other than tuples, lists, dicts and NamedTuples, or is
            not the grid's, or if no file can be written there.
        MissingPackage
            Without h5py: ``pip install 'pnode[io]'``.

        See Also
        --------
        pnode.load : Reads it back.
        """
        hdf5.write(self, path, comm, grid, __version__)

    def to_xarray(self, *, names: Sequence[str] | None = None, grid: Grid | None = None) -> Any:
        """Return an ``xarray.Dataset``, whose arrays have names and dimensions. Not collective.

        Parameters
        ----------
        names : sequence of str, optional
            Names of the tensors of the state; by default "y", or "y[0]", "y[1]" of a tuple.
        grid : Grid, optional
            Dimensions of a state on it are "cell_0", "cell_1", ... (and "field" first), with the
            numbers of this rank's cells as coordinates.

        Returns
        -------
        xarray.Dataset
            Each tensor with dimensions "time", "y_0", ...; "costs"; of the i-th event "event_i_y"
            over "event_i", its times. Attributes: "reason", and "stats" as JSON.

        Raises
        ------
        ConfigurationError
            For names of another number, and where each sample has output times of its own.
        MissingPackage
            Without xarray: ``pip install 'pnode[io]'``.
        """
        return labelled.to_xarray(self, names, grid)

    def write_xdmf(
        self,
        path: Any,
        grid: Grid,
        *,
        names: Sequence[str] | None = None,
        spacing: float | Sequence[float] = 1.0,
        origin: float | Sequence[float] = 0.0,
    ) -> None:
        """Write a solution on a grid for ParaView: XDMF, and HDF5 beside it. Collective.

        Parameters
        ----------
        path : str or os.PathLike
            The file, which ends in .xdmf; the numbers go to one that ends in .h5.
        grid : Grid
            The solve's ``layout``. Rank 0 writes one output time after the other.
        names : sequence of str, optional
            Names of the fields.
        spacing, origin : float or sequence of float
            Size of a cell, and where the first one begins, in each dimension.

        Raises
        ------
        ConfigurationError
            If the state is not the grid's, and for other unusable arguments.
        MissingPackage
            Without meshio and h5py: ``pip install 'pnode[io]'``.
        """
        xdmf.write(self, path, grid, names, spacing, origin)
