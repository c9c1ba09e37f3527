"""Compile the planner's code ahead: `python -m cluster.precompile`, a part of set-up.

Numba compiles at the first call, some ten seconds in all, and keeps the code beside the modules, or in the user's
cache folder where those can't be written.
"""

from __future__ import annotations

import numpy as np

from cluster.assign import warm
from cluster.fleet import FleetHost, HostCost, PlanSettings, layer_load
from cluster.planner import plan
from cluster.split import LayerSplit


def precompile() -> None:
    """Plan, split and assign once, small."""
    hosts = [FleetHost(f"host-{number}", 3, HostCost()) for number in range(3)]
    loads = [layer_load(0, 1, np.ones((2, 4)), 8.0)]
    planned = plan(hosts, loads, None, PlanSettings(min_replicas=2, tries=10))
    warm()
    LayerSplit(planned.layers[0].holders, [host.cost for host in hosts]).update(np.ones(4))


if __name__ == "__main__":
    precompile()
