"""Runs a training job that was put down, on the cluster at an address: a process that tests kill."""

from __future__ import annotations

import sys

from cluster.config import RayConfig
from cluster.ray_cluster import connected


def main(address: str, token: str, folder: str, name: str) -> None:
    with connected(RayConfig(address=address, token_path=token)):
        from actors.ray_training import Workers, run_on_ray
        from cluster.messages import StoreAddress

        run_on_ray(name, StoreAddress(folder), Workers(), lambda progress: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
