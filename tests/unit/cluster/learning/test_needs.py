"""What a training takes, by a checkpoint's headers."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError
from cluster.learning.needs import check_room, needs
from tests.tiny_models import make_tiny


def test_it_grows_with_the_model_and_the_rows(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_tiny("mixtral", tmp_path / "tiny"))
    small, large = needs(checkpoint, 4, 32), needs(checkpoint, 8, 64)
    assert large.disk == small.disk > 0
    # 4 times as many tokens, of 512 logits each at least.
    assert large.worker - small.worker > 3 * 4 * 32 * 512 * 4
    assert small.worker > 700 << 20


def test_too_little_is_told_by_how_much() -> None:
    check_room(5 << 30, 5 << 30, "memory", "take fewer")
    with pytest.raises(
        LearningError, match=r"about 5.00 GiB of memory, and 3.50 GiB are free: 1.50 GiB too little"
    ):
        check_room(5 << 30, 7 << 29, "memory", "take fewer")
