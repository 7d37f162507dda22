"""The processes of one solve: what they sum up, and how a failure on one becomes an error on all.

A rank that fails must not leave the others waiting in the next message. It remembers the failure,
goes on with NaN, or a filler where NaN would stop PETSc, and takes part in everything. All agree at
the end of the sweep, or earlier, where a step was rejected: what rejects it is a reduction that
every rank takes part in anyway.
"""

from __future__ import annotations

import hashlib
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import numpy as np
import torch
from mpi4py import MPI

from pnode.base import errors
from pnode.base.communicators import own_communicator
from pnode.base.errors import (
    ConfigurationError,
    FieldChanged,
    LinearSolveFailed,
    NonFiniteVectorField,
    NonlinearSolveFailed,
    PnodeError,
    RankError,
    SolveError,
)
from pnode.base.reals import as_reals, count_reals, from_reals
from pnode.base.vectors import REAL

__all__ = ["ALONE", "CURABLE", "Ranks"]

_NOBODY = 2**62  # key of no failure
_ORDINARY = 2**60  # added to the key of any failure but an interrupt
# Added to that of a vector field that is not what it was: perhaps of cells that another rank, which
# has failed, could not send.
_SECONDARY = 2**61
#: What a smaller step may cure.
CURABLE = (NonFiniteVectorField, NonlinearSolveFailed, LinearSolveFailed)


class Ranks:
    """The ranks of one solve. Every method is collective unless it says otherwise.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Their communicator.

    Attributes
    ----------
    rank, size : int
        Of this process, and how many there are.
    parallel : bool
        Whether there is more than one.
    where : dict
        Time, step and method of the attempt under way.
    """

    def __init__(self, comm: Any = MPI.COMM_SELF) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.parallel = comm.size > 1
        self.comm = own_communicator(comm) if self.parallel else comm
        self.where: dict[str, Any] = {}
        self._failure: BaseException | None = None
        self._place: dict[str, Any] = {}

    def __reduce__(self) -> Any:
        """Communicators belong to a process: a copy is alone."""
        return Ranks, ()

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self

    def begin(self) -> None:
        """Begin a sweep: nothing has failed. Not collective."""
        self.where, self._failure = {}, None

    @property
    def failed(self) -> bool:
        """Whether this rank has failed. Not collective."""
        return self._failure is not None

    def fail(self, error: BaseException) -> None:
        """Remember the first failure of this rank. Not collective."""
        if self._failure is None:
            self._failure, self._place = error, dict(self.where)

    def refuse(self, error: BaseException) -> None:
        """Raise an error; among several ranks remember it, unless something else has failed before.

        Not collective.
        """
        if not self.parallel:
            raise error
        self.fail(error)

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call something that does not communicate. Not collective.

        Alone, an exception comes through. Among several ranks it is remembered, and the result is
        None, as it is once something has failed.
        """
        if not self.parallel:
            return function(*arguments)
        if self._failure is not None:
            return None
        try:
            return function(*arguments)
        except BaseException as error:
            self.fail(error)
            return None

    def settle(self, error: SolveError | None = None) -> PnodeError | None:
        """Agree on what has failed, and forget it.

        Parameters
        ----------
        error : SolveError, optional
            A failure that all ranks know of.

        Returns
        -------
        PnodeError or None
            An interrupt of a single rank, else the earliest failure of one, the same on all of
            them; ``error`` if there is none. To be raised by :meth:`stop`.
        """
        if not self.parallel:
            return error
        own, self._failure = self._failure, None
        key = np.array([_NOBODY if own is None else self._key(own)], np.int64)
        self.comm.Allreduce(MPI.IN_PLACE, key, MPI.MIN)
        if key[0] == _NOBODY:
            return error
        origin = int(key[0]) % _ORDINARY % self.size
        text = self.comm.bcast(
            _describe(own, self._place) if self.rank == origin and own is not None else None, origin
        )
        found = _rebuild(text, origin)
        if self.rank == origin or _interrupts(own):
            found.__cause__ = own
        return found

    def _key(self, own: BaseException) -> int:
        """Return by what a failure comes before others: the least is the one that all raise.

        In the same step one that a smaller step may cure comes last: it alone may be passed over.
        """
        curable = isinstance(own, CURABLE)
        place = (2 * self._place.get("step", 0) + curable) * self.size + self.rank
        if isinstance(own, FieldChanged):
            return place + _SECONDARY
        return place + (0 if _interrupts(own) else _ORDINARY)

    def least(self, mark: int) -> int:
        """Return the least of the ranks' marks, which are not negative.

        Raises
        ------
        PnodeError
            If a rank has failed since the sweep began; within :meth:`together`, which stops it.
        """
        return self.extremes(mark)[0]

    def extremes(self, mark: int) -> tuple[int, int]:
        """Do as :meth:`least`, and return the greatest mark too."""
        if not self.parallel:
            return mark, mark
        own = np.array([-1 if self.failed else mark, -mark], np.int64)
        self.comm.Allreduce(MPI.IN_PLACE, own, MPI.MIN)
        if own[0] < 0:
            found = self.settle()
            assert found is not None
            raise found from found.__cause__
        return int(own[0]), -int(own[1])

    @staticmethod
    def stop(found: PnodeError) -> NoReturn:
        """Raise what :meth:`settle` has found. Not collective.

        An interrupt stays one on its own rank. It is raised where no reduction follows any more,
        as the others, which hear of it by a :class:`RankError`, take part in all of them.
        """
        cause = found.__cause__
        if _interrupts(cause):
            found.__cause__ = None
            assert cause is not None
            raise cause from cause.__cause__
        raise found from cause

    def together(self, agree: bool = True) -> AbstractContextManager[None]:
        """Agree at the end on whether something has failed, and raise it on all ranks.

        Not at a good end without ``agree``: the caller's own reduction follows, which tells.
        """
        return self._together(agree) if self.parallel else nullcontext()

    @contextmanager
    def _together(self, agree: bool) -> Iterator[None]:
        self.begin()
        try:
            yield
        except SolveError as error:  # raised where all ranks knew
            found = self.settle(error)
            assert found is not None
            if found is error and not _interrupts(error.__cause__):
                raise
            self.stop(found)
        found = self.settle() if agree else None
        if found is not None:
            self.stop(found)

    def compare(
        self, names: Sequence[str], facts: Mapping[str, Any] | None, size: int
    ) -> tuple[int, int]:
        """See to it that all ranks were given the same.

        Parameters
        ----------
        names : sequence of str
            What is compared.
        facts : mapping or None
            By name; None if this rank has failed (see :meth:`fail`).
        size : int
            Local entries of the state.

        Returns
        -------
        largest : int
            The largest size.
        distribution : int
            A fingerprint of all sizes.

        Raises
        ------
        ConfigurationError
            If something differs, or the arguments are unusable on one rank.
        """
        if not self.parallel:
            return size, 0
        marks = [0 if facts is None else _digest(facts[name]) for name in names]
        own = np.array([0 if self.failed else 1, -size, *marks, *(-m for m in marks)], np.int64)
        low = np.empty_like(own)
        self.comm.Allreduce(own, low, MPI.MIN)
        total = np.array([_digest((self.rank, size)) >> 20], np.int64)
        self.comm.Allreduce(MPI.IN_PLACE, total, MPI.SUM)
        if not low[0]:
            found = self.settle()
            assert found is not None
            self.stop(found)
        assert facts is not None
        least, most = low[2 : 2 + len(names)], -low[2 + len(names) :]
        for name in (name for name, a, b in zip(names, least, most, strict=True) if a != b):
            raise _mismatch(name, self.comm.allgather(facts[name]))
        return int(-low[1]), int(total[0])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of a contiguous tensor, by way of the host."""
        if not self.parallel:
            return values
        total = values.detach().to("cpu", copy=True)
        self.comm.Allreduce(MPI.IN_PLACE, total.numpy(), MPI.SUM)
        return total.to(values.device)

    def norm(self, values: torch.Tensor) -> float:
        """Return the Euclidean norm of a distributed vector."""
        return float(self.sum(values.square().sum(dtype=torch.float64).reshape(1))) ** 0.5

    def rms(self, values: torch.Tensor) -> float:
        """Return the root mean square of the entries of a distributed vector."""
        if not self.parallel:
            return math.sqrt(values.square().mean().item())
        local = torch.stack([
            values.square().sum(dtype=torch.float64).cpu(),
            torch.tensor(float(values.numel()), dtype=torch.float64, device="cpu"),
        ])  # fmt: skip
        square, number = self.sum(local).tolist()
        return float((square / number) ** 0.5)

    def greatest(self, values: torch.Tensor) -> float:
        """Return the largest absolute value of a distributed vector; infinity if one is NaN."""
        own = float(values.abs().max().nan_to_num(nan=math.inf)) if values.numel() else 0.0
        if not self.parallel:
            return own
        largest = np.array([own])
        self.comm.Allreduce(MPI.IN_PLACE, largest, MPI.MAX)
        return float(largest[0])

    def sum_gradients(
        self, gradients: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Return the sums of parameter gradients, by one reduction.

        Parameters
        ----------
        gradients : sequence of Tensor or None
            This rank's, PETSc's precision, complex for complex parameters; None for a parameter
            that it did not use.
        like : sequence of Tensor
            The parameters.

        Returns
        -------
        list of Tensor or None
            None for parameters that no rank used.

        Raises
        ------
        PnodeError
            If a rank has failed since the sweep began.
        """
        if not self.parallel:
            return list(gradients)
        number = len(like)
        sizes = [count_reals(p) for p in like]
        flat = torch.zeros(1 + number + sum(sizes), dtype=REAL, device="cpu")
        flat[0] = float(self.failed)
        parts = flat[1 + number :].split(sizes) if number else ()
        for index, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
            if gradient is not None:
                flat[1 + index] = 1.0
                part.copy_(as_reals(gradient))
        self.comm.Allreduce(MPI.IN_PLACE, flat.numpy(), MPI.SUM)
        if flat[0]:
            found = self.settle()
            assert found is not None
            self.stop(found)
        used = flat[1 : 1 + number].tolist()
        return [
            from_reals(part, p) if count else None
            for part, p, count in zip(parts, like, used, strict=True)
        ]


#: One process by itself.
ALONE = Ranks()


def _interrupts(error: BaseException | None) -> bool:
    """Whether an exception is to end the program rather than to be handled by it."""
    return error is not None and not isinstance(error, Exception)


def _digest(fact: Any) -> int:
    data = repr(fact).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")


def _mismatch(name: str, values: list[Any]) -> ConfigurationError:
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(repr(value), []).append(rank)
    texts = [
        f"{value if len(value) < 200 else value[:200] + '...'} on rank"
        f"{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}"
        + ("..." if len(ranks) > 8 else "")
        for value, ranks in list(groups.items())[:4]
    ]
    return ConfigurationError(
        f"{name} differs between the ranks of comm=: {'; '.join(texts)}; all ranks of a solve "
        "must be given the same (for a solve of each rank's own, leave comm= out)"
    )


def _describe(error: BaseException, where: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the other ranks need to raise the same error."""
    name = type(error).__name__
    if isinstance(error, SolveError):
        located = {
            key: where.get(key) if getattr(error, key) is None else getattr(error, key)
            for key in ("time", "step", "method")
        }
        return {"name": name, "message": error.message, **located, "reason": error.reason}
    if isinstance(error, PnodeError):
        return {"name": name, "message": str(error)}
    lines = traceback.format_exception_only(type(error), error)
    return {
        "name": "RankError", "message": f"the user's code raised {''.join(lines).strip()}", **where,
    }  # fmt: skip


def _rebuild(text: Mapping[str, Any], rank: int) -> PnodeError:
    kind: Any = getattr(errors, text["name"], RankError)
    if not issubclass(kind, SolveError):
        return kind(f"{text['message']} [rank {rank}]")
    located = {key: text.get(key) for key in ("time", "step", "method", "reason")}
    return kind(text["message"], rank=rank, **located)
