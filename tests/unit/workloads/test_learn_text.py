"""Texts of domains are divided by hash, and judged in whole windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import LearningError
from cluster.learning.split import holdout_of
from workloads.bench.learn_text import divide, read_domain

TEXTS = [f"text {number}: " + "abcdefghij" * (20 + number % 7) for number in range(400)]


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_what_is_judged_is_never_learnt() -> None:
    found = divide("a", TEXTS, encode, window=65, most_judged=2000, most_learnt=10_000)
    held = [text for text in TEXTS if holdout_of(text, 0.1, 1) is not None]
    learnt = bytes(found.learnt.tolist()).decode()
    assert all(bytes(window.tolist()).decode() in "\n".join(held) for window in found.judged_WT)
    assert not any(text in learnt for text in held) and 10_000 <= len(learnt) < 10_300
    assert found.judged_WT.shape[1] == 65 and 2000 <= found.judged_WT.size < 2300
    again = divide("a", TEXTS, encode, window=65, most_judged=2000, most_learnt=10_000)
    assert (again.judged_WT == found.judged_WT).all() and again.judged_bytes == found.judged_bytes


def test_windows_overlap_by_the_token_that_is_not_predicted() -> None:
    found = divide("a", TEXTS, encode, window=65, most_judged=10**6, most_learnt=10_000)
    first, second = (bytes(window.tolist()).decode() for window in found.judged_WT[:2])
    assert first[-1] == second[0]
    predicted = found.judged_WT.shape[0] * 64
    # Of bytes each is a token; one of each text is not predicted.
    assert 0 <= found.judged_bytes - predicted <= len(TEXTS)


def test_too_little_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LearningError, match=r"a has \d+ tokens to learn and"):
        divide("a", TEXTS[:5], encode, window=65, most_judged=2000, most_learnt=10_000)
    with pytest.raises(LearningError, match="no such folder"):
        read_domain(tmp_path / "none")
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "one.txt").write_text("a text")
    with pytest.raises(LearningError, match="has 1 texts, 20 are needed"):
        read_domain(tmp_path / "law")


def test_a_long_file_is_many_texts(tmp_path: Path) -> None:
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "all.md").write_text("\n\n".join("a paragraph of words " * 30 for _ in range(400)))
    name, texts = read_domain(tmp_path / "law")
    assert name == "law" and len(texts) > 20 and max(map(len, texts)) <= 8000
