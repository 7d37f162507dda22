"""What the solves of one solver have cost so far, and what of them is compiled or why not.

``compile="auto"`` compiles once a solver has spent about as long without as a compilation takes:
rent until the rent has added up to the price. Whatever comes after, that is at most twice the time
of who knew it before. Time is estimated from counts, never measured, so that a program takes the
same course each time it is run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pnode.base.ledger import Ledger

__all__ = ["Account", "Entry", "Work", "paid"]

# In operations of torch on few numbers, some 10 microseconds each with autograd.
# A compilation takes 10 to 20 seconds.
_PRICE = 1_500_000
# What an evaluation or a product takes besides f's own operations: callbacks, the step. (241 and
# 240 of a network of 5 operations take 40 ms, docs/compile.md: 8 each.)
_BESIDES = 4
# Evaluations after which f is looked at: of fields of up to 300 operations that is early enough.
_LOOK = _PRICE // 300
# Arithmetic that takes so much longer than what is saved is left to torch, whose kernels are good.
_LARGEST_SHARE = 10
# Operations of torch on few numbers take as long as ...
_FLOPS, _ENTRIES = 1e5, 5e3
# So often is a field compiled that is another one afterwards.
_MOST_TIMES = 3
_MOST_KINDS = 64
# Sweeps that gave up where Python's steps did not, before no more are tried.
_MOST_FAILURES = 3


@dataclass(frozen=True)
class Work:
    """One evaluation of f.

    Attributes
    ----------
    operations : int
        Calls of torch's operations.
    flops : int
        Of its matrix products and convolutions; those in single precision count half.
    entries : int
        Of all results, and of the gradient by its parameters.
    """

    operations: int
    flops: int
    entries: int

    @property
    def saved(self) -> float:
        """What compiled code saves, in operations: all calls, and half of the memory traffic."""
        return self.operations + _BESIDES + 0.5 * self.entries / _ENTRIES

    @property
    def small(self) -> bool:
        """Whether that is a good part of it."""
        whole = self.operations + _BESIDES + self.entries / _ENTRIES + self.flops / _FLOPS
        return whole <= _LARGEST_SHARE * self.saved


@dataclass
class Entry:
    """Of the solves of one kind: one shape and dtype, with gradients or without.

    Attributes
    ----------
    calls : int
        Evaluations and products so far, without compiled code.
    work : Work or None
        Of one evaluation, once f has been looked at.
    bought : bool
        Whether to compile.
    times : int
        How often that was decided.
    made : str
        What is compiled.
    left : str
        Why not more is.
    hindrance : str
        Why nothing is, for good.
    wanted : Wanted or None
        What the compiler was asked for last.
    settings : tuple of IntegratorSettings
        What that came from: of the solve, and of its state without integrals.
    failures : int
        How many compiled sweeps in a row gave up on steps that were taken without then.
    """

    calls: int = 0
    work: Work | None = None
    bought: bool = False
    times: int = 0
    made: str = ""
    left: str = ""
    hindrance: str = ""
    wanted: Any = None
    settings: tuple[Any, ...] = ()
    failures: int = 0

    @property
    def given_up(self) -> bool:
        """Whether so many have failed that no more are tried."""
        return self.failures >= _MOST_FAILURES

    def note(self, gave_up: str) -> None:
        """Note that a compiled sweep was taken, or why it gave up on steps taken without."""
        self.failures = self.failures + 1 if gave_up else 0
        if self.given_up:
            self.made = ""
            self.hindrance = f"compiled sweeps gave up {self.failures} times: {gave_up}"

    def add(self, ledger: Ledger, before: int = 0) -> None:
        """Count what a sweep has done beyond ``before``, see :func:`calls`."""
        self.calls += calls(ledger) - before

    @property
    def undecided(self) -> bool:
        """Whether there is nothing to decide yet, after a first time."""
        return 0 < self.calls < _LOOK and self.work is None

    @property
    def to_be_looked_at(self) -> bool:
        """Whether f is to be looked at."""
        return self.work is None and self.calls >= _LOOK

    def decide(self, share: float) -> None:
        """Compile if it is time to; ``share`` of what there is to save would be saved."""
        if self.work is not None and self.calls * self.work.saved * share >= _PRICE:
            self.bought = True
            self.times += 1

    def changed(self, text: str) -> None:
        """Begin anew with a field that is another one than when it was compiled."""
        self.calls, self.work, self.bought, self.made, self.left = 0, None, False, "", ""
        if self.times >= _MOST_TIMES:
            self.hindrance = text


def calls(ledger: Ledger) -> int:
    """Return how often f or its derivatives were called."""
    return ledger.rhs + ledger.jvp + ledger.vjp + ledger.jacobians


def paid(number: int, operations: int) -> bool:
    """Whether so many evaluations of so many operations have taken as long as a compilation."""
    return number * (operations + _BESIDES) >= _PRICE


@dataclass
class Account:
    """The entries of one solver."""

    entries: dict[Any, Entry] = field(default_factory=dict)

    def entry(self, key: Any) -> Entry:
        """Return the entry of a kind of solves."""
        found = self.entries.setdefault(key, Entry())
        if len(self.entries) > _MOST_KINDS:  # ever new shapes
            del self.entries[next(iter(self.entries))]
        return found

    def describe(self) -> str:
        """Say what is compiled and what is not, in a few words."""
        made = dict.fromkeys(entry.made for entry in self.entries.values() if entry.made)
        entries = self.entries.values()
        left = dict.fromkeys(text for e in entries for text in (e.left, e.hindrance) if text)
        found = [f"compiled={text!r}" for text in made]
        return ", ".join(found + [f"not compiled: {_shortened(text)}" for text in left])


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
