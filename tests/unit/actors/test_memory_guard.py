"""A process that takes more than it may is told once, with the figures."""

from __future__ import annotations

from pathlib import Path

from actors.memory_guard import guard, own_bytes


def test_it_speaks_when_the_limit_is_passed() -> None:
    sizes = iter([50, 100, 101 << 20])
    said: list[str] = []
    guard(100 << 20, said.append, lambda: next(sizes)).join(10)
    assert said == ["its process took 101 MiB, its memory_limit is 100 MiB"]


def test_memory_that_was_written_counts(tmp_path: Path) -> None:
    before = own_bytes()
    kept = b"x" * (64 << 20)
    assert own_bytes() - before > 60 << 20
    del kept
    other = tmp_path / "status"
    other.write_text("Name:\tpython\nRssAnon:\t    2048 kB\nRssFile:\t 99 kB\n")
    assert own_bytes(other) == 2048 * 1024
