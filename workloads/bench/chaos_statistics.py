"""What the answers of a chaos run say: gaps, changed tokens, throughput. Pure functions.

A gap is the time between two events of one stream that brought tokens, at the client. Times are nanoseconds
of CLOCK_MONOTONIC, results milliseconds or seconds as their names say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

from workloads.bench.chaos_load import Answer, Outcome
from workloads.bench.report import quantiles

Key = tuple[int, int]
Table = tuple[int, str]
"""A placement table's epoch and digest."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Between two tokens of one stream."""

    from_ns: int
    to_ns: int

    @property
    def ms(self) -> float:
        return (self.to_ns - self.from_ns) / 1e6


@dataclass(frozen=True, slots=True)
class Reference:
    """What the mesh does without faults under the same load."""

    answers: Mapping[Key, frozenset[tuple[int, ...]]]
    """Per prompt what was answered. More than one, if other requests beside change how rows are rounded."""
    gap_ms: tuple[float, ...]

    @property
    def unstable_prompts(self) -> int:
        """Prompts that were answered in two ways without any fault."""
        return sum(len(found) > 1 for found in self.answers.values())

    @property
    def gap_p99_ms(self) -> float:
        return quantiles(self.gap_ms).p99


def reference(answers: Sequence[Answer]) -> Reference:
    """Of fault-free answers; ValueError with the first reason if one of them failed."""
    found: dict[Key, set[tuple[int, ...]]] = {}
    for answer in answers:
        if answer.outcome != "ok":
            raise ValueError(f"{answer.outcome}: {answer.reason}")
        found.setdefault(answer.key, set()).add(answer.tokens)
    frozen = {key: frozenset(tokens) for key, tokens in found.items()}
    return Reference(frozen, tuple(gap.ms for gap in gaps(answers)))


def gaps(answers: Iterable[Answer]) -> list[Gap]:
    """All gaps, stream by stream."""
    return [Gap(a, b) for answer in answers for a, b in pairwise(answer.times_ns)]


def in_window(found: Iterable[Gap], from_ns: int, to_ns: int | None) -> list[Gap]:
    """Those that overlap the window, whole; without `to_ns` it has no end."""
    return [gap for gap in found if gap.to_ns > from_ns and (to_ns is None or gap.from_ns < to_ns)]


def longest_first_token_ms(answers: Iterable[Answer], fault_ns: int) -> float | None:
    """The longest wait for an answer's first token that ended after the fault; None if there is none."""
    waits = [a.times_ns[0] - a.sent_ns for a in answers if a.times_ns and a.times_ns[0] > fault_ns]
    return max(waits) / 1e6 if waits else None


def under_way(answers: Iterable[Answer], fault_ns: int) -> int:
    """Streams that had begun and not ended at that time: where there is none, no gap can be seen."""
    return sum(bool(a.times_ns) and a.times_ns[0] <= fault_ns < a.ended_ns for a in answers)


def changed_tokens(answers: Iterable[Answer], expected: Reference) -> int:
    """Tokens that differ from the fault-free ones in the same place, of unfinished answers too."""
    return sum(
        min(_differing(answer.tokens, good) for good in expected.answers[answer.key]) for answer in answers
    )


def _differing(tokens: Sequence[int], good: Sequence[int]) -> int:
    # A token past the expected end has nothing to equal.
    return sum(a != b for a, b in zip(tokens, good, strict=False)) + max(0, len(tokens) - len(good))


def outcomes(answers: Iterable[Answer]) -> dict[str, int]:
    """How many answers had which outcome; the same keys always."""
    counts = Counter(answer.outcome for answer in answers)
    return {name: counts[name] for name in get_args(Outcome)}


def reasons(answers: Iterable[Answer], most: int = 5) -> list[str]:
    """The commonest reasons of failures, with their counts."""
    counts = Counter(f"{a.outcome}: {a.reason[:160]}" for a in answers if a.outcome != "ok")
    return [f"{count} x {reason}" for reason, count in counts.most_common(most)]


def throughput(answers: Iterable[Answer], begin_ns: int) -> list[int]:
    """Tokens in each second from `begin_ns` on, until the last one."""
    bins: Counter[int] = Counter()
    for answer in answers:
        for time_ns, count in zip(answer.times_ns, answer.counts, strict=True):
            bins[int((time_ns - begin_ns) // 1_000_000_000)] += count
    return [bins[second] for second in range(max(bins, default=-1) + 1)]


def plotted_gaps(found: Iterable[Gap], begin_ns: int, most: int = 400) -> list[tuple[float, float]]:
    """The longest gaps as (seconds from `begin_ns` to its end, milliseconds), in order of time."""
    longest = sorted(found, key=lambda gap: -gap.ms)[:most]
    return sorted((round((gap.to_ns - begin_ns) / 1e9, 3), round(gap.ms, 2)) for gap in longest)


def first_after(values_ns: Iterable[float | None], faults_ns: Sequence[int]) -> float | None:
    """Milliseconds from each fault to the first value after it and before the next fault; the longest of them.

    `values_ns` are samples of a "when it happened last". None if no fault has one.
    """
    seen = [value for value in values_ns if value]
    found = []
    for fault, following in pairwise([*faults_ns, math.inf]):
        after = [value for value in seen if fault <= value < following]
        if after:
            found.append((min(after) - fault) / 1e6)
    return max(found, default=None)


def first_refusal_ms(answers: Iterable[Answer], fault_ns: int) -> float | None:
    """From the fault to the first answer that was refused; None if none was."""
    after = [a.ended_ns - fault_ns for a in answers if a.outcome == "refused" and a.ended_ns >= fault_ns]
    return min(after) / 1e6 if after else None


def split_tables(*seen: Sequence[Table]) -> int:
    """How often the order of epochs was broken: one went back, or had two contents.

    `seen` are the tables that each observer had, in order of time: the controller's and an engine's.
    """
    back = sum(after[0] < before[0] for tables in seen for before, after in pairwise(tables))
    contents: dict[int, set[str]] = {}
    for epoch, digest in (table for tables in seen for table in tables):
        contents.setdefault(epoch, set()).add(digest)
    return back + sum(len(found) - 1 for found in contents.values())
