from __future__ import annotations

import pytest

from cluster.config_values import parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("500MB", 500_000_000),
        ("1g", 10**9),
        (17, 17),
        ("17", 17),
    ],
)
def test_sizes(text: object, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "4 GiBs", "-1", 0, -5, "0", True, None, [], "nan"])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="should be a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30s", 30), ("500ms", 0.5), ("20us", 2e-5), ("5m", 300), ("1h", 3600), (1.5, 1.5), ("2", 2)],
)
def test_durations(text: object, expected: float) -> None:
    assert parse_duration(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 day", "nan", "inf", None, True, "1s1s"])
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="should be a duration"):
        parse_duration(text)
