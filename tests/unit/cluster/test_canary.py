"""A version on trial, from what routers see of it to the verdict."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cluster.canary import Answered, Canary, Observed, Trial, advanced, begun, observed, verdict
from cluster.live_versions import LiveVersions, chosen, serving, with_candidate, with_version

TRIAL = Trial("new", (0.05,), step_s=10.0, alpha=0.01, give_up_s=1000.0)
VERSIONS = with_version(LiveVersions("old", {"old": {}}), "new", {0: {0: "a"}}, {0: 4})


def answers(
    dice: random.Random, number: int, *, failing: float = 0.0, slower: float = 1.0
) -> tuple[Answered, ...]:
    return tuple(
        Answered(dice.random() < failing, 0.05 * slower * dice.lognormvariate(0, 0.2)) for _ in range(number)
    )


def round_of(
    dice: random.Random, *, failing: float = 0.0, slower: float = 1.0, nats: float | None = None
) -> Observed:
    """What a router sees in some seconds: five in a hundred requests are the candidate's."""
    texts = () if nats is None else tuple(dice.gauss(nats, 0.01) for _ in range(4))
    return Observed("new", answers(dice, 95), answers(dice, 5, failing=failing, slower=slower), texts)


def judged(seed: int, rounds: int, **bad: float | None) -> tuple[Canary, str, int]:
    """The trial, what became of it, and after how many rounds."""
    dice, canary = random.Random(seed), begun(TRIAL, 0.0)
    for number in range(rounds):
        canary = observed(canary, round_of(dice, **bad))  # type: ignore[arg-type]
        found = verdict(canary, 1.0)
        if found.what != "wait":
            return canary, found.what, number + 1
    return canary, "wait", rounds


def test_a_version_that_is_as_good_is_promoted_and_not_rolled_back() -> None:
    ends = [judged(seed, 200, nats=0.0)[1] for seed in range(20)]
    assert ends.count("rollback") <= 1 and ends.count("promote") >= 18


@pytest.mark.parametrize(
    ("bad", "kind"), [({"failing": 0.3}, "errors"), ({"slower": 1.8}, "latency"), ({"nats": 0.05}, "quality")]
)
def test_a_version_that_is_worse_in_anything_is_rolled_back_with_the_reason(
    bad: dict[str, float], kind: str
) -> None:
    for seed in range(5):
        canary, what, rounds = judged(seed, 100, **bad)
        assert what == "rollback" and rounds < 60
        assert verdict(canary, 1.0).reason.startswith(f"{kind}: ")


def test_what_users_dislike_is_rolled_back() -> None:
    dice, canary = random.Random(1), begun(TRIAL, 0.0)
    for _ in range(60):
        good, bad = tuple(dice.random() for _ in range(5)), tuple(dice.random() * 0.4 for _ in range(5))
        canary = observed(canary, Observed("new", liked_serving=good, liked_candidate=bad))
    assert verdict(canary, 1.0).what == "rollback" and "less liked" in verdict(canary, 1.0).reason


def test_shares_grow_when_nothing_is_wrong_and_the_last_one_decides() -> None:
    dice, canary = random.Random(2), begun(replace(TRIAL, shares=(0.01, 0.5)), 0.0)
    assert verdict(canary, 99.0).what == "wait", "nothing was seen"
    for _ in range(100):
        canary = observed(canary, round_of(dice))
    assert verdict(canary, 9.0).what == "wait" and verdict(canary, 10.0).what == "advance"
    canary = advanced(canary, 10.0)
    assert canary.share == 0.5 and verdict(canary, 10.0).what == "promote"


def test_what_is_never_shown_to_be_good_goes_in_the_end() -> None:
    canary = observed(begun(TRIAL, 0.0), round_of(random.Random(3)))
    assert verdict(canary, 999.0).what == "wait"
    gone = verdict(canary, 1000.0)
    assert gone.what == "rollback" and "not shown to be good enough" in gone.reason


def test_what_was_seen_of_another_trial_does_not_count() -> None:
    canary = begun(TRIAL, 0.0)
    assert observed(canary, Observed("other", answers(random.Random(4), 9))) is canary


@pytest.mark.parametrize("shares", [(), (0.0,), (1.5,), (0.5, 0.05), (0.1, 0.1)])
def test_shares_that_are_none_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="shares"):
        begun(replace(TRIAL, shares=shares), 0.0)


def test_the_share_is_kept_to_and_everybody_stays_on_one_side() -> None:
    users, share = [f"user-{n}" for n in range(4000)], 0.05
    trial = with_candidate(VERSIONS, "new", share)
    new = {user for user in users if chosen(trial, user) == "new"}
    assert abs(len(new) - 4000 * share) <= 2.576 * (4000 * share * (1 - share)) ** 0.5, "binomial, 99 %"
    assert {user for user in users if chosen(trial, user) == "new"} == new
    more = {user for user in users if chosen(with_candidate(VERSIONS, "new", 0.25), user) == "new"}
    assert new < more and all(chosen(with_candidate(VERSIONS, "new", 1.0), user) == "new" for user in users)
    assert {chosen(with_candidate(trial, "new", 0.0), user) for user in users} == {"old"}
    assert {chosen(serving(trial, "new"), user) for user in users} == {"new"}
