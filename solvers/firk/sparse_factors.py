"""LU of a sparse matrix, real or complex."""

from __future__ import annotations

import scipy  # its parts, which take a quarter of a second, where they are needed
import torch

__all__ = ["SparseFactors"]


class SparseFactors:
    """SuperLU's factors of a square matrix in coordinates; repeated entries add up.

    X. S. Li, An overview of SuperLU, ACM Trans. Math. Softw. 31 (2005) 302-325.

    Parameters
    ----------
    rows, columns, values : Tensor
        Shape ``(k,)``, the whole diagonal among them.

    Attributes
    ----------
    singular : Tensor
        Whether it is, shape ``(1,)``: solutions are NaN then.
    is_complex : bool
        Whether values are.
    """

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> None:
        from scipy.sparse.linalg import splu

        self._lu = None
        self.is_complex = values.is_complex()
        if bool(values.isfinite().all()):
            entries = values.cpu().numpy(), (rows.cpu().numpy(), columns.cpu().numpy())
            try:
                self._lu = splu(scipy.sparse.csc_matrix(entries))
            except RuntimeError as error:
                if "singular" not in str(error):
                    raise
        self.singular = torch.tensor([self._lu is None], device=values.device)

    def solve(self, b: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Return the solutions for right-hand sides ``(r, n)``."""
        if self._lu is None:
            return torch.full_like(b, torch.nan)
        found = self._lu.solve(b.detach().cpu().numpy().T, "T" if transposed else "N")
        return torch.from_numpy(found.T.copy()).to(b.device)
