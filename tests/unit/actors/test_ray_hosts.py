"""What is made of Ray's words about a dead actor, as Ray 2.60 says them."""

from __future__ import annotations

import pytest

from actors.ray_hosts import cause_of_death

HEAD = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 15482\n\tip: 10.0.0.1\n"
)
WORKER = "The actor is dead because its worker process has died. Worker exit type: {} Worker exit detail: {}"
CAUSES = " Some common causes include: (1) the process was killed by the OOM killer"


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        (
            HEAD
            + WORKER.format(
                "SYSTEM_ERROR",
                "Worker unexpectedly exits with a connection error code 2. End of file." + CAUSES,
            ),
            "its process 15482 was killed or crashed",
        ),
        (HEAD + WORKER.format("NODE_OUT_OF_MEMORY", "Task was killed." + CAUSES), "Task was killed."),
        (
            HEAD + "The actor is dead because it was killed by `ray.kill`.",
            "The actor is dead because it was killed by `ray.kill`.",
        ),
        (
            "The actor died because of an error raised in its creation task, ray::A.__init__()\n"
            '  File "a.py", line 14, in __init__\nValueError: no such thing',
            "ValueError: no such thing",
        ),
        ("", "it died"),
    ],
)
def test_one_line_is_left(told: str, cause: str) -> None:
    assert cause_of_death(told) == cause
