"""How long one host's answers take, and when one is late.

Per power of two of rows a running mean and mean deviation, as TCP keeps them of its round trips (Jacobson 1988,
RFC 6298): a few numbers instead of a sorted window, and a few arithmetic operations per answer.
"""

from __future__ import annotations

from typing import Final

_GAIN: Final = 1 / 16
# An answer is late after so many times the mean and so many mean deviations. On cores that others use as well an
# answer may take three times as long for no fault of the host's.
_MEANS, _DEVIATIONS = 3.0, 4.0
# What counts of one answer at most, in means, so that one outlier says little.
_MOST_COUNTED = 3.0
# No deadline is longer than so many times the host's best recent mean: one that becomes ten times slower is late then,
# however much its answers vary, and cannot raise its own deadline within a step's thirty answers. The best mean is
# forgotten by a tenth a second, for what a host can do may change.
_TIMES_BEST, _FORGOTTEN_PER_S = 6.0, 0.1


class Latency:
    """One host's. All times in seconds."""

    def __init__(self, floor_s: float, cap_s: float) -> None:
        self._floor, self._cap = floor_s, cap_s
        self._by_bucket: dict[int, tuple[float, float, float, float]] = {}
        """Mean, mean deviation, best mean, and when they were last changed."""

    def observe(self, rows: int, seconds: float, now: float) -> None:
        """An answer of `rows` rows took so long; `now` is of any monotonic clock."""
        bucket = rows.bit_length()
        known = self._by_bucket.get(bucket)
        if known is None:
            self._by_bucket[bucket] = seconds, seconds / 2, seconds, now
            return
        mean, deviation, best, before = known
        error = min(seconds, _MOST_COUNTED * mean) - mean
        mean += _GAIN * error
        best = min(best * (1 + _FORGOTTEN_PER_S * (now - before)), mean)
        self._by_bucket[bucket] = mean, deviation + _GAIN * (abs(error) - deviation), best, now

    def deadline(self, rows: int) -> float:
        """After how long an answer of `rows` rows is late; the cap if nothing is known of this host yet."""
        bucket = rows.bit_length()
        known = self._by_bucket.get(bucket)
        if known is not None:
            mean, deviation, best, _ = known
            usual = min(_MEANS * mean + _DEVIATIONS * deviation, _TIMES_BEST * best)
            return min(max(usual, self._floor), self._cap)
        # Never seen: the nearest size below, grown with the rows; without one the nearest above.
        smaller = [seen for seen in self._by_bucket if seen < bucket]
        if smaller:
            nearest = max(smaller)
            grown = self.deadline((1 << nearest) - 1) * 2.0 ** (bucket - nearest + 1)
            return min(grown, self._cap)
        larger = [seen for seen in self._by_bucket if seen > bucket]
        return self.deadline((1 << min(larger)) - 1) if larger else self._cap
