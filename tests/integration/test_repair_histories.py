"""More random histories of the repair, which would make the unit tests slow."""

from __future__ import annotations

import pytest

from tests.unit.cluster.repair_simulator import live
from tests.unit.cluster.test_repair_simulated import HISTORIES


@pytest.mark.long
def test_many_more_random_histories() -> None:
    for seed in range(HISTORIES, HISTORIES + 17_500):
        live(seed)
