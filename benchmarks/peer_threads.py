"""How many threads ``peers.py`` may use; to be set before torch and JAX are loaded."""

from __future__ import annotations

import argparse

__all__ = ["thread_settings"]


def thread_settings(argv: list[str]) -> dict[str, str]:
    """Return what torch, BLAS and XLA read from the environment, for ``--threads`` of ``argv``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_known_args(argv)[0].threads
    # XLA's thread pool has NPROC threads.
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")
    eigen = "true" if threads > 1 else "false"
    return {
        **dict.fromkeys(names, str(threads)),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={eigen}",
    }
