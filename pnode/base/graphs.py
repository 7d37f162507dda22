"""Whether there are autograd graphs; how much memory one holds, found by walking it.

Hooks on saved tensors would tell too, but torch.func and sparse tensors do not allow them, and a
hook that returns its tensor makes a cycle of every activation that saves its own output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

__all__ = ["graph_bytes", "no_graph", "nodes"]

#: What a node takes besides its tensors, about: itself, its edges, the objects of its tensors.
NODE_BYTES = 1024


_NOTHING = nullcontext()


def no_graph() -> AbstractContextManager[Any]:
    """Do as ``torch.no_grad()``; nothing, in less time, where there are no graphs already."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def nodes(end: Any, known: Iterable[torch.Tensor] = ()) -> Iterator[Any]:
    """Yield the nodes of a graph, each once, but those behind known tensors.

    ``end`` is a tensor, or the edge where its graph ends.
    """
    seen = {None, *(tensor.grad_fn for tensor in known)}
    pending: list[Any] = [end.grad_fn if isinstance(end, torch.Tensor) else end.node]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending.extend([following for following, _ in node.next_functions])


def graph_bytes(result: torch.Tensor, known: Iterable[torch.Tensor] = (), copy: int = 0) -> int:
    """Return how many bytes the graph of ``result`` keeps alive, ``NODE_BYTES`` a node included.

    Parameters
    ----------
    result : Tensor
        Where the graph ends; not counted itself unless it is saved.
    known : iterable of Tensor
        Tensors that live anyway: these, and the graphs behind those that are not leaves, do not
        count. Storages that are shared count once.
    copy : int, optional
        Address of a storage that does not count either: other graphs of this kind have none.

    Notes
    -----
    What a Python ``autograd.Function`` keeps counts where it was given to ``save_for_backward``, or
    is an attribute of its context.
    """
    found: dict[int, int] = {}
    outside, known = {copy}, list(known)
    for tensor in known:
        outside.update(pointer for pointer, _ in _storages(tensor))
    number = 0
    for node in nodes(result, known):
        number += 1
        for tensor in _saved(node):
            found.update(_storages(tensor))
    return number * NODE_BYTES + sum(
        size for pointer, size in found.items() if pointer not in outside
    )


def _saved(node: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a node has saved."""
    kind: Any = type(node)
    if hasattr(kind, "saved_tensors"):  # of a Python function, which has attributes of its own
        yield from (
            value
            for value in getattr(node, "__dict__", {}).values()
            if isinstance(value, torch.Tensor)
        )
    names = _saved_names(kind)
    for name in tuple(names):
        try:
            value = getattr(node, name)
        except RuntimeError:  # freed, or the user's own hooks object
            continue
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (item for item in value if isinstance(item, torch.Tensor))
            if value and all(isinstance(item, int) for item in value):  # sizes, in all such nodes
                del names[name]
        elif value is not None:  # a number
            del names[name]


@lru_cache(maxsize=1024)
def _saved_names(kind: Any) -> dict[str, None]:
    """Return the attributes of a kind of node that may hold saved tensors.

    Each holds the same kind of thing in all nodes of a kind: torch's have a type in C++, and a
    Python function has ``saved_tensors`` alone.
    """
    own = dict.fromkeys(name for name in dir(kind) if name.startswith("_saved_"))
    return own | ({"saved_tensors": None} if hasattr(kind, "saved_tensors") else {})


def _storages(tensor: torch.Tensor) -> Iterable[tuple[int, int]]:
    """Return address and size of the storages of a tensor: several if it is sparse."""
    if tensor.layout is torch.strided:
        return [_storage(tensor)]
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        return ()
    return map(_storage, parts)


def _storage(part: torch.Tensor) -> tuple[int, int]:
    try:
        storage = part.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # a wrapper of torch.func, a fake tensor
        return id(part), part.numel() * part.element_size()
