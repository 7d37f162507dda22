"""A forward sweep that can be taken up again after its process was killed.

What is needed lies in one folder with a name: the problem's fingerprint, a journal of accepted
steps and outputs, the outputs, and the checkpoints, each of which ends with the state that its step
started from. Checkpoints in memory are lost with the process; the sweep goes on from the last of
those on disk that follow one another from the first step.

Every line of the journal begins with its checksum. The folder is for this user alone, and for one
solve at a time: see :mod:`pnode.adjoint.lock`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import weakref
import zlib
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from pnode.adjoint.disk import DiskFolder
from pnode.adjoint.lock import FolderLock
from pnode.adjoint.store import CheckpointStore
from pnode.base import private_files
from pnode.base.errors import CheckpointError, ConfigurationError
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.stepping import Step

__all__ = ["Progress"]

_FORMAT = 2
_PROBLEM, _JOURNAL, _LOCK = "problem.json", "journal", "lock"
# What a process that was killed leaves of the line it was writing.
_TORN = re.compile(rb'[0-9a-f]{0,8}|[0-9a-f]{8} (\[("[\x20-\x7e]*)?)?')
_STEP_FIELDS = [field.name for field in fields(Step)]


def _leave(journal: list[int], lock: FolderLock, process: int) -> None:
    if os.getpid() == process:  # a fork has copies, and is not the sweep
        while journal:
            os.close(journal.pop())
        lock.release()


def _line(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _value(line: bytes) -> Any:
    """Return what a line says; a ``ValueError`` if it is not as it was written."""
    if line[8:9] != b" " or line[:8] != f"{zlib.crc32(line[9:]):08x}".encode():
        raise ValueError("checksum")
    return json.loads(line[9:])


def _numbers(step: Step) -> list[Any]:
    values = [getattr(step, name) for name in _STEP_FIELDS]
    return [value.hex() if isinstance(value, float) else value for value in values]


def _step(numbers: list[Any]) -> Step:
    values: list[Any] = [float.fromhex(n) if isinstance(n, str) else n for n in numbers]
    return Step(*values)


class Progress(DiskFolder):
    """The folder of a sweep that can be taken up again; what is there already is read.

    Parameters
    ----------
    scratch : path
        An existing folder.
    name : str
        The sweep's name in it.
    identity : dict
        What must be the same, by name; see :mod:`pnode.adjoint.identity`.

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
        If another living solve uses the folder, it belongs to another problem or another user, or
        something in it is damaged.
    ConfigurationError
        If the folder cannot be made.
    """

    _own = True

    def __init__(
        self, scratch: str | os.PathLike[str], name: str, identity: dict[str, str]
    ) -> None:
        self.path = Path(scratch).resolve() / f"pnode-{name}"
        self._remedy = f"remove the folder {self.path} to begin anew"
        self._make(scratch)
        self._lock = FolderLock(self.path / _LOCK)
        self._journal: list[int] = []  # its descriptor, while it is open
        self._let_go = weakref.finalize(self, _leave, self._journal, self._lock, os.getpid())
        self.steps: list[Step] = []
        self.outputs: list[tuple[int, torch.Tensor]] = []
        self.start: torch.Tensor | None = None
        self._output_count = 0
        try:
            self._open(identity)
        except BaseException:
            self._let_go()
            raise

    def close(self) -> None:
        """Remove the folder: the sweep is over."""
        if self._let_go.alive and os.getpid() == self._lock.process and self._lock.is_held():
            # Killed in between, what is left begins anew; the lock is the last to go.
            order = (_JOURNAL, _PROBLEM, _LOCK)
            with suppress(OSError):
                names = sorted(set(os.listdir(self.path)) - set(order))
                for name in (*names, *order):
                    (self.path / name).unlink(missing_ok=True)
                self.path.rmdir()
        self._let_go()

    def leave(self) -> None:
        """Leave the folder for later."""
        self._let_go()

    def add_step(self, step: Step) -> None:
        """Note an accepted step."""
        self._write("step", self._output_count, *_numbers(step))

    def add_output(self, number: int, steps: int, state: torch.Tensor) -> None:
        """Note that output ``number`` was reached after so many steps."""
        self.write(f"output-{number}", (state.detach().clone(),))
        self._write("output", number, steps)
        self._output_count = number + 1

    def adopt(self, store: CheckpointStore) -> None:
        """Hand the checkpoints of the steps done before to a store."""
        for step in self.steps:
            name = f"stages-{step.index}"
            try:
                size = (self.path / name).lstat().st_size
            except OSError as error:
                raise self._damaged(name, error) from error
            store.adopt(("stages", step.index), size)

    # ------------------------------------------------------------------------------ the folder

    def _make(self, scratch: Any) -> None:
        try:
            private_files.make_folder(self.path)
            self.path.chmod(0o700)  # so that none of it can be read by others either
        except private_files.NotPrivate as error:
            raise CheckpointError(
                f"{error}: nothing in it can be trusted, and it is left as it is; choose another "
                "resume= name or disk= folder, or remove it"
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"disk={os.fspath(scratch)!r} cannot be written to ({error}): give an existing "
                "folder with room, such as a node's scratch space"
            ) from error

    def _open(self, identity: dict[str, str]) -> None:
        """Read what is there, and open the journal to go on with it."""
        problem = self._read_problem()
        if problem is None:
            self._label = f"{secrets.token_hex(8)}/"
            lines = []
            content = {"format": _FORMAT, "run": self._label, "identity": identity}
            self._replace(_PROBLEM, _line(content), sync=True)
        else:
            self._check(problem["identity"], identity)
            self._label = problem["run"]
            lines = self._take_up(self._read_journal())
        self._replace(_JOURNAL, b"".join(map(_line, lines)), sync=False)
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._journal.append(os.open(self.path / _JOURNAL, flags))
        except OSError as error:
            raise self._failed(_JOURNAL, error) from error

    def _replace(self, name: str, content: bytes, sync: bool) -> None:
        path = self.path / name
        try:
            private_files.write(path, (content,), self.path / f"{name}.partial", sync)
        except OSError as error:
            raise self._failed(name, error) from error

    def _failed(self, name: str, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path / name} could not be written ({error}): make room in disk=, or choose "
            "another folder"
        )

    def _damaged(self, name: str, error: object) -> CheckpointError:
        return CheckpointError(f"{self.path / name} is damaged ({error}): {self._remedy}")

    def _read_problem(self) -> dict[str, Any] | None:
        """Return what problem.json says, None if the folder is new."""
        try:
            content = private_files.read(self.path / _PROBLEM)
        except FileNotFoundError:
            others = set(os.listdir(self.path)) - {_LOCK, f"{_PROBLEM}.partial"}
            if others:
                raise self._damaged(_PROBLEM, f"it is missing beside {min(others)!r}") from None
            return None
        except OSError as error:
            raise self._damaged(_PROBLEM, error) from error
        try:
            problem = _value(content.removesuffix(b"\n"))
            if problem["format"] != _FORMAT:
                raise ValueError(f"format {problem['format']}")
            if not isinstance(problem["run"], str) or not isinstance(problem["identity"], dict):
                raise ValueError("other entries")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(_PROBLEM, error) from error
        return dict(problem)

    def _check(self, found: dict[str, str], identity: dict[str, str]) -> None:
        different = sorted(
            name for name in {*found, *identity} if found.get(name) != identity.get(name)
        )
        if different:
            names = ", ".join(different[:8]) + (", ..." if len(different) > 8 else "")
            raise CheckpointError(
                f"the folder {self.path} belongs to another sweep: {names} differ "
                "(tensors are y0 and the parameters); choose another resume= name, make them what "
                "they were, or remove it"
            )

    # ------------------------------------------------------------------------------ the journal

    def _write(self, *entry: Any) -> None:
        """Add a line, if the folder is still this sweep's."""
        if os.getpid() != self._lock.process or not self._lock.is_held():
            raise CheckpointError(
                f"the folder {self.path} was removed or taken over while this solve used it: a "
                "resume= name serves one solve at a time; solve again"
            )
        line = _line(entry)
        try:
            written = os.write(self._journal[0], line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes")
        except OSError as error:
            raise self._failed(_JOURNAL, error) from error

    def _read_journal(self) -> list[list[Any]]:
        """Return the journal's lines, without one that was being written."""
        try:
            content = private_files.read(self.path / _JOURNAL)
        except FileNotFoundError:
            stages = [name for name in os.listdir(self.path) if name.startswith("stages-")]
            if stages:
                raise self._damaged(_JOURNAL, f"it is missing beside {min(stages)!r}") from None
            return []
        except OSError as error:
            raise self._damaged(_JOURNAL, error) from error
        *lines, rest = content.split(b"\n")
        if not _TORN.fullmatch(rest):
            raise self._damaged(_JOURNAL, f"line {len(lines) + 1}")
        found: list[list[Any]] = []
        try:
            for line in lines:
                entry = _value(line)
                if entry[0] == "step":
                    _step(entry[2:])
                elif entry[0] != "output" or len(entry) != 3:
                    raise ValueError(entry[0])
                found.append(entry)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise self._damaged(_JOURNAL, f"line {len(found) + 1}: {error}") from error
        return found

    def _take_up(self, lines: list[list[Any]]) -> list[list[Any]]:
        """Find out how far the sweep came, and return the lines up to there."""
        steps = {entry[2]: (_step(entry[2:]), entry[1]) for entry in lines if entry[0] == "step"}
        done = 0
        while done in steps and os.path.lexists(self.path / f"stages-{done}"):
            done += 1
        if done < 2:
            return []
        kept = done - 1  # the last of them is done again, from its start
        self.steps = [steps[index][0] for index in range(kept)]
        self._output_count = steps[kept][1]
        after = {entry[1]: entry[2] for entry in lines if entry[0] == "output"}
        for number in range(self._output_count):
            if after.get(number, kept + 1) > kept:
                raise self._damaged(_JOURNAL, f"output {number} is missing")
            self.outputs.append((after[number], self.read(f"output-{number}")[0]))
        self.start = Checkpoint.of(self.read(f"stages-{kept}"), started=True).start
        assert self.start is not None
        if self.outputs and self.outputs[0][1].shape != self.start.shape:
            raise self._damaged(f"stages-{kept}", "another size than the output's")
        return [
            entry
            for entry in lines
            if (entry[2] <= kept if entry[0] == "step" else entry[1] < self._output_count)
        ]
