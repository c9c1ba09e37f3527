"""From each row's version and the router's choice to the numbers of its experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.row_versions import RowVersions
from cluster.live_versions import LiveVersions, serving, with_version

SIZES = {1: 4, 3: 4}
BASE = LiveVersions("base", {"base": {}})
TWO = with_version(
    with_version(BASE, "one", {1: {0: "a", 2: "b"}}, SIZES), "two", {1: {0: "c"}, 3: {3: "d"}}, SIZES
)
IDS = torch.tensor([[0, 1], [2, 3], [0, -1], [3, 2]], dtype=torch.int32)


class Step:
    """The step's requests, and what was told of rows whose version is not loaded."""

    def __init__(self, versions: LiveVersions = TWO) -> None:
        self.runs: list[tuple[str, int]] = []
        self.unknown: list[tuple[int, ...]] = []
        self.rows = RowVersions(lambda: self.runs, self.unknown.append)
        self.rows.set_versions(versions, SIZES)

    def numbers(self, *runs: tuple[str, int]) -> tuple[list[list[int]], list[list[int]]]:
        """Of both layers."""
        self.runs = list(runs)
        return self.rows.numbers(1, IDS).tolist(), self.rows.numbers(3, IDS).tolist()


def test_rows_of_one_version_get_its_numbers() -> None:
    step = Step()
    assert step.numbers(("base", 4)) == (IDS.tolist(), IDS.tolist())
    assert step.numbers(("one", 4)) == ([[4, 1], [5, 3], [4, -1], [3, 5]], IDS.tolist())
    assert step.numbers(("two", 2), ("two", 2)) == (
        [[6, 1], [2, 3], [6, -1], [3, 2]],
        [[0, 1], [2, 4], [0, -1], [4, 2]],
    )


def test_rows_of_several_versions_share_a_step() -> None:
    step = Step()
    of_first, of_second = step.numbers(("one", 1), ("base", 1), ("two", 2))
    assert of_first == [[4, 1], [2, 3], [6, -1], [3, 2]] and of_second == [[0, 1], [2, 3], [0, -1], [4, 2]]
    assert step.unknown == []


def test_rows_that_are_nobodys_get_the_version_that_serves() -> None:
    step = Step(serving(TWO, "one"))
    assert step.numbers()[0] == step.numbers(("one", 4))[0] == step.numbers(("", 4))[0]
    assert step.numbers(("two", 1), ("base", 1))[0] == [[6, 1], [2, 3], [4, -1], [3, 5]], "padding behind"


def test_rows_of_a_version_that_is_not_loaded_ask_for_nothing() -> None:
    step = Step()
    assert step.numbers(("one", 2), ("gone", 1), ("base", 1))[0] == [[4, 1], [5, 3], [-1, -1], [3, 2]]
    assert step.unknown == [(2,)]
    assert step.numbers(("gone", 4))[1] == [[-1, -1]] * 4 and step.unknown == [(2,), (0, 1, 2, 3)]


def test_requests_go_on_with_the_version_that_took_their_place() -> None:
    step = Step(serving(TWO, "two", continue_running=True))
    assert step.numbers(("base", 1), ("one", 3)) == step.numbers(("two", 4))


@pytest.mark.parametrize("versions", [BASE, LiveVersions(), LiveVersions("one", {"one": {}})])
def test_one_version_like_the_checkpoint_needs_no_look(versions: LiveVersions) -> None:
    assert Step(versions).rows.plain and not Step(TWO).rows.plain
    assert not Step(LiveVersions("one", {"one": TWO.live["one"]}, variants=TWO.variants)).rows.plain


def test_buffers_are_kept_from_step_to_step() -> None:
    step = Step()
    step.runs = [("one", 4)]
    first = step.rows.numbers(1, IDS)
    assert step.rows.numbers(1, IDS).data_ptr() == first.data_ptr()
    assert np.shares_memory(first.numpy(), step.rows.numbers(1, IDS).numpy())


def test_a_version_may_have_more_experts_and_fewer() -> None:
    # Expert 4 is a copy of 1, expert 5 has a content of its own, and 0 is not chosen any more.
    grown = with_version(TWO, "grown", {1: {5: "e"}}, SIZES, {"gate": "g"}, {1: {4: 1, 5: 2}}, {1: (0,)})
    step = Step(serving(grown, "grown"))
    step.runs = [("grown", 2)]
    ids = torch.tensor([[4, 5], [3, -1]], dtype=torch.int32)
    assert step.rows.numbers(1, ids).tolist() == [[1, 7], [3, -1]]
    assert step.rows.numbers(3, ids[1:]).tolist() == [[3, -1]]
    assert step.numbers(("base", 4)) == (IDS.tolist(), IDS.tolist())
    assert step.numbers(("one", 2), ("base", 2))[0] == [[4, 1], [5, 3], [0, -1], [3, 2]]
