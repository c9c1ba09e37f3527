"""Environment of the processes that compute: engine and expert hosts."""

from __future__ import annotations


def compute_environment(threads: int) -> dict[str, str]:
    """Environment of a process that computes beside others on the same cores (see `actors.openmp`).

    A waiting thread stays awake for about the length of a layer, so that the next parallel region needs no
    wake-up: a millisecond with Intel's runtime, which lets others have the core meanwhile; with GNU's, which
    does not, some 10,000 turns, which is less.
    """
    return {"OMP_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "1", "GOMP_SPINCOUNT": "10000"}
