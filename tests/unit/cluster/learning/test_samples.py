"""Which samples are learnt from, held out and replayed, and which experts they are for."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import LearningError
from cluster.learning.choose import Chosen, choose
from cluster.learning.filters import FilterSettings, filtered
from cluster.learning.records import Record
from cluster.learning.reservoir import Reservoir
from cluster.learning.split import fingerprint, holdout_of

_WORDS = ("one", "of", "many", "different", "words", "that", "texts", "are", "made", "from")


def sample(number: int, domain: str = "law", **more: object) -> Record:
    words = random.Random(number).choices(
        ["one", "of", "many", "different", "words", "that", "texts", "are", "made", "from"], k=20
    )
    values: dict[str, object] = {"answer": " ".join(words) + f" {number}", "domain": domain, **more}
    return Record("text", str(number), 0.0, **values)  # type: ignore[arg-type]


@given(st.text(max_size=30), st.sampled_from([0.01, 0.1, 0.5]), st.integers(1, 5))
def test_a_text_is_on_one_side_however_it_is_written(text: str, share: float, parts: int) -> None:
    part = holdout_of(text, share, parts)
    assert part is None or 0 <= part < parts
    assert holdout_of(f"  {text}\n".replace(" ", "\t "), share, parts) == part
    assert fingerprint("A  b\n") == fingerprint("a b")


def test_as_many_are_held_out_as_is_asked_for_and_parts_are_alike() -> None:
    parts = Counter(holdout_of(f"text {number}", 0.1, 4) for number in range(20_000))
    assert 0.09 < 1 - parts[None] / 20_000 < 0.11
    assert all(400 < parts[part] < 600 for part in range(4))


def test_what_teaches_nothing_is_left_out_with_the_reason() -> None:
    good = sample(1)
    bad = {
        "too short": Record("text", "a", 0.0, answer="short"),
        "too long": sample(2, answer="x y z " * 50_000),
        "no answer": Record(
            "request", "b", 0.0, prompt="a prompt that is long enough to be kept", answer=" "
        ),
        "repeats itself": sample(3, answer="buy now " * 200),
        "not liked": sample(4, score=0.2),
        "duplicate": sample(1, domain="other"),
    }
    found = filtered([good, *bad.values()], FilterSettings())
    assert found.kept == (good,) and found.dropped == dict.fromkeys(bad, 1)
    assert filtered([good], FilterSettings(), found.seen).dropped == {"duplicate": 1}
    liked = sample(5, score=1.0)
    assert filtered([liked], FilterSettings()).kept == (liked,)


def test_nobody_alone_teaches_it_much() -> None:
    spam = [sample(number, key="one") for number in range(10)]
    others = [sample(number + 100, key=f"key {number}") for number in range(5)]
    own = [sample(number + 200) for number in range(10)]
    found = filtered([*spam, *others, *own], FilterSettings(most_of_one=3))
    assert found.dropped == {"too many of one owner": 7} and len(found.kept) == 18
    tomorrow = [sample(number + 300, key="one") for number in range(3)]
    next_day = [Record(r.kind, r.id, 86400.0, r.key, answer=r.answer) for r in tomorrow]
    assert len(filtered([*spam, *next_day], FilterSettings(most_of_one=3)).kept) == 6


counts = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 60), min_size=1)


@given(st.integers(1, 40), counts, st.integers(0, 2**32))
def test_a_reservoir_is_bounded_and_even_over_domains(
    capacity: int, given: dict[str, int], seed: int
) -> None:
    samples = [sample(number, domain) for domain, count in given.items() for number in range(count)]
    random.Random(seed).shuffle(samples)
    reservoir = Reservoir(capacity, seed)
    reservoir.add(samples)
    assert len(reservoir) == min(capacity, len(samples))
    for domain, size in reservoir.sizes.items():
        assert size <= given[domain]
        # Whoever has less than another has all that it saw, but for one.
        if size < max(reservoir.sizes.values()) - 1:
            assert size == given[domain]


@given(st.integers(1, 10), st.integers(0, 2**32), st.integers(0, 40))
def test_a_reservoir_that_is_put_down_goes_on_as_if_it_had_not_been(
    capacity: int, seed: int, first: int
) -> None:
    samples = [sample(number, "ab"[number % 3 % 2]) for number in range(40)]
    one = Reservoir(capacity, seed)
    one.add(samples)
    other = Reservoir(capacity, seed)
    other.add(samples[:first])
    other = Reservoir.from_bytes(other.to_bytes(), "it")
    other.add(samples[first:])
    assert other.to_bytes() == one.to_bytes() and other.draw(5) == one.draw(5)


def test_every_sample_of_a_domain_is_kept_with_the_same_chance() -> None:
    kept: Counter[str] = Counter()
    for seed in range(400):
        reservoir = Reservoir(10, seed)
        reservoir.add(sample(number) for number in range(40))
        kept.update(record.id for record in reservoir._domains["law"].kept)
    # Each 100 times of 400: five standard deviations are 43.
    assert len(kept) == 40 and all(57 <= count <= 143 for count in kept.values())


def test_a_damaged_reservoir_and_an_empty_one_are_told_of() -> None:
    reservoir = Reservoir(3)
    with pytest.raises(LearningError, match="is empty"):
        reservoir.draw(1)
    with pytest.raises(LearningError, match="holds nothing"):
        Reservoir(0)
    reservoir.add([sample(1, key="mine"), sample(2)])
    data = reservoir.to_bytes()
    for damaged in (b"", data[5:], data[:40], data[:-5], data.replace(b'"random"', b'"randem"')):
        with pytest.raises(LearningError, match=r"^state"):
            Reservoir.from_bytes(damaged, "state")
    assert reservoir.forget("mine") == 1 and [record.id for record in reservoir.draw(2)] == ["2", "2"]


def test_experts_are_chosen_by_what_is_asked_of_them_more_than_before() -> None:
    new = {0: [50, 30, 10, 10], 3: [25, 25, 25, 25]}
    old = {0: [10, 30, 30, 30], 3: [25, 25, 25, 25]}
    assert choose(new, old) == (Chosen(0, 0, 0.5, 0.1, clone=False),)
    busy = choose({0: [60, 40, 0, 0]}, {0: [40, 10, 25, 25]}, reach=0.9)
    assert busy == (Chosen(0, 1, 0.4, 0.1, clone=False), Chosen(0, 0, 0.6, 0.4, clone=True))
    assert [chosen.gain for chosen in busy] == pytest.approx([0.3, 0.2])
    assert len(choose({0: [60, 40, 0, 0]}, {0: [40, 10, 25, 25]}, reach=0.6)) == 1
    both = {0: [60, 40], 1: [90, 10]}, {0: [50, 50], 1: [50, 50]}
    assert [one.layer for one in choose(*both)] == [0, 1]
    assert [one.layer for one in choose(*both, most=1)] == [1], "of layer 1 more is asked for"


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=16),
    st.floats(0.01, 1.0),
)
def test_the_chosen_are_the_fewest_that_reach(pairs: list[tuple[int, int]], reach: float) -> None:
    new, old = [pair[0] + 1 for pair in pairs], [pair[1] + 1 for pair in pairs]
    gains = [max(0.0, a / sum(new) - b / sum(old)) for a, b in zip(new, old, strict=True)]
    found = [chosen.gain for chosen in choose({0: new}, {0: old}, reach=reach)]
    assert sum(found) >= reach * sum(gains) - 1e-9
    assert found == sorted(gains, reverse=True)[: len(found)]
    if found:
        assert sum(found[:-1]) < reach * sum(gains) + 1e-9


@pytest.mark.parametrize(
    ("new", "old", "reach", "words"),
    [
        ({0: [1, 1]}, {1: [1, 1]}, 0.2, "of different layers"),
        ({0: [1, 1]}, {0: [1, 1, 1]}, 0.2, "2 experts in one count and 3 in the other"),
        ({0: [0, 0]}, {0: [1, 1]}, 0.2, "nothing was counted in layer 0"),
        ({0: [1, 1]}, {0: [1, 1]}, 0.0, "0 is no part"),
        ({0: [1, 1]}, {0: [1, 1]}, 1.5, "1.5 is no part"),
    ],
)
def test_counts_that_do_not_fit_are_refused(
    new: dict[int, list[int]], old: dict[int, list[int]], reach: float, words: str
) -> None:
    with pytest.raises(LearningError, match=words):
        choose(new, old, reach=reach)
