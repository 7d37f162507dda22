"""Folders of compiled graphs that are empty but for what does not depend on the graph."""

import os
from pathlib import Path

import torch

from pnode.solvers.compiled import inductor


def share_headers(folder: Path) -> None:
    """Spare a new folder the precompiled headers that this session has, 8 s of compilation."""
    kept, own = inductor.cache_folder() / ".inductor", folder / ".inductor"
    own.mkdir(mode=0o700)
    if not any(kept.glob("headers-*.gch")):  # nobody has compiled anything yet
        inductor.compile_graph("headers", lambda x: (x + 1.0,), [torch.zeros(1)])
    for path in [*kept.glob("headers-*.h"), *kept.glob("headers-*.gch"), *kept.glob("*.so")]:
        try:
            os.link(path, own / path.name)
        except OSError:  # another file system: they are made again
            return
