"""Environment of the processes that compute: engine and expert hosts."""

from __future__ import annotations


def compute_environment(threads: int) -> dict[str, str]:
    """Environment of a process that computes beside others on the same cores.

    An OpenMP thread that spins between two kernels takes the core from whoever computes next: engine
    and host alternate within every layer, so waiting threads must sleep.
    """
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
