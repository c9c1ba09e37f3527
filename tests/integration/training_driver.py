"""Runs a training job that was put down, on the cluster at an address: a process that tests kill."""

from __future__ import annotations

import sys

from cluster.config import RayConfig
from cluster.ray_cluster import connected


def main(address: str, token: str, folder: str, name: str, *numbers: str) -> None:
    """`numbers`: of workers at least and at most, of cores of each, and of seconds between two looks for more."""
    with connected(RayConfig(address=address, token_path=token)):
        from actors.ray_training import Workers, run_on_ray
        from actors.training_job import JobFiles
        from cluster.messages import StoreAddress
        from cluster.versions.files import Files

        workers = Workers()
        if numbers:
            least, most, cpus, resize_s = numbers
            workers = Workers(int(least), int(most), float(cpus), resize_s=float(resize_s))
        saved = run_on_ray(name, StoreAddress(folder), workers, lambda progress: None)
        JobFiles(Files(folder), name).keep(saved)


if __name__ == "__main__":
    main(*sys.argv[1:])
