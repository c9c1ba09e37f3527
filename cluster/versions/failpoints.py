"""Where a test may have a publisher or collector end as `kill -9` ends it.

Only with EXPERTMESH_FAILPOINTS=1 in the environment, as for a host's failpoints; EXPERTMESH_DIE_AT names the step.
"""

from __future__ import annotations

import os
import signal
from typing import Final

SWITCH: Final = "EXPERTMESH_FAILPOINTS"
STEP: Final = "EXPERTMESH_DIE_AT"


def reach(step: str) -> None:
    """Say that this step is reached; nothing comes back if the process is to end there."""
    if os.environ.get(SWITCH) == "1" and os.environ.get(STEP) == step:
        os.kill(os.getpid(), signal.SIGKILL)
