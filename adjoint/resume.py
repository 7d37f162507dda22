"""A forward sweep that can be taken up again after its process was killed.

What is needed lies in one folder with a name: the problem's fingerprint, a journal of accepted
steps and outputs, the outputs, and the checkpoints, each of which ends with the state that its step
started from. Checkpoints in memory are lost with the process; the sweep goes on from the last of
those on disk that follow one another from the first step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import torch

from pnode.adjoint.disk import DiskFolder
from pnode.adjoint.store import CheckpointStore
from pnode.errors import CheckpointError
from pnode.solvers.stepping import Step

__all__ = ["Progress", "fingerprint"]


def _leave(journal: TextIO, lock: Path) -> None:
    journal.close()
    lock.unlink(missing_ok=True)


def fingerprint(facts: dict[str, Any], tensors: Iterable[torch.Tensor]) -> dict[str, str]:
    """Return what must be the same when a sweep is taken up again."""
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().resolve_conj().contiguous().cpu()
        digest.update(str((values.dtype, tuple(values.shape))).encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {name: repr(value) for name, value in facts.items()} | {"tensors": digest.hexdigest()}


class Progress(DiskFolder):
    """The folder of a sweep that can be taken up again; what is there already is read.

    Parameters
    ----------
    scratch : path
        An existing folder.
    name : str
        The sweep's name in it.
    identity : dict
        From :func:`fingerprint`.

    Attributes
    ----------
    steps : list of Step
        Steps done before.
    outputs : list of (int, Tensor)
        For each output reached before: how many steps come before it, and the state.
    start : Tensor or None
        State to go on from; None to begin.

    Raises
    ------
    CheckpointError
        If another living solve uses the folder, or it belongs to another problem.
    """

    def __init__(
        self, scratch: str | os.PathLike[str], name: str, identity: dict[str, str]
    ) -> None:
        self.path = Path(scratch).resolve() / f"pnode-{name}"
        self.path.mkdir(exist_ok=True)
        self._take_lock()
        self.steps: list[Step] = []
        self.outputs: list[tuple[int, torch.Tensor]] = []
        self.start: torch.Tensor | None = None
        known = self.path / "problem.json"
        if known.exists():
            self._check(json.loads(known.read_text()), identity)
            self._read_journal()
        else:
            partial = self.path / "problem.partial"
            partial.write_text(json.dumps(identity))
            partial.replace(known)
        self._journal = (self.path / "journal").open("a", encoding="ascii")
        self._let_go = weakref.finalize(self, _leave, self._journal, self.path / "lock")

    def close(self) -> None:
        """Remove the folder: the sweep is over."""
        self._let_go()
        shutil.rmtree(self.path, ignore_errors=True)

    def leave(self) -> None:
        """Leave the folder for later."""
        self._let_go()

    def add_step(self, step: Step) -> None:
        """Note an accepted step."""
        self._write(
            ["step", step.index, step.start.hex(), step.length.hex(), step.end.hex(), step.order]
        )

    def add_output(self, number: int, steps: int, state: torch.Tensor) -> None:
        """Note that output ``number`` was reached after so many steps."""
        self.write(f"output-{number}", (state.detach().clone(),))
        self._write(["output", number, steps])

    def adopt(self, store: CheckpointStore) -> None:
        """Hand the checkpoints of the steps done before to a store."""
        for step in self.steps:
            name = f"stages-{step.index}"
            store.adopt(("stages", step.index), name, (self.path / name).stat().st_size)

    def _write(self, line: list[Any]) -> None:
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()

    def _read_journal(self) -> None:
        """Read how far the sweep came, and cut the journal back to there."""
        journal = self.path / "journal"
        lines = []
        for text in journal.read_text().splitlines() if journal.exists() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:  # the line that was being written
                break
        done = 0
        while (self.path / f"stages-{done}").exists():
            done += 1
        kept = max(0, done - 1)  # the last of them is done again, from its start
        steps = {}
        for line in lines:
            if line[0] == "step":
                index, start, length, end, order = line[1:]
                steps[index] = Step(
                    index, float.fromhex(start), float.fromhex(length), float.fromhex(end), order
                )
        kept = min(kept, len(steps))
        if not kept:
            lines = []
        self.steps = [steps[index] for index in range(kept)]
        for line in lines:
            if line[0] == "output" and line[2] <= kept:
                self.outputs.append((line[2], self.read(f"output-{line[1]}")[0]))
        if kept:
            self.start = self.read(f"stages-{kept}")[-1]
        partial = self.path / "journal.partial"
        with partial.open("w", encoding="ascii") as file:
            for line in lines:
                if line[2 if line[0] == "output" else 1] < kept + (line[0] == "output"):
                    file.write(json.dumps(line) + "\n")
        partial.replace(journal)

    def _check(self, found: dict[str, str], identity: dict[str, str]) -> None:
        different = sorted(
            name for name in {*found, *identity} if found.get(name) != identity.get(name)
        )
        if different:
            (self.path / "lock").unlink(missing_ok=True)
            raise CheckpointError(
                f"the folder {self.path} belongs to another sweep: {', '.join(different)} differ "
                "(tensors are y0 and the parameters); choose another resume= name, or remove it"
            )

    def _take_lock(self) -> None:
        lock = self.path / "lock"
        try:
            owner = int(lock.read_text())
            os.kill(owner, 0)
        except (OSError, ValueError):  # no lock, or its owner is no more
            lock.write_text(str(os.getpid()))
            return
        raise CheckpointError(
            f"the folder {self.path} is in use by process {owner}: a resume= name serves one solve "
            "at a time, until its gradient has been taken"
        )
